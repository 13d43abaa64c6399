"""Modules that mirror another without being trained: averages of weights, target networks, teachers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import inf, isfinite
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core.checks import check
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.growth.dendrites import AnyForm, Dendrites
from pl_dendrites.core.keys import plain_name

__all__ = ["check_mirrors", "find_mirrors", "mirrored_layers", "named_mirrors", "own_parameters", "parts_of_mirrors"]


def find_mirrors(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """The modules that mirror one with target layers, as far as they can be told.

    Such a module is of the same type, has parameters of the same names and shapes, none of which is trained, and begins
    as a copy: its values are those of the other. A frozen module that only looks alike has values of its own. Averages
    of PyTorch's (``AveragedModel``) count as not trained, whatever their flags say; of these, and of modules with
    dendrites, which have mirrored before, values may differ.

    Args:
        model: the model.
        targets: names of its target layers.

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
        still = name in averaged or not any(p.requires_grad for p in own_parameters(module).values())
        if not still or name in holds_target - averaged or any(_is_in(name, other) for other in found):
            continue
        alike = [other for other in sources.get(_looks(module), []) if not _overlap(name, other)]
        apart = {other: _apart(module, modules[other]) for other in alike if _can_have(module, modules[other])}
        nearest = min(apart, key=lambda other: apart[other], default="")
        # What hangs on a still layer hangs there because it has mirrored before: others get no dendrites.
        copied = name in averaged or any(isinstance(part, Dendrites) for part in module.modules())
        if apart.get(nearest) == 0 or (copied and isfinite(apart.get(nearest, inf))):
            found[name] = nearest
    return found


def named_mirrors(model: nn.Module, mirrors: Mapping[str, str]) -> dict[str, str]:
    """The mirrors that a user names, if they can be that.

    Values may differ, and so may flags of ``requires_grad``.

    Args:
        model: the model.
        mirrors: name of each mirror, and of what it mirrors.

    Raises:
        ValueError: if the model has no such module, or one that does not fit what it is to mirror.

    Example:
        >>> model = nn.ModuleDict({"net": nn.Linear(2, 3), "slow": nn.Linear(2, 3), "top": nn.Linear(9, 3)})
        >>> named_mirrors(model, {"slow": "net"})
        {'slow': 'net'}
        >>> named_mirrors(model, {"top": "net"})
        Traceback (most recent call last):
        ValueError: `mirrors`: 'top' cannot mirror 'net': 'weight' is (3, 9) in it and (3, 2) there. These fit: ['slow']
    """
    check_mirrors(mirrors)
    modules = _modules(model)
    for name, source in mirrors.items():
        missing = next((given for given in (source, name) if given not in modules), None)
        if missing is not None:
            there = [other for other, module in modules.items() if other and own_parameters(module)]
            raise ValueError(f"`mirrors`: the model has no module {missing!r} of its own. It has {there}")
        difference = _difference(modules[name], modules[source])
        if difference:
            able = [other for other in modules if not _overlap(other, source)]
            able = [other for other in able if not _difference(modules[other], modules[source])]
            raise ValueError(f"`mirrors`: {name!r} cannot mirror {source!r}: {difference}. These fit: {able}")
    return dict(mirrors)


def check_mirrors(mirrors: object) -> None:
    """Raise ``ValueError`` unless a value can name mirrors of some model.

    Args:
        mirrors: name of each mirror, and of what it mirrors.

    Example:
        >>> check_mirrors({"net": "net"})
        Traceback (most recent call last):
        ValueError: `mirrors`: 'net' cannot mirror 'net': one is the other, or inside it
        >>> check_mirrors({"old": "new", "older": "old"})
        Traceback (most recent call last):
        ValueError: `mirrors`: 'old' is a mirror, and so no part of another or of what is mirrored: 'old'
    """
    allowed = "names of modules, each with the name of the module that it mirrors"
    check("mirrors", isinstance(mirrors, Mapping), allowed, mirrors)
    assert isinstance(mirrors, Mapping)
    check("mirrors", all(isinstance(n, str) and n for pair in mirrors.items() for n in pair), allowed, mirrors)
    for name, source in mirrors.items():
        if _overlap(name, source):
            raise ValueError(f"`mirrors`: {name!r} cannot mirror {source!r}: one is the other, or inside it")
    for name in mirrors:
        others = [*(other for other in mirrors if other != name), *mirrors.values()]
        other = next((other for other in others if _overlap(name, other)), None)
        if other is not None:
            raise ValueError(
                f"`mirrors`: {name!r} is a mirror, and so no part of another or of what is mirrored: {other!r}"
            )


