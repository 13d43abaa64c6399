"""Checks of arguments: each error names the argument, what is allowed and what was given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["check_at_least", "check_one_of", "check_patterns"]


def check_one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` unless a value is one of those allowed.

    Example:
        >>> check_one_of("mode", "maximum", ["min", "max"])
        Traceback (most recent call last):
        ValueError: `mode` must be one of ['min', 'max'], got 'maximum'
    """
    if value not in list(allowed):
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}")


def check_at_least(name: str, value: Any, bound: float) -> None:
    """Raise ``ValueError`` unless a value is a finite number of at least ``bound``; an integer if ``bound`` is one.

    Example:
        >>> check_at_least("patience", 0, 1)
        Traceback (most recent call last):
        ValueError: `patience` must be an integer of at least 1, got 0
    """
    whole = isinstance(bound, int)
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right_type or not math.isfinite(value) or value < bound:
        raise ValueError(f"`{name}` must be {'an integer' if whole else 'a number'} of at least {bound}, got {value!r}")


def check_patterns(name: str, value: object) -> None:
    """Raise ``ValueError`` unless a value is a list of texts.

    Example:
        >>> check_patterns("exclude", "head.*")
        Traceback (most recent call last):
        ValueError: `exclude` must be a list of names or patterns, got 'head.*'
    """
    texts = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) and v for v in value)
    if not texts:
        raise ValueError(f"`{name}` must be a list of names or patterns, got {value!r}")
