"""Which layers can have dendrites, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core.dendrites import Dendrites
from pl_dendrites.core.layers import is_supported

__all__ = ["Selection", "plain_name", "reasons_against", "select_targets"]


class Selection(NamedTuple):
    """What :func:`select_targets` found.

    Attributes:
        chosen: the target layers by name.
        skipped: name and reason for every layer that was asked for, or could be thought to be, and is left alone.
    """

    chosen: dict[str, nn.Module]
    skipped: dict[str, str]


def plain_name(name: str) -> str:
    """A module's name as its author knows it, without the ``_orig_mod`` that ``torch.compile`` puts in.

    Example:
        >>> plain_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def select_targets(model: nn.Module, targets: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Selection:
    """The layers of a model that receive dendrites.

    Args:
        model: any module.
        targets: names, glob patterns of names (``"encoder.*"``) or type names (``"Conv2d"``); ``None``: every layer
            that can have dendrites.
        exclude: the same, taken out of ``targets``.

    Returns:
        The chosen layers and those left alone with the reason.

    Raises:
        ValueError: if a pattern matches nothing, or no layer is left; lists the layers there are and, for each near
            miss, why not.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> list(select_targets(model).chosen), list(select_targets(model, exclude=["2"]).chosen)
        (['0', '2'], ['0'])
        >>> select_targets(model, targets=["LayerNorm"])
        Traceback (most recent call last):
        ValueError: `targets`: no layer can have dendrites for ['LayerNorm'].
          '1' (LayerNorm): dendrites for this type are not supported
        Layers that can: '0' (Linear), '2' (Linear)
    """
    for argument, patterns in (("targets", targets), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"`{argument}` must be a list of names or patterns, got {patterns!r}")
    modules, against = _modules(model), reasons_against(model)
    reasons = {name: against[module] for name, module in modules.items()}
    able = {name: modules[name] for name, reason in reasons.items() if reason is None}
    excluded = _matches(exclude, able)
    _refuse_unmatched("exclude", exclude, modules, able, reasons)
    if targets is None:
        asked = {name for name, module in modules.items() if is_supported(module)}
    else:
        _refuse_unmatched("targets", targets, modules, able, reasons)
        asked = _matches(targets, modules)
    chosen = {name: able[name] for name in able if name in asked and name not in excluded}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None and name in asked}
    if not chosen:
        wish = "every supported layer" if targets is None else f"{list(targets)}"
        without = f" without {list(exclude)}" if exclude else ""
        raise ValueError(
            f"`targets`: no layer can have dendrites for {wish}{without}.{_survey(skipped, able, modules)}"
        )
    return Selection(chosen, skipped)


def reasons_against(model: nn.Module) -> dict[nn.Module, str | None]:
    """Why each module of a model, those inside dendrites left out, cannot have dendrites; ``None``: it can.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> against = reasons_against(model)
        >>> against[model[0]], against[model[1]]
        (None, 'dendrites for this type are not supported')
    """
    modules = _modules(model)
    return {module: _why_not(name, module, modules) for name, module in modules.items()}


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


def _why_not(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    if not is_supported(module):
        return "dendrites for this type are not supported"
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weights and never calls it"
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        return "its size is not known before its first forward pass"
    if not module.weight.is_floating_point():  # type: ignore[operator]
        return f"its weight is of type {module.weight.dtype}, not floating point"
    if not isinstance(getattr(module, "dendrites", None), Dendrites | None):
        return "it already has an attribute named 'dendrites'"
    return None


def _matches(patterns: Iterable[str], modules: Mapping[str, nn.Module]) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        # The name of a module means that module, even where it reads as a pattern or a type too.
        found |= {pattern} & modules.keys() or {
            name for name, module in modules.items() if _match(pattern, name, module)
        }
    return found


def _match(pattern: str, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, pattern) or any(kind.__name__ == pattern for kind in type(module).__mro__[:-2])


def _refuse_unmatched(
    argument: str,
    patterns: Iterable[str],
    modules: Mapping[str, nn.Module],
    able: Mapping[str, nn.Module],
    reasons: Mapping[str, str | None],
) -> None:
    for pattern in patterns:
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
