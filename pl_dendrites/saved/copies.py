"""Copies of a network's weights: on the CPU, once for each tensor, and none of what is there anyway."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core.growth.sharded import gather_weights, is_sharded
from pl_dendrites.core.tensors import local
from pl_dendrites.saved.frozen import frozen_names, in_file
from pl_dendrites.saved.partial import whole_state

__all__ = [
    "Others",
    "address",
    "has_weights",
    "model_weights",
    "on_cpu",
    "same_memory",
    "share_weights",
    "still_copies",
]

# Integers of the size of a number, whose equality is that of bits.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Others(Protocol):
    """Copies of other networks, which stay and may have memory in common with one that is given up."""

    @property
    def paths(self) -> Collection[str]:
        """Files that they are in."""
        ...

    def holds(self, begin: int) -> bool:
        """Whether they have memory that begins there."""
        ...

    def part(self, begin: int) -> None:
        """They would be the only ones that have it. They may let go of it, if it is too much for them."""
        ...


def model_weights(
    module: pl.LightningModule,
    former: dict[str, Any] | None = None,
    lent: Collection[int] = (),
    others: Others | None = None,
) -> dict[str, Any]:
    """A copy on the CPU of all that a model has, what it leaves out of its checkpoints too.

    What has several names, a tied weight, is copied once and has them all in the copy too. What is frozen is copied
    when it is new or has changed, the first time to a file. Of a sharded model see
    :func:`~pl_dendrites.core.growth.sharded.gather_weights`.

    Args:
        module: the model, on any device.
        former: a copy that is given up: this one is made in its memory where tensors are of the same size. Its entries
            are taken out one by one, so that there are never two whole copies.
        lent: :func:`address` of the memory that somebody else looks at, which is left as it is.
        others: copies that stay. What has the same bits as in the one that is given up is theirs in this one, too.

    Example:
        >>> module = pl.LightningModule()
        >>> module.one = module.other = nn.Linear(2, 2)
        >>> copy = model_weights(module)
        >>> copy["one.weight"] is copy["other.weight"]
        True
        >>> again = model_weights(module, dict(copy))
        >>> again["one.weight"] is copy["one.weight"]
        True
    """
    former = {} if former is None else former
    if is_sharded(module):
        return gather_weights(module, _Copies(former, lent, others).take)
    state = whole_state(module)
    still = _still(module, state)
    new = in_file({key: value for key, value in still.items() if not _is_like(former.get(key), value)})
    copies = _Copies(former, lent, others, still, new)
    return {key: copies.take(key, value, value) if isinstance(value, Tensor) else value for key, value in state.items()}


def still_copies(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy on the CPU of a part of a model's state_dict; what is frozen is in a file.

    Args:
        module: the model.
        state: the part.
    """
    filed = in_file(_still(module, state))
    return {**on_cpu({key: value for key, value in state.items() if key not in filed}), **filed}


def _still(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    # A view is left aside: a file would have all that it looks at.
    names = frozen_names(module)
    return {
        key: value
        for key, value in state.items()
        if key in names and _is_plain(value) and value.untyped_storage().nbytes() == value.nbytes
    }


def on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state_dict on the CPU."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value for key, value in state.items()
    }


class _Copies:
    def __init__(
        self,
        former: dict[str, Any],
        lent: Collection[int],
        others: Others | None,
        still: Collection[str] = (),
        new: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._former, self._in_use, self._others = former, set(lent), others
        self._still, self._new = still, {} if new is None else new
        self._made: dict[Any, Tensor] = {}

    def take(self, key: str, value: Tensor, here: Tensor) -> Tensor:
        # `here` is what this process has of it, which stays where it is until all copies are made.
        place, former = _place(here), self._former.pop(key, None)
        if place is not None and place in self._made:
            return self._made[place]
        copy = self._again(key, former, value) if _is_like(former, value) else self._new.get(key)
        if copy is None:
            copy = value.detach().to("cpu", copy=True)
        self._in_use.add(address(copy))
        if place is not None:
            self._made[place] = copy
        return copy

    def _again(self, key: str, former: Tensor, value: Tensor) -> Tensor | None:
        if key in self._still and _has_same_bits(value, former):  # a file that is not written to takes no memory
            return former
        begin, others = address(former), self._others
        if others is not None and others.holds(begin):
            if _has_same_bits(value, former):
                return former
            others.part(begin)
            if others.holds(begin):
                return None
        return None if begin in self._in_use else former.copy_(value.detach())


def _is_like(former: Any, value: Tensor) -> bool:
    return (
        isinstance(former, Tensor)
        and _is_plain(former)
        and _is_plain(value)
        and (former.shape, former.dtype, former.stride()) == (value.shape, value.dtype, value.stride())
    )


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 of one that has none of its own."""
    try:
        return local(tensor).untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a sparse one
        return 0


def _place(tensor: Tensor) -> Any:
    # Of what has the same place there is no second copy.
    begin = address(tensor)
    if not begin or not tensor.numel() or not _is_plain(tensor):
        return None
    return tensor.device, begin, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _is_plain(tensor: Tensor) -> bool:
    # Numbers in memory, to be read as they are.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_nested or tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg())


def share_weights(checkpoint: Mapping[str, Any], weights: dict[str, Any], *others: dict[str, Any]) -> None:
    """Put in the place of copies the model's own tensors in a checkpoint where these have the same bits.

    PyTorch writes a tensor that has several places in a file once.

    Args:
        checkpoint: what a Trainer is about to save.
        weights: as :func:`model_weights` returns them; changed in place.
        *others: of other networks, which have some of these very tensors; changed in place.
    """
    for key, present in checkpoint["state_dict"].items():
        kept = weights.get(key)
        if isinstance(present, Tensor) and isinstance(kept, Tensor) and _has_same_bits(present, kept):
            weights[key] = present.detach()
            for other in others:
                if other.get(key) is kept:
                    other[key] = weights[key]


def same_memory(value: Any, other: Any) -> bool:
    """Whether two tensors are the same numbers in the same memory.

    Example:
        >>> tensor = torch.zeros(2)
        >>> same_memory(tensor, tensor.detach()), same_memory(tensor, torch.zeros(2))
        (True, False)
    """
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return False
    place = _place(value) if not is_lazy(value) else None
    return place is not None and not is_lazy(other) and place == _place(other)


def _has_same_bits(value: Tensor, other: Tensor) -> bool:
    if not (_is_plain(value) and _is_plain(other)) or (value.shape, value.dtype) != (other.shape, other.dtype):
        return False
    same_place = value.data_ptr() == other.data_ptr() and value.stride() == other.stride()
    return same_place or torch.equal(_bits(value), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(_BITS.get(flat.element_size(), torch.int64))


def has_weights(module: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Whether a model has these weights, to the last bit; what else a state_dict holds is not compared.

    Args:
        module: the model, on any device.
        weights: as :func:`model_weights` returns them.
    """
    present = whole_state(module)
    return present.keys() == weights.keys() and all(
        _same(value, weights[key]) for key, value in present.items() if isinstance(value, Tensor)
    )


def _same(value: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or (value.shape, value.dtype) != (other.shape, other.dtype):
        return False
    value, other = value.detach().cpu(), other.cpu()
    return torch.equal(value, other) or bool(((value == other) | (value.isnan() & other.isnan())).all())
