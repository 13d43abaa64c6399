"""Dendrites hang on a layer as a submodule and a hook: how they get there and off again, and how a load brings them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from pl_dendrites.core.dendrites import Dendrites, add_dendrites, resume_state
from pl_dendrites.core.structure import read_structure
from pl_dendrites.core.targets import plain_name

__all__ = [
    "apply_structure",
    "dendrites_of",
    "grow_on_load",
    "hang",
    "hosts",
    "know_neurons",
    "stop_growing_on_load",
    "take_off",
]


def hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that dendrites hang on, with their names."""
    for name, module in model.named_modules():
        # Not getattr: a compiled module answers for the one inside it, which comes by itself.
        if isinstance(module._modules.get("dendrites"), Dendrites):
            yield plain_name(name), module


def dendrites_of(layer: nn.Module) -> Dendrites:
    """The dendrites that hang on a layer."""
    dendrites = layer.dendrites
    assert isinstance(dendrites, Dendrites)
    return dendrites


def know_neurons(layer: nn.Module, neurons: int) -> None:
    """Tell a layer's dendrites how many neurons it has, if no forward pass has yet."""
    kind = dendrites_of(layer).kind
    kind.neurons = kind.neurons or neurons


def hang(layer: nn.Module) -> None:
    """Hang an empty set of dendrites on a layer."""
    layer.dendrites = dendrites = Dendrites(layer).train(layer.training)
    layer.register_forward_hook(add_dendrites, with_kwargs=True)
    if dendrites.kind.stateful:
        layer.register_forward_pre_hook(resume_state, with_kwargs=True)
    # A graph that was compiled for the layer without hooks, here or in another model of the class, would be run again,
    # for hooks are not among the things that PyTorch compares. The type of this dict is.
    layer._parameters = OrderedDict(layer._parameters)


def take_off(layer: nn.Module) -> None:
    """Undo :func:`hang`."""
    del layer.dendrites
    _remove_hook(layer._forward_hooks, add_dendrites, layer._forward_hooks_with_kwargs)
    _remove_hook(layer._forward_pre_hooks, resume_state, layer._forward_pre_hooks_with_kwargs)
    layer._parameters = dict(layer._parameters)


def grow_on_load(model: nn.Module) -> bool:
    """Let ``model.load_state_dict`` first give the model the dendrites that it loads. Twice is the same as once.

    Args:
        model: any module.

    Returns:
        Whether it was so already.

    Example:
        >>> from pl_dendrites.core import attach
        >>> grown = nn.Linear(3, 2)
        >>> attach(grown).grow([""])
        >>> fresh = nn.Linear(3, 2)
        >>> grow_on_load(fresh)
        False
        >>> fresh.load_state_dict(grown.state_dict())
        <All keys matched successfully>
        >>> fresh.dendrites.count
        1
    """
    if any(_is_hook(entry, _restore_before_loading) for entry in model._load_state_dict_pre_hooks.values()):
        return True
    model.register_load_state_dict_pre_hook(_restore_before_loading)
    return False


def stop_growing_on_load(model: nn.Module) -> None:
    """Undo :func:`grow_on_load`."""
    _remove_hook(model._load_state_dict_pre_hooks, _restore_before_loading)


def _restore_before_loading(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    apply_structure(model, state_dict, prefix)


def apply_structure(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Give a model the dendrites that a state_dict holds, see :func:`~pl_dendrites.core.network.restore_structure`."""
    structure = read_structure(model, state_dict, prefix)
    for name, wanted in structure.items():
        layer = model.get_submodule(name)
        if not isinstance(getattr(layer, "dendrites", None), Dendrites):
            hang(layer)
        if wanted.forms:
            know_neurons(layer, wanted.neurons)
        dendrites_of(layer).reshape(layer, wanted.forms)


def _is_hook(entry: Any, function: Callable[..., Any]) -> bool:
    return getattr(entry, "hook", entry) is function


def _remove_hook(hooks: dict[int, Any], function: Callable[..., Any], *companions: dict[int, Any]) -> None:
    # By function, not by the handle that registering returned: a copy or an unpickled model has no handle.
    for key in [key for key, entry in hooks.items() if _is_hook(entry, function)]:
        for table in (hooks, *companions):
            table.pop(key, None)
