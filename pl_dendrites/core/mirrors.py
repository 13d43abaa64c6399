"""Modules that mirror another without being trained: averages of weights, target networks, teachers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.keys import plain_name

__all__ = ["find_mirrors", "mirrored_layers"]


def find_mirrors(model: nn.Module, targets: Iterable[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The modules that mirror one with target layers.

    Such a module is of the same type, has parameters of the same names and shapes, none of which is trained, and begins
    as a copy: its values are those of the other. A frozen module that only looks alike has values of its own. Averages
    of PyTorch's (``AveragedModel``) count as not trained, whatever their flags say.

    Args:
        model: the model.
        targets: names of its target layers.
        known: mirrors that were found before, when values were the same, by name and with what they mirror.

    Returns:
        The name of each, and of what it mirrors; of modules inside one another the outer ones.

    Example:
        >>> import copy
        >>> student = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)})
        >>> find_mirrors(model, ["student.0", "student.2"])
        {'teacher': 'student'}
    """
    modules, targets = _modules(model), list(targets)
    averages = [name for name, module in modules.items() if type(module).__name__ == "AveragedModel"]
    averaged = {name for name in modules if any(_is_in(name, average) for average in averages)}
    holds_target = {name for target in targets for name in _with_parents(target)}
    sources: dict[Any, list[str]] = {}
    for name in modules:
        if name in holds_target - averaged:
            sources.setdefault(_looks(modules[name]), []).append(name)
    found: dict[str, str] = {}
    for name, module in modules.items():
        still = name in averaged or not any(p.requires_grad for p in _own(module).values())
        if not still or name in holds_target - averaged or any(_is_in(name, other) for other in found):
            continue
        alike = [other for other in sources.get(_looks(module), []) if not (_is_in(name, other) or _is_in(other, name))]
        told = (known or {}).get(name)
        copied = (other for other in alike if _is_copy(module, modules[other]))
        source = told if told in alike else next(copied, None)
        if source is not None:
            found[name] = source
    return found


def mirrored_layers(mirrors: Mapping[str, str], target: str) -> list[str]:
    """The layers that mirror a target layer, by name.

    Args:
        mirrors: from :func:`find_mirrors`.
        target: the layer's name.

    Example:
        >>> mirrored_layers({"teacher": "student", "slow.net": "student"}, "student.0")
        ['teacher.0', 'slow.net.0']
    """
    return [name + target[len(source) :] for name, source in mirrors.items() if _is_in(target, source)]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    inside: list[str] = []
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Dendrites):
            inside.append(f"{name}.")
        if not isinstance(module, Dendrites) and not name.startswith(tuple(inside)):
            found[plain_name(name)] = module
    return found


def _is_in(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if "dendrites" not in name.split(".")}


def _looks(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((name, p.shape, p.dtype) for name, p in _own(module).items())


def _is_copy(module: nn.Module, source: nn.Module) -> bool:
    own, other = _own(module), _own(source)
    if any(hasattr(parameter, "to_local") for parameter in own.values()):
        return False  # shared out over processes, each of which has a part
    # One with dendrites has mirrored before: a frozen layer that is no target gets none otherwise.
    attached = any(isinstance(part._modules.get("dendrites"), Dendrites) for part in module.modules())
    return bool(own) and (attached or all(torch.equal(p, other[name].to(p.device)) for name, p in own.items()))
