"""Which layers' samples processes hand each other, and how, so that each has those of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pl_dendrites.core.candidates import Candidates
from pl_dendrites.core.noted import Rows

__all__ = ["Gathered", "gather_rows"]

_HALF = (None, torch.float16, torch.bfloat16)


class Gathered(NamedTuple):
    """What the candidates of a layer learn from in all processes.

    Attributes:
        rows: the samples, in the order of the processes.
        half: what autocast has the candidates compute in, if it does.
    """

    rows: Rows
    half: torch.dtype | None


@torch.no_grad()
def gather_rows(pools: Iterable[Candidates], gather: Callable[[Tensor], Tensor]) -> dict[Candidates, Gathered]:
    r"""Gather the samples of those layers where that communicates no more than a base step does.

    A base step adds up the gradients of a layer's ``W`` weights; those of a pool would be ``P W``. Over a ring each of
    ``R`` processes then sends :math:`2 (R - 1) / R` times as many numbers, and ``R - 1`` times its own part where parts
    are gathered. So samples are no dearer as long as all their numbers, of all processes, are at most ``2 W``. Each
    process then computes with all of them: where they are more, that too would be dear.

    Args:
        pools: the candidates, those of all layers in the same order in every process.
        gather: the tensors of all processes, stacked, given that of this one; they are of one shape.

    Returns:
        What was gathered. Layers that the batch did not reach are not among it.
    """
    pools = [pool for pool in pools if pool.can_wait]
    if not pools:
        return {}
    own = {pool: _rows(pool) for pool in pools}
    counts = gather(torch.tensor([_count(pool, own[pool]) for pool in pools], device=pools[0].links.device)).tolist()
    samples = {pool: [int(count[i][0]) for count in counts] for i, pool in enumerate(pools)}
    chosen = {pool: own[pool] for pool in pools if _pays(pool, samples[pool])}
    if not chosen:
        return {}
    parts = _exchange(chosen, samples, gather)
    halves = {pool: _HALF[max(int(count[i][1]) for count in counts)] for i, pool in enumerate(pools)}
    return {pool: Gathered(rows, halves[pool]) for pool, rows in parts.items()}


def _rows(pool: Candidates) -> Rows | None:
    parts = [use.rows(error) for use, error in pool.noted or () if error is not None]
    nothing = Rows(*(pool.moments.samples.new_empty(0, *width) for width in _widths(pool)))
    known = [part for part in parts if part is not None]
    return Rows.joined([nothing, *known]) if len(known) == len(parts) else None


def _count(pool: Candidates, rows: Rows | None) -> tuple[int, int]:
    # Samples, and what autocast has the pool compute in: a process without samples has to know.
    half = max((_HALF.index(use.half) for use, _ in pool.noted or ()), default=0)
    return (-1 if rows is None else len(rows.error)), half


def _pays(pool: Candidates, samples: list[int]) -> bool:
    if min(samples) < 0:
        return False
    weights = sum(parameter.nbytes for parameter in pool.parameters()) / pool.pool
    return 0 < len(samples) * max(samples) * _row_size(pool) * pool.moments.samples.itemsize <= 2 * weights


def _widths(pool: Candidates) -> list[tuple[int, ...]]:
    # Shapes of one row of inputs, outputs of dendrites, and errors.
    assert isinstance(pool.nodes, nn.Linear)
    _, dendrites, neurons = pool.links.shape
    return [(pool.nodes.in_features,), (dendrites, neurons), (neurons,)]


def _row_size(pool: Candidates) -> int:
    return sum(map(math.prod, _widths(pool)))


def _exchange(
    own: Mapping[Candidates, Rows | None], samples: Mapping[Candidates, list[int]], gather: Callable[[Tensor], Tensor]
) -> dict[Candidates, Rows]:
    # One tensor of everything, as long in all processes.
    pools, processes = list(own), range(len(next(iter(samples.values()))))
    sizes = [[samples[pool][rank] * _row_size(pool) for pool in pools] for rank in processes]
    flat = torch.cat([value.flatten() for rows in own.values() if rows is not None for value in rows])
    length = max(map(sum, sizes))
    found = gather(torch.nn.functional.pad(flat, (0, length - len(flat))))
    parts: dict[Candidates, list[Rows]] = {pool: [] for pool in pools}
    for rank, size in enumerate(sizes):
        for pool, part in zip(pools, found[rank, : sum(size)].split(size), strict=True):
            widths = _widths(pool)
            shapes = [(samples[pool][rank], *width) for width in widths]
            values = part.split([math.prod(shape) for shape in shapes])
            parts[pool].append(Rows(*(value.view(shape) for value, shape in zip(values, shapes, strict=True))))
    return {pool: Rows.joined(rows) for pool, rows in parts.items()}
