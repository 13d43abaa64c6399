"""Structure before weights: what a state_dict says of a model's dendrites, and giving a model just these.

Everything is checked against the model before anything changes, and nothing larger than the state_dict itself is ever
allocated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.claims import Claims, shape_of
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.growth.dendrites import AnyForm, Dendrites
from pl_dendrites.core.growth.hooks import dendrites_of, hang, is_hook, know_neurons, remove_hook
from pl_dendrites.core.keys import count_in, entries_by_layer, is_placed, is_shared
from pl_dendrites.core.kinds import LayerKind, inputs_of, kind_of, narrowed
from pl_dendrites.core.placed_structure import read_placed
from pl_dendrites.core.shared_structure import Misfit, read_shared
from pl_dendrites.core.targets import reasons_against, why_not_around
from pl_dendrites.core.tensors import alike

__all__ = [
    "LayerStructure",
    "apply_structure",
    "grow_on_load",
    "read_structure",
    "reshape_layers",
    "stop_growing_on_load",
    "taken_whole",
]

_WHOLE = ContextVar("pl_dendrites_whole", default=False)


@dataclass(frozen=True)
class LayerStructure:
    """What a state_dict says of one layer.

    Attributes:
        forms: what its blocks look like.
        neurons: number of neurons.
    """

    forms: tuple[AnyForm, ...]
    neurons: int = 0


def grow_on_load(model: nn.Module) -> bool:
    """Let ``model.load_state_dict`` first give the model the dendrites that it loads. Twice is the same as once.

    With ``strict=False`` a layer that the state_dict says nothing of the dendrites of keeps them; see
    ``taken_whole``.

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
    if any(is_hook(entry, _restore_before_loading) for entry in model._load_state_dict_pre_hooks.values()):
        return True
    model.register_load_state_dict_pre_hook(_restore_before_loading)
    return False


def stop_growing_on_load(model: nn.Module) -> None:
    """Undo :func:`grow_on_load`."""
    remove_hook(model._load_state_dict_pre_hooks, _restore_before_loading)


@contextmanager
def taken_whole() -> Iterator[None]:
    """Within the block what models load are whole states of theirs, for ``strict=False`` too.

    A layer without dendrites in such a state_dict loses those that it has. Otherwise ``strict=False`` leaves them there
    and lists their entries as missing, for what is loaded may be a part.

    Example:
        >>> from pl_dendrites.core import attach
        >>> model = nn.Linear(3, 2)
        >>> plain = dict(model.state_dict())
        >>> attach(model).grow([""])
        >>> len(model.load_state_dict(plain, strict=False).missing_keys), model.dendrites.count
        (5, 1)
        >>> with taken_whole():
        ...     model.load_state_dict(plain, strict=False)
        <All keys matched successfully>
        >>> model.dendrites.count
        0
    """
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def _restore_before_loading(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *_: Any
) -> None:
    apply_structure(model, state_dict, prefix, whole=_WHOLE.get() or (strict and _loads_strictly()))


def _loads_strictly() -> bool:
    # PyTorch tells its hooks `strict=True` whatever `load_state_dict` was called with: only that call itself knows.
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "load_state_dict" and frame.f_code.co_filename == torch.nn.modules.module.__file__:
            return bool(frame.f_locals.get("strict", True))
        frame = frame.f_back
    return True


def apply_structure(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *, whole: bool = True) -> None:
    """Give a model the dendrites that a state_dict holds, see :func:`~pl_dendrites.restore_structure`.

    Arguments are those of :func:`read_structure`.
    """
    reshape_layers(model, read_structure(model, state_dict, prefix, whole=whole))


def reshape_layers(model: nn.Module, structure: Mapping[str, LayerStructure]) -> None:
    """Give layers of a model the dendrites that :func:`read_structure` found, by the layers' names.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> reshape_layers(model, {"0": LayerStructure((Form(2),), 2)})
        >>> model[0].dendrites.count
        2
    """
    for name, wanted in structure.items():
        layer = model.get_submodule(name)
        if not isinstance(getattr(layer, "dendrites", None), Dendrites):
            hang(layer)
        if wanted.forms:
            know_neurons(layer, wanted.neurons)
        dendrites_of(layer).reshape(layer, wanted.forms)


