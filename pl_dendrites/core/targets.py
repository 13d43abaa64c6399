"""Which layers can have dendrites, and why not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core.cost import set_parameters
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.kinds import is_layer, kind_class, kind_of
from pl_dendrites.core.markup import Name, Table, in_notebook

__all__ = [
    "FROZEN",
    "Predicate",
    "Selection",
    "Targets",
    "is_frozen",
    "reasons_against",
    "select_targets",
    "why_not_around",
]

Predicate = Callable[[str, nn.Module], bool]
Targets = Literal["frozen"] | Sequence[str] | Predicate
FROZEN: Literal["frozen"] = "frozen"

_IS_FROZEN = "its parameters are frozen: name it in `targets` to let it grow"
_NOT_FROZEN = "it is trainable, and `targets` means the frozen layers"


class Selection(NamedTuple):
    """What :func:`select_targets` found; printed, or shown by a notebook, it is a table.

    Attributes:
        chosen: the target layers by name.
        skipped: name and reason for every layer that was asked for, or could be thought to be, and is left alone.

    Example:
        >>> print(select_targets(nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 3)), exclude=["1"]))
        layer  type    neurons  parameters per dendrite
        0      Linear        8                       48
    """

    chosen: dict[str, nn.Module]
    skipped: dict[str, str]

    def __str__(self) -> str:
        """A row for every target layer, and a line for every layer that is left alone."""
        alone = (f"'{name}' is left alone: {reason}" for name, reason in self.skipped.items())
        return "\n".join([str(self._table()), *alone])

    def _repr_html_(self) -> str:
        alone = [(Name(name or "model"), reason) for name, reason in self.skipped.items()]
        return in_notebook(self._table(), Table("Layers left alone", ("layer", "why"), alone, words=("why",)))

    def _table(self) -> Table:
        rows = []
        for name, layer in self.chosen.items():
            kind = kind_of(layer)
            # Each neuron has an output weight too; of a user's own module a forward pass tells how many there are.
            known = kind.neurons is not None
            cost = f"{set_parameters(kind, layer)}{'' if known else ' + neurons'}"
            rows.append((Name(name or "model"), type(layer).__name__, str(kind.neurons) if known else "?", cost))
        columns = ("layer", "type", "neurons", "parameters per dendrite")
        return Table("Layers that grow", columns, rows, words=("type",))


def select_targets(
    model: nn.Module,
    targets: Targets | None = None,
    exclude: Sequence[str] | Predicate = (),
) -> Selection:
    """The layers of a model that receive dendrites. Nothing changes; this is what ``attach`` would do.

    Args:
        model: any module.
        targets: names, glob patterns of names (``"encoder.*"``) or type names (``"Conv2d"``), or a predicate of name
            and module; ``None``: every Linear, convolution and recurrent layer that is not frozen; ``"frozen"``: every
            one that is. Globs and predicates choose among layers of those types; a name, or a type name that none of
            these layers has, may mean any other module too, whose dendrites are then copies of it.
        exclude: names, patterns or a predicate of what is taken out of ``targets``.

    Returns:
        The chosen layers and those left alone with the reason.

    Raises:
        ValueError: if a pattern matches nothing, or no layer is left; lists the layers there are and, for each near
            miss, why not.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> list(select_targets(model).chosen), list(select_targets(model, exclude=["2"]).chosen)
        (['0', '2'], ['0'])
        >>> list(select_targets(model, lambda name, layer: layer.out_features < 4).chosen)
        ['2']
        >>> _ = model[0].requires_grad_(False)
        >>> list(select_targets(model).chosen), list(select_targets(model, "frozen").chosen)
        (['2'], ['0'])
        >>> select_targets(model, targets=["LayerNorm"])
        Traceback (most recent call last):
        ValueError: `targets`: no layer can have dendrites for ['LayerNorm'].
          '1' (LayerNorm): it has no weight matrix
        Layers that can: '0' (Linear), '2' (Linear)
    """
    for argument, patterns in (("targets", targets), ("exclude", exclude)):
        if isinstance(patterns, str) and (argument, patterns) != ("targets", FROZEN):
            or_frozen = ", or 'frozen'" if argument == "targets" else ""
            raise ValueError(f"`{argument}` must be a list of names or patterns{or_frozen}, got {patterns!r}")
    modules = _modules(model)
    all_frozen, named = isinstance(targets, str), None if targets is None or isinstance(targets, str) else targets
    against = reasons_against(model, () if named is None or callable(named) else _asked_for(named, modules))
    reasons = {name: against[module] for name, module in modules.items()}
    able = {name: modules[name] for name, reason in reasons.items() if reason is None}
    excluded = _matches(exclude, able)
    _refuse_unmatched("exclude", exclude, modules, able, reasons)
    if named is None:
        asked = {name for name, module in modules.items() if is_layer(module)}
        # Who froze a layer wants it left as it is, and pays for no backward pass through it; asked for, it can grow.
        others = {name for name in asked & able.keys() if is_frozen(able[name]) != all_frozen}
        reasons |= dict.fromkeys(others, _NOT_FROZEN if all_frozen else _IS_FROZEN)
        able = {name: layer for name, layer in able.items() if name not in others}
    else:
        _refuse_unmatched("targets", named, modules, able, reasons)
        asked = _matches(named, able if callable(named) else modules)
    chosen = {name: able[name] for name in able if name in asked and name not in excluded}
    # Without names, whatever has a weight matrix of its own could be thought to be a layer.
    thought = {name for name, module in modules.items() if named is None and _has_matrix(name, module)}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None and name in asked | thought}
    for name in list(chosen):
        outer = next((parent for parent in _parents(name) if parent in chosen), None)
        if outer is not None:
            del chosen[name]
            skipped[name] = f"it is a part of '{outer}', which gets dendrites as a whole"
    if not chosen:
        wish = f"every {FROZEN if all_frozen else 'supported'} layer" if named is None else _wish(named)
        without = f" without {_wish(exclude)}" if exclude else ""
        raise ValueError(
            f"`targets`: no layer can have dendrites for {wish}{without}.{_survey(skipped, able, modules)}"
        )
    return Selection(chosen, skipped)


def reasons_against(model: nn.Module, named: Collection[nn.Module] = ()) -> dict[nn.Module, str | None]:
    """Why each module of a model, those inside dendrites left out, cannot have dendrites; ``None``: it can.

    Args:
        model: the model.
        named: modules that are asked for by themselves: they can, even if they are no layers of PyTorch's.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> against = reasons_against(model)
        >>> against[model[0]], against[model[1]]
        (None, 'it has no weight matrix')
    """
    modules = _modules(model)
    return {module: _why_not(name, module, modules, module in named) for name, module in modules.items()}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(isinstance(found.get(parent), Dendrites) for parent in _parents(plain_name(name)))
        if not inside:
            found[plain_name(name)] = module
    return {name: module for name, module in found.items() if not isinstance(module, Dendrites)}


def _parents(name: str) -> Iterable[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _why_not(name: str, module: nn.Module, modules: Mapping[str, nn.Module], named: bool) -> str | None:
    reason: str | None
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and is_layer(module):
        reason = "nn.MultiheadAttention uses its weights and never calls it"
    elif any(is_lazy(parameter) for parameter in module.parameters()):
        reason = "its size is not known before its first forward pass"
    elif not isinstance(getattr(module, "dendrites", None), Dendrites | None):
        reason = "it already has an attribute named 'dendrites'"
    elif not named and is_layer(module) and (wrapper := _wrapper(name, modules)) is not None:
        reason = (
            f"it is a part of '{wrapper}', a {type(modules[wrapper]).__name__} that wraps a layer: what saves or merges"
            f" that knows no dendrites; name it in `targets` to let it grow"
        )
    else:
        kind = kind_class(module)
        reason = kind.why_not(module)
        if reason is None and not is_layer(module):
            if not named:
                reason = "it grows only where `targets` names it: its dendrites are then copies of it"
            elif not name:
                reason = "it is the whole model"
        # What has dendrites has shown that it can have nodes; a load asks again and again.
        if reason is None and module._modules.get("dendrites") is None:
            reason = kind.why_no_node(module)
    return reason


def why_not_around(module: nn.Module) -> str | None:
    """Why shared dendrites cannot hang around a module; ``None``: nothing that can be seen before it runs.

    Example:
        >>> why_not_around(nn.ModuleList())
        'it holds modules and is never called itself'
        >>> why_not_around(nn.Sequential(nn.Linear(2, 2))) is None
        True
    """
    reason = None
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        reason = "it holds modules and is never called itself"
    elif isinstance(module, torch.jit.ScriptModule):
        reason = "it is compiled by TorchScript"
    elif not isinstance(getattr(module, "dendrites", None), Dendrites | None):
        reason = "it already has an attribute named 'dendrites'"
    elif not any(parameter.is_floating_point() and not is_lazy(parameter) for parameter in module.parameters()):
        reason = "it has no parameters, which tell where dendrites are to be and of which type"
    return reason


def _wrapper(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    # An adapter, such as LoRA of peft, is a module around a layer, `base_layer`, with small layers of its own.
    return next((parent for parent in _parents(name) if parent in modules and _wraps(modules[parent])), None)


def _wraps(module: nn.Module) -> bool:
    children = module._modules
    return isinstance(children.get("base_layer"), nn.Module) or any(
        name.lower().startswith("lora_") for name in children
    )


def _has_matrix(name: str, module: nn.Module) -> bool:
    own = [] if "parametrizations" in name.split(".") else module.parameters(recurse=False)
    return any(is_lazy(parameter) or parameter.ndim > 1 for parameter in own)


def is_frozen(layer: nn.Module) -> bool:
    """Whether nothing of a layer is trainable, whatever is of its dendrites.

    Example:
        >>> is_frozen(nn.Linear(2, 2).requires_grad_(False)), is_frozen(nn.Linear(2, 2))
        (True, False)
    """
    own = [p for name, p in layer.named_parameters() if not name.startswith("dendrites.")]
    return not any(parameter.requires_grad for parameter in own)


def _asked_for(patterns: Iterable[str], modules: Mapping[str, nn.Module]) -> set[nn.Module]:
    names = {pattern for pattern in patterns if pattern in modules}
    by_type = set().union(*(_of_type(pattern, modules) for pattern in patterns if pattern not in names))
    # A type name means no part of an adapter: those are PyTorch's plain layers, and many.
    return {modules[name] for name in names | {name for name in by_type if _wrapper(name, modules) is None}}


def _matches(patterns: Sequence[str] | Predicate, modules: Mapping[str, nn.Module]) -> set[str]:
    if callable(patterns):
        return {name for name, module in modules.items() if patterns(name, module)}
    found: set[str] = set()
    for pattern in patterns:
        # The name of a module means that module, even where it reads as a pattern or a type too.
        found |= {pattern} & modules.keys() or {
            *(name for name in modules if fnmatchcase(name, pattern)),
            *_of_type(pattern, modules),
        }
    return found


def _of_type(pattern: str, modules: Mapping[str, nn.Module]) -> set[str]:
    found = {n for n, module in modules.items() if any(k.__name__ == pattern for k in type(module).__mro__[:-2])}
    # A model is often called like the layer in it: `GRU` then means the layer.
    return {name for name in found if is_layer(modules[name])} or found


def _wish(patterns: Sequence[str] | Predicate) -> str:
    return "the predicate" if callable(patterns) else f"{list(patterns)}"


def _refuse_unmatched(
    argument: str,
    patterns: Sequence[str] | Predicate,
    modules: Mapping[str, nn.Module],
    able: Mapping[str, nn.Module],
    reasons: Mapping[str, str | None],
) -> None:
    for pattern in () if callable(patterns) else patterns:
        if not _matches([pattern], able):
            near = {name: reasons[name] or "" for name in _matches([pattern], modules)}
            inside = _matches([f"{pattern}.*"], able)
            hint = f" To mean the layers inside it, write '{pattern}.*'." if near and inside else ""
            raise ValueError(
                f"`{argument}`: no layer can have dendrites for {[pattern]}.{hint}{_survey(near, able, modules)}"
            )


def _survey(near: Mapping[str, str], able: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> str:
    misses = "".join(f"\n  '{name}' ({type(modules[name]).__name__}): {reason}" for name, reason in near.items())
    there = ", ".join(f"'{name}' ({type(module).__name__})" for name, module in able.items())
    return f"{misses}\nLayers that can: {there or 'none'}"