def mirrored_layers(mirrors: Mapping[str, str], target: str) -> list[str]:
    """The layers that mirror a target layer, by name.

    Args:
        mirrors: name of each mirror, and of what it mirrors.
        target: the layer's name.

    Example:
        >>> mirrored_layers({"teacher": "student", "slow.net": "student"}, "student.0")
        ['teacher.0', 'slow.net.0']
    """
    return [name + target[len(source) :] for name, source in mirrors.items() if _is_in(target, source)]


def parts_of_mirrors(mirrors: Mapping[str, str], layers: Iterable[str]) -> dict[str, str]:
    """Which layers are parts of mirrors, and so no targets, with the reason.

    Args:
        mirrors: name of each mirror, and of what it mirrors.
        layers: names of layers.

    Example:
        >>> parts_of_mirrors({"teacher": "student"}, ["student.0", "teacher.0"])
        {'teacher.0': "it is a part of 'teacher', which mirrors 'student'"}
    """
    return {
        layer: f"it is a part of {name!r}, which mirrors {source!r}"
        for name, source in mirrors.items()
        for layer in layers
        if _is_in(layer, name)
    }


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a module by name, those of dendrites in it left out."""
    return {plain_name(name): p for name, p in module.named_parameters() if "dendrites" not in name.split(".")}


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


def _overlap(one: str, other: str) -> bool:
    return not one or not other or _is_in(one, other) or _is_in(other, one)


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _shape(parameter: Tensor) -> tuple[int, ...] | None:
    return None if is_lazy(parameter) else tuple(parameter.shape)


def _looks(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((name, _shape(p), p.dtype) for name, p in own_parameters(module).items())


def _apart(module: nn.Module, source: nn.Module) -> float:
    own, other = own_parameters(module), own_parameters(source)
    if not own or any(is_lazy(parameter) or hasattr(parameter, "to_local") for parameter in own.values()):
        return inf  # without values yet, or shared out over processes, each of which has a part
    return sum(float((p.detach() - other[name].detach().to(p.device)).abs().sum()) for name, p in own.items())


def _can_have(module: nn.Module, source: nn.Module) -> bool:
    # What a mirror has of dendrites are the first of those that are there.
    parts, others = _modules(module), _modules(source)
    for name, part in parts.items():
        sets = _sets(part)
        if sets != _sets(others.get(name, part))[: len(sets)]:
            return False
    return True


def _sets(layer: nn.Module) -> list[AnyForm]:
    dendrites = layer._modules.get("dendrites")
    sets: list[AnyForm] = []
    for form in dendrites.forms if isinstance(dendrites, Dendrites) else []:
        sets += [replace(form, count=1)] * form.count if isinstance(form, Form) else [form]
    return sets


def _difference(module: nn.Module, source: nn.Module) -> str:
    """Why one cannot mirror the other; empty where it can."""
    own, other = own_parameters(module), own_parameters(source)
    if not own:
        return "it has no parameters"
    for name in [*own, *other]:
        if name not in own or name not in other:
            return f"{name!r} is a parameter of one of them alone"
        shapes = _shape(own[name]), _shape(other[name])
        if None in shapes:
            return f"the size of {name!r} is not known before the first forward pass"
        if shapes[0] != shapes[1]:
            return f"{name!r} is {shapes[0]} in it and {shapes[1]} there"
    parts, others = _modules(module), _modules(source)
    for name in dict.fromkeys(owner.rpartition(".")[0] for owner in own):
        kinds = type(parts.get(name)).__name__, type(others.get(name)).__name__
        if kinds[0] != kinds[1]:
            return f"{name!r} is a {kinds[0]} in it and a {kinds[1]} there"
    return "" if _can_have(module, source) else "it has other dendrites"
