"""Refusing a value with what is allowed and what was given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["check", "check_at_least", "check_one_of"]


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
