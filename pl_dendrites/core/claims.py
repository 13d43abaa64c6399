"""What tensors of a file claim to be, and what the file holds of them: sizes are believed that far, and no further.

A tensor may repeat one number along a dimension, and two may share theirs; a file keeps both so. Whoever makes memory,
a list or a loop as long as such a tensor has asked here before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pl_dendrites.core.tensors import local

__all__ = ["Claims", "check_claims", "shape_of"]


class Claims:
    """What tensors that come one after another claim, and what they hold.

    Example:
        >>> Claims().take([torch.ones(1).expand(1000)], "it")
        Traceback (most recent call last):
        ValueError: it would take 4000 bytes, and the state_dict holds 4 for it
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._spare = 0

    def take(self, values: Iterable[Any], what: str, source: str = "the state_dict") -> None:
        """Believe what some tensors claim.

        Args:
            values: tensors; anything else among them, and tensors without values, claims nothing.
            what: what messages call them.
            source: what messages call the file.

        Raises:
            ValueError: if they claim more than they hold, together with what is left of those before.
        """
        needed = 0
        for tensor in (local(value) for value in values if not isinstance(shape_of(value), str)):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self._seen:  # without bytes it may lie where another does
                self._spare += storage.nbytes()
                self._seen.add(storage.data_ptr())
            needed += math.prod(tensor.shape) * tensor.element_size()  # which may be beyond what PyTorch can count
        if needed > self._spare:
            pronoun = "it" if what == "it" else "them"
            raise ValueError(f"{what} would take {needed} bytes, and {source} holds {self._spare} for {pronoun}")
        self._spare -= needed


def check_claims(value: Any, what: str, source: str, *, tied: bool = False) -> None:
    """Believe what all tensors in nested dicts and lists claim.

    Args:
        value: a tensor, a container, or anything else.
        what: what messages call it.
        source: what messages call the file.
        tied: whether the same numbers at several places, as those of a tied weight, claim their memory once.

    Raises:
        ValueError: if they claim more than they hold.
    """
    tensors: dict[Any, Tensor] = {}
    seen: set[int] = set()
    waiting: list[Any] = [value]
    while waiting:
        entry = waiting.pop()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, Tensor):
            tensors[_numbers_of(entry) if tied else len(tensors)] = entry
        elif isinstance(entry, Mapping):
            waiting.extend(entry.values())
        elif isinstance(entry, list | tuple):
            waiting.extend(entry)
    Claims().take(tensors.values(), what, source)


def _numbers_of(tensor: Tensor) -> Any:
    if isinstance(shape_of(tensor), str):
        return id(tensor)
    own = local(tensor)
    return own.data_ptr(), own.shape, own.stride(), own.dtype


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Of a plain tensor its shape; of anything else, which may not even have one, what it is.

    Example:
        >>> shape_of(torch.ones(2, 3)), shape_of(None), shape_of(torch.ones(1, device="meta"))
        ((2, 3), 'NoneType', 'a tensor without values')
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    if is_lazy(value) or value.is_nested or value.is_meta or value.layout != torch.strided:
        return "a tensor without values" if is_lazy(value) or value.is_meta else "a nested or sparse tensor"
    return tuple(value.shape)
