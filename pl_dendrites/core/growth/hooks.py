"""Dendrites hang on a layer as a submodule and a hook: how they get there and off again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.kinds import Inputs
from pl_dendrites.core.rule.transforms import trained_levels
from pl_dendrites.core.tensors import is_transformed

__all__ = [
    "add_dendrites",
    "attached_layers",
    "dendrites_of",
    "hang",
    "hosts",
    "is_hook",
    "know_neurons",
    "remove_hook",
    "resume_state",
    "take_off",
    "take_off_empty",
]


def add_dendrites(layer: nn.Module, args: tuple[Any, ...], *called: Any) -> Any:
    """The forward hook of a layer that has dendrites; a function of the module, so that it can be pickled.

    Args:
        layer: the layer.
        args: what it was called with.
        *called: arguments that it was given by name, and what it returned.

    Raises:
        ValueError: if something else stands in the layer's place, and took over its hooks.
    """
    dendrites = _hung_on(layer, called, 2)
    kwargs, out = called
    inputs, kind = Inputs(args, kwargs), dendrites.kind
    if kind.dim == 0:
        kind.meet(layer, inputs, out)
    if kind.unknown is not None:
        if len(dendrites):
            raise ValueError(f"a {type(layer).__name__} has dendrites, but {kind.unknown}")
        return out
    if dendrites.memory is not None:
        inputs = dendrites.memory.running(inputs)
    if dendrites.needs_copy(layer):
        inputs = inputs.copied()
    if (dendrites.candidates is None and dendrites.watch is None) or not is_transformed():
        return dendrites(inputs, out)
    return dendrites(inputs, out, levels=trained_levels(layer.parameters()))


def resume_state(layer: nn.Module, args: tuple[Any, ...], *called: Any) -> Inputs:
    """The forward pre-hook of a layer whose dendrites have a memory; see :func:`add_dendrites`."""
    dendrites = _hung_on(layer, called, 1)
    return dendrites.begin(Inputs(args, *called))


def _hung_on(layer: nn.Module, called: tuple[Any, ...], wanted: int) -> Dendrites:
    # PyTorch's quantisation hands the hooks of a layer to what it puts in its place, as hooks that see no names.
    dendrites = layer._modules.get("dendrites", vars(layer).get("dendrites"))  # there where they are hidden
    if len(called) != wanted or not isinstance(dendrites, Dendrites):
        raise ValueError(
            f"a {type(layer).__module__}.{type(layer).__name__} has taken the place of a layer that has dendrites, and"
            " does not compute them: what replaces layers must be given `pl_dendrites.fuse(model)`"
        )
    return dendrites


def attached_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model that dendrites hang on, with their names as a state_dict has them."""
    for name, module in model.named_modules():
        # Not getattr: a compiled module answers for the one inside it, which comes by itself.
        if isinstance(module._modules.get("dendrites"), Dendrites):
            yield name, module


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
    # The first of all forward hooks: what the user's own see, keep or replace is what the layer returns, dendrites
    # included. The last of the pre-hooks: theirs may say what the layer is called with.
    layer.register_forward_hook(add_dendrites, with_kwargs=True, prepend=True)
    if dendrites.memory is not None:
        layer.register_forward_pre_hook(resume_state, with_kwargs=True)
    # A graph that was compiled for the layer without hooks, here or in another model of the class, would be run again,
    # for hooks are not among the things that PyTorch compares. The type of this dict is.
    layer._parameters = OrderedDict(layer._parameters)


def take_off(layer: nn.Module) -> None:
    """Undo :func:`hang`."""
    del layer.dendrites
    remove_hook(layer._forward_hooks, add_dendrites, layer._forward_hooks_with_kwargs)
    remove_hook(layer._forward_pre_hooks, resume_state, layer._forward_pre_hooks_with_kwargs)
    layer._parameters = dict(layer._parameters)


def take_off_empty(model: nn.Module) -> None:
    """Undo :func:`hang` for all layers of a model that have no dendrites.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> hang(model[0])
        >>> take_off_empty(model)
        >>> list(attached_layers(model))
        []
    """
    for _, layer in list(attached_layers(model)):
        if not len(dendrites_of(layer)):
            take_off(layer)


def is_hook(entry: Any, function: Callable[..., Any]) -> bool:
    """Whether an entry of one of a module's tables of hooks is a function."""
    return getattr(entry, "hook", entry) is function


def remove_hook(hooks: dict[int, Any], function: Callable[..., Any], *companions: dict[int, Any]) -> None:
    """Take a function out of a module's table of hooks.

    Args:
        hooks: the table.
        function: what was registered.
        *companions: tables with the same keys.
    """
    # By function, not by the handle that registering returned: a copy or an unpickled model has no handle.
    for key in [key for key, entry in hooks.items() if is_hook(entry, function)]:
        for table in (hooks, *companions):
            table.pop(key, None)


def hosts(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that dendrites hang on, by their names."""
    return {plain_name(name): layer for name, layer in attached_layers(model)}