def read_structure(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *, whole: bool = True
) -> dict[str, LayerStructure]:
    """The dendrites that each layer of a model must have for a state_dict to fit.

    Args:
        model: the model.
        state_dict: weights, perhaps of a larger model of which this one is the part named by ``prefix``.
        prefix: what comes before the model's own names in the state_dict.
        whole: whether a layer that the state_dict speaks of, but of no dendrites of it, is to have none.

    Returns:
        The structure of each layer that has dendrites in the state_dict and, of a whole one, of each that has some in
        the model and none there, provided that the state_dict speaks of that layer at all.

    Raises:
        ValueError: if the state_dict does not fit; a line for every layer that differs.

    Example:
        >>> read_structure(nn.Sequential(nn.Linear(2, 2)), {"0.weight": torch.zeros(2, 2)})
        {}
    """
    parts = entries_by_layer(state_dict, prefix)
    # With duplicates: a module used under two names has its entries under both.
    modules = dict(model.named_modules(remove_duplicate=False))
    against = reasons_against(model, {modules[name] for name in parts if name in modules}) if parts else {}
    wrong, structure, claims = [], {}, Claims()
    told: dict[nn.Module, LayerStructure] = {}
    for name, blocks in parts.items():
        try:
            layer = _able(modules.get(name), against, blocks)
            structure[name] = _read_layer(layer, blocks)
            _check_own(layer, state_dict, f"{prefix}{name}." if name else prefix)
            if layer not in told:
                claims.take((value for values in blocks.values() for value in values.values()), "its dendrites")
            if told.setdefault(layer, structure[name]) != structure[name]:
                raise ValueError("it has other dendrites under another name in the state_dict")
        except ValueError as error:
            wrong.append(f"  '{name}': {error}")
    if wrong:
        raise ValueError("the state_dict does not fit the model:\n" + "\n".join(wrong))
    for name, module in modules.items() if whole else ():
        own = module._modules.get("dendrites")
        path = f"{prefix}{name}." if name else prefix
        # Any of its entries will do: a parametrized layer has no "weight". A whole checkpoint need not have any, where
        # the model saves a part of itself.
        spoken_of = _WHOLE.get() or any(key.startswith(path) for key in state_dict)
        if module not in told and isinstance(own, Dendrites) and spoken_of:
            structure[name] = LayerStructure(())
    return structure


def _able(
    layer: nn.Module | None, against: Mapping[nn.Module, str | None], blocks: Mapping[str, Mapping[str, Any]]
) -> nn.Module:
    if layer is None:
        raise ValueError("it has dendrites in the state_dict, but the model has no such layer")
    reason = against.get(layer, "it is a part of dendrites itself")
    if all(is_shared(values) for values in blocks.values()):  # which can hang around any module
        reason = why_not_around(layer) if layer in against else reason
    if reason is not None:
        raise ValueError(
            f"it has dendrites in the state_dict, but a {type(layer).__name__} cannot have any here: {reason}"
        )
    return layer


def _check_own(layer: nn.Module, state_dict: Mapping[str, Any], path: str) -> None:
    # PyTorch would notice too, but after the model has grown.
    for name, own in (*layer.named_parameters(), *layer.named_buffers()):
        given = state_dict.get(f"{path}{name}")
        inside = name.startswith("dendrites.") or ".dendrites." in name
        if not inside and isinstance(given, Tensor) and shape_of(given) != tuple(own.shape):
            raise ValueError(f"{name} must have the shape {tuple(own.shape)}, got {shape_of(given)}")


def _read_layer(layer: nn.Module, blocks: Mapping[str, Mapping[str, Any]]) -> LayerStructure:
    numbers = [str(number) for number in range(len(blocks))]
    if set(blocks) != set(numbers):
        raise ValueError(f"its dendrites are incomplete: there are the stacks {sorted(blocks)}")
    known = kind_of(layer).neurons
    forms: list[AnyForm] = []
    try:
        neurons = _told_neurons(blocks) if known is None else known  # of one that has not run yet the state_dict tells
    except Misfit as misfit:
        raise ValueError(f"dendrites.0.{misfit}") from None
    for number in numbers:
        values = blocks[number]
        try:
            if is_shared(values):
                forms.append(read_shared(values, known))
            elif is_placed(values):
                forms.append(read_placed(layer, values))
            else:
                forms.append(_read_block(layer, values, sum(form.count for form in forms), neurons))
        except Misfit as misfit:
            raise ValueError(f"dendrites.{number}.{misfit}") from None
    return LayerStructure(tuple(forms), neurons)


