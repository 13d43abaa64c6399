"""The callback's arguments: checks whose errors say what is allowed and what was given; and who gets which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from pl_dendrites.core.functional import ACTIVATIONS

__all__ = [
    "check",
    "check_arguments",
    "check_at_least",
    "check_one_of",
    "check_patterns",
    "machine_settings",
    "shown_settings",
]

_BOUNDS: dict[str, float] = {
    "max_dendrites": 0,
    "candidates": 1,
    "candidate_batches": 1,
    "patience": 1,
    "min_delta": 0.0,
    "base_epochs": 1,
    "correlation_patience": 1,
    "correlation_min_delta": 0.0,
    "max_correlation_epochs": 1,
    "max_tries": 0,
}

# Arguments that are the phase machine's.
_DECIDE = (
    "mode",
    "max_dendrites",
    "patience",
    "min_delta",
    "min_delta_mode",
    "base_epochs",
    "correlation_patience",
    "max_correlation_epochs",
    "max_tries",
    "stop_on_overfit",
)
# Runs are compared by these and by those that are not at their default, but not by those of a run's surroundings.
_SHOWN, _NOT_SHOWN = ("candidates", "max_dendrites"), ("dirpath", "optimizer", "verbose")


def check(name: str, holds: bool, allowed: str, value: object) -> None:
    """Raise ``ValueError`` unless a condition on a value holds.

    Example:
        >>> check("monitor", False, "the name of a metric", None)
        Traceback (most recent call last):
        ValueError: `monitor` must be the name of a metric, got None
    """
    if not holds:
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}")


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` unless a value is one of those allowed.

    Example:
        >>> check_one_of("mode", "maximum", ["min", "max"])
        Traceback (most recent call last):
        ValueError: `mode` must be one of ['min', 'max'], got 'maximum'
    """
    check(name, value in list(allowed), f"one of {list(allowed)}", value)


def check_at_least(name: str, value: Any, bound: float) -> None:
    """Raise ``ValueError`` unless a value is a finite number of at least ``bound``; an integer if ``bound`` is one.

    Example:
        >>> check_at_least("patience", 0, 1)
        Traceback (most recent call last):
        ValueError: `patience` must be an integer of at least 1, got 0
    """
    whole = isinstance(bound, int)
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    holds = right_type and math.isfinite(value) and value >= bound
    check(name, holds, f"{'an integer' if whole else 'a number'} of at least {bound}", value)


def check_patterns(name: str, value: object) -> None:
    """Raise ``ValueError`` unless a value is a list of texts, or a predicate.

    Example:
        >>> check_patterns("exclude", "head.*")
        Traceback (most recent call last):
        ValueError: `exclude` must be a list of names or patterns, got 'head.*'
    """
    texts = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) and v for v in value)
    check(name, texts or callable(value), "a list of names or patterns", value)


def check_fan_in(value: object) -> None:
    """Raise ``ValueError`` unless a value is a number of inputs, a share of them, or ``None``.

    Example:
        >>> check_fan_in(1.5)
        Traceback (most recent call last):
        ValueError: `fan_in` must be an integer of at least 1 or a share up to 1.0, got 1.5
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    holds = value is None or (number and (0 < value <= 1 if isinstance(value, float) else value >= 1))  # type: ignore[operator]
    check("fan_in", holds, "an integer of at least 1 or a share up to 1.0", value)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless a :class:`~pl_dendrites.DendriteCallback` can be made of these arguments.

    Args:
        given: all of them by name.
    """
    monitor, optimizer, dirpath = given["monitor"], given["optimizer"], given["dirpath"]
    check("monitor", isinstance(monitor, str) and bool(monitor), "the name of a metric", monitor)
    check_one_of("mode", given["mode"], ("min", "max"))
    check_one_of("learning", given["learning"], ("correlation", "gradient", "hybrid"))
    check_one_of("min_delta_mode", given["min_delta_mode"], ("abs", "rel"))
    activation = given["activation"]
    check_one_of("activation", "tanh" if activation is None else activation, ACTIVATIONS)
    for name in ("targets", "exclude"):
        check_patterns(name, () if name == "targets" and given[name] is None else given[name])
    for name, bound in _BOUNDS.items():
        check_at_least(name, bound if name == "base_epochs" and given[name] is None else given[name], bound)
    check_fan_in(given["fan_in"])
    share = given["share"]
    number = isinstance(share, int | float) and not isinstance(share, bool)
    check("share", number and 0 < share <= 1, "a number above 0 and up to 1", share)
    by_gradient = given["learning"] == "gradient"
    check("share", share == 1 or not by_gradient, "1 with learning='gradient', which knows no worth", share)
    check("optimizer", optimizer is None or callable(optimizer), "a callable", optimizer)
    check("dirpath", dirpath is None or (isinstance(dirpath, str | Path) and dirpath != ""), "a path", dirpath)
    for name in ("skip_validation", "stop_on_overfit", "restart", "verbose"):
        check(name, isinstance(given[name], bool), "true or false", given[name])


def machine_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the :class:`~pl_dendrites.core.phases.PhaseMachine`, of all those of the callback."""
    others = {
        "score_name": given["monitor"],
        "correlation": given["learning"] != "gradient",
        "sparse": given["fan_in"] is not None,
    }
    return {name: given[name] for name in _DECIDE} | others


def shown_settings(given: Mapping[str, Any], of: Callable[..., Any]) -> dict[str, Any]:
    """The arguments by which runs are told apart.

    Args:
        given: all arguments by name.
        of: what they were given to; knows the defaults.
    """
    defaults = {name: parameter.default for name, parameter in signature(of).parameters.items()}
    changed = {name for name, value in given.items() if value != defaults[name]} - set(_NOT_SHOWN)
    return {name: given[name] for name in sorted(changed.union(_SHOWN))}
