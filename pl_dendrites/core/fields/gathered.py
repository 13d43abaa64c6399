"""Samples that several processes took: handed to all of them, one sample of all, and dealt out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_dendrites.core.fields.sample import check_samples

__all__ = ["Alone", "Processes", "as_one", "deal", "gather_samples", "of_first"]

_Samples = Mapping[str, Tensor]  # see Reservoir.samples
_DOUBLE = (torch.float32, torch.float64)  # a reservoir has no others


class Processes(Protocol):
    """Processes that learn together, each from its part of every batch.

    Attributes:
        count: how many there are.
        rank: which of them this one is, from 0 on.
    """

    count: int
    rank: int

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes into a tensor, in place: the same bits in each of them."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, which are of one shape, stacked: the same bits in each of them."""


class Alone:
    """The only process.

    Example:
        >>> Alone().gather(torch.zeros(3)).shape
        torch.Size([1, 3])
    """

    count, rank = 1, 0

    def add_up(self, tensor: Tensor) -> None:
        """Nothing is added."""

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor alone, stacked."""
        return tensor[None]


def of_first(tensor: Tensor, processes: Processes) -> Tensor:
    """What the first process has, which may be other hardware. All must call this, with a tensor of one shape.

    Args:
        tensor: with one dimension at least.
        processes: all of them.
    """
    return processes.gather(tensor.contiguous())[0]


def gather_samples(own: Sequence[_Samples], processes: Processes, device: torch.device) -> list[dict[str, Tensor]]:
    """The samples of all processes, one process' after another. All must call this.

    A process whose part of the batches never reached a module has none of it, and is told by the others of what size
    they are.

    Args:
        own: of each module what this process has, see :attr:`Reservoir.samples
            <pl_dendrites.core.fields.sample.Reservoir.samples>`; as many modules in every process.
        processes: all of them.
        device: where processes hand each other tensors.

    Returns:
        The like for each module, with ``seen`` and ``kept`` of every process; nothing where none has any.

    Example:
        >>> from pl_dendrites.core.fields.sample import Reservoir
        >>> reservoir = Reservoir(size=5)
        >>> reservoir.add(torch.randn(9, 3), torch.randn(9, 2))
        >>> (samples,) = gather_samples([reservoir.samples], Alone(), torch.device("cpu"))
        >>> samples["inputs"].shape, samples["seen"].tolist(), samples["kept"].tolist()
        (torch.Size([5, 3]), [9], [5])
    """
    found = processes.gather(torch.tensor([_sizes(samples) for samples in own], device=device)).cpu()
    return [_gather(samples, found[:, place], processes, device) for place, samples in enumerate(own)]


def _sizes(samples: _Samples) -> list[int]:
    if not samples:
        return [0] * 6
    inputs, errors = samples["inputs"], samples["errors"]
    of_type = (_DOUBLE.index(value.dtype) for value in (inputs, errors))
    return [int(samples["seen"]), int(samples["kept"]), inputs.shape[1], errors.shape[1], *of_type]


def _gather(own: _Samples, sizes: Tensor, processes: Processes, device: torch.device) -> dict[str, Tensor]:
    kept, (most, inputs, errors, of_inputs, of_errors) = sizes[:, 1], sizes[:, 1:].max(0).values.tolist()
    if not most:
        return {}
    like = {"inputs": ((inputs,), _DOUBLE[of_inputs]), "errors": ((errors,), _DOUBLE[of_errors])}
    whole = {}
    for name, (width, dtype) in {**like, "batch": ((), torch.float32)}.items():
        rows = own[name].to(device) if own else torch.empty(0, *width, dtype=dtype, device=device)
        missing = most - len(rows)
        rows = F.pad(rows, (0, 0) * len(width) + (0, missing)) if missing else rows
        parts = processes.gather(rows.contiguous())
        if int(kept.min()) < most:
            whole[name] = torch.cat([part[:count] for part, count in zip(parts, kept.tolist(), strict=True)])
        else:
            whole[name] = parts.flatten(0, 1)
    return {**whole, "batch": whole["batch"].cpu(), "seen": sizes[:, 0].clone(), "kept": kept.clone()}


def as_one(samples: _Samples, seed: int = 0) -> dict[str, Tensor]:
    """Samples of several processes as one process could have them: each that came is there with the same chance.

    Processes may have seen different numbers, as where tokens are padded. Each keeps a part of its own then that is as
    large a share of what it saw as in the process that kept least.

    Args:
        samples: from :func:`gather_samples`.
        seed: which ones are kept follows from it.

    Example:
        >>> samples = {name: torch.zeros(12, 1) for name in ("inputs", "errors")} | {"batch": torch.zeros(12)}
        >>> of_all = as_one({**samples, "seen": torch.tensor([4, 80]), "kept": torch.tensor([4, 8])})
        >>> of_all["inputs"].shape, of_all["seen"].tolist(), of_all["kept"].tolist()
        (torch.Size([8, 1]), [84], [8])
    """
    seen, kept = samples["seen"].tolist(), samples["kept"].tolist()
    share = min((there / came for there, came in zip(kept, seen, strict=True) if came), default=1.0)
    generator = torch.Generator().manual_seed(seed)
    rows, first = [], 0
    for there, came in zip(kept, seen, strict=True):
        some = torch.randperm(there, generator=generator, device="cpu")[: round(share * came)]
        rows.append(first + some.sort().values)
        first += there
    chosen = torch.cat(rows)
    counts = {
        "seen": torch.tensor([sum(seen)], device="cpu"),
        "kept": torch.tensor([len(chosen)], device="cpu"),
    }
    if len(chosen) == first:
        return {**samples, **counts}
    return {
        **{name: samples[name][chosen.to(samples[name].device)] for name in ("inputs", "errors", "batch")},
        **counts,
    }


def deal(samples: _Samples, processes: Processes, seed: int = 0) -> dict[str, Tensor]:
    """What this process goes on with: its own samples, or its share of those of another number of processes.

    Args:
        samples: from :func:`gather_samples`.
        processes: all of them.
        seed: see :func:`as_one`.

    Raises:
        ValueError: if that cannot be samples.

    Example:
        >>> samples = {"inputs": torch.zeros(3, 2), "errors": torch.ones(3, 1), "batch": torch.ones(3)}
        >>> own = deal({**samples, "seen": torch.tensor([1, 2]), "kept": torch.tensor([1, 2])}, Alone())
        >>> own["seen"].tolist(), own["kept"].tolist()
        ([3], [3])
    """
    if not samples:
        return {}
    check_samples(samples)
    if len(samples["kept"]) == processes.count:
        first, rank = int(samples["kept"][: processes.rank].sum()), slice(processes.rank, processes.rank + 1)
        own = slice(first, first + int(samples["kept"][rank]))
        return {name: value[rank if name in ("seen", "kept") else own] for name, value in samples.items()}
    samples = as_one(samples, seed)
    every = slice(processes.rank, None, processes.count)
    own_rows = {name: samples[name][every] for name in ("inputs", "errors", "batch")}
    kept, there = len(own_rows["batch"]), max(len(samples["batch"]), 1)
    return {**own_rows, "seen": samples["seen"] * kept // there, "kept": torch.tensor([kept], device="cpu")}