def _told_neurons(blocks: Mapping[str, Mapping[str, Any]]) -> int:
    if is_shared(blocks["0"]):
        return read_shared(blocks["0"]).outputs
    first = blocks["0"].get("weights.0")
    Claims().take([first], "its dendrites")
    return _length(first)


def _read_block(layer: nn.Module, values: Mapping[str, Any], below: int, every: int) -> Form:
    count = count_in(values)
    chosen = _length(values["neurons"]) if "neurons" in values else None
    shape = shape_of(values.get("nodes.inputs"))
    fan_in = shape[-1] if isinstance(shape, tuple) and shape else None
    kind = narrowed(kind_of(layer), layer, fan_in, chosen)
    neurons = every if chosen is None else chosen
    if neurons > every:
        raise Misfit(f"neurons must be at most {every}, got {neurons}")
    _check_nodes(kind, layer, values, count)
    entries = {f"nodes.{part}": value for part, value in kind.template(layer, max(count, 1)).items()}
    entries["links"] = torch.empty(count * below + count * (count - 1) // 2, neurons, device="meta")
    entries["code"] = torch.empty(2, dtype=torch.int64, device="meta")
    if chosen is not None:
        entries["neurons"] = torch.empty(neurons, dtype=torch.int64, device="meta")
    entries.update({f"weights.{j}": torch.empty(neurons, device="meta") for j in range(max(count, 1))})
    missing = sorted(set(entries) - set(values))
    if missing or set(values) - set(entries):
        raise ValueError(
            f"its dendrites are incomplete: there are {sorted(values)}, missing {missing}; who saves a part of a model"
            " must save all of its dendrites"
        )
    for part, wanted in entries.items():
        if shape_of(values[part]) != tuple(wanted.shape):
            raise Misfit(f"{part} must have the shape {tuple(wanted.shape)}, got {shape_of(values[part])}")
        if not alike(wanted.dtype, values[part].dtype):
            must = "be floating point" if wanted.is_floating_point() else "hold integers"
            raise Misfit(f"{part} must {must}, got {values[part].dtype}")
    # By themselves: whoever looks at all numbers takes as long as they claim to be. All layers together come later.
    Claims().take(values.values(), "its dendrites")
    activation, live = _numbers(values, "code", len(ACTIVATIONS))
    if live not in (0, 1):
        raise Misfit(f"code must end with 0 or 1, got {live}")
    if chosen is not None and sorted(set(numbers := _numbers(values, "neurons", every))) != numbers:
        raise Misfit("neurons must be ascending")
    if fan_in is not None:
        _numbers(values, "nodes.inputs", inputs_of(layer))
    return Form(count, list(ACTIVATIONS)[activation], bool(live), fan_in, chosen)


def _check_nodes(kind: LayerKind, layer: nn.Module, values: Mapping[str, Any], count: int) -> None:
    # Where each dendrite has entries of its own, the name of an output weight would ask for the names of all these.
    if count > 1:
        one, two = (len(kind.template(layer, number)) for number in (1, 2))
        if one + (two - one) * (count - 1) > len(values):
            raise ValueError(f"its dendrites are incomplete: there are {count}, with {len(values)} entries together")


def _numbers(values: Mapping[str, Any], part: str, bound: int) -> list[int]:
    value = values[part]
    if value.numel() and not (int(value.min()) >= 0 and int(value.max()) < bound):
        raise Misfit(f"{part} must hold integers below {bound}, got {int(value.min())} to {int(value.max())}")
    numbers: list[int] = value.flatten().tolist() if value.ndim == 1 else []
    return numbers


def _length(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) and not is_lazy(value) else 0
