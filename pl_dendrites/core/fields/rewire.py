"""Fields that move: the weakest inputs leave, those with the largest gradient enter."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_dendrites.core.tensors import local

__all__ = ["Gains", "exchange", "forget", "turnover"]


class Gains:
    """Gradients of the weights that units do not have: how much each input that a unit does not see would move it.

    They are sums over the backward passes that are watched, as if these were one with all samples.

    Args:
        units: how many, ``M``.
        inputs: of their module, ``n``.
        outputs: of their module, ``C``.
        device: where they are.
        parts: into which batches are split; the loss of one is the mean of theirs, and sums of them add up.

    Attributes:
        sums: what is added up.
        feeds: shape ``(M, C)``, of all outputs.
    """

    def __init__(self, units: int, inputs: int, outputs: int, device: torch.device, parts: int = 1) -> None:
        self._parts = parts
        shapes = [(units, inputs), (units,), (inputs,), (1,), (units, outputs)]
        self.sums = [torch.zeros(shape, device=device) for shape in shapes]
        self._products, self._errors, self._inputs, self._samples, self.feeds = self.sums

    @property
    def field(self) -> Tensor:
        """Shape ``(M, n)``, of all inputs."""
        # An input's mean moves a unit as its bias does: only what varies is of use.
        return self._products - self._errors[:, None] * (self._inputs / self._samples.clamp(min=1))

    def watch_field(self, potentials: Tensor, x: Tensor) -> Tensor:
        """Look at the next backward pass through potentials.

        Args:
            potentials: shape ``(*, M)``.
            x: shape ``(*, n)``, what they are made of.
        """
        x = x.detach().flatten(0, -2)

        def look(error: Tensor) -> None:
            error, inputs = error.flatten(0, -2).float() / self._parts, x.float()
            self._products += error.T @ inputs
            self._errors += error.sum(0)
            self._inputs += inputs.sum(0)
            self._samples += len(inputs)

        potentials.register_hook(look)
        return potentials

    def watch_feeds(self, term: Tensor, units: Tensor) -> Tensor:
        """Look at the next backward pass through what units add to outputs.

        Args:
            term: shape ``(*, C)``.
            units: shape ``(*, M)``, outputs of the units.
        """
        units = units.detach().flatten(0, -2)

        def look(error: Tensor) -> None:
            self.feeds += units.T.float() @ error.flatten(0, -2).float() / self._parts

        term.register_hook(look)
        return term


def turnover(progress: float, share: float = 0.3, end: float = 0.75) -> float:
    """The share of each field that is replaced, which falls as a cosine.

    Args:
        progress: of the base phase, from 0 to 1.
        share: at its start.
        end: from this progress on nothing moves.

    Example:
        >>> [round(turnover(progress), 3) for progress in (0.0, 0.375, 0.75, 1.0)]
        [0.3, 0.15, 0.0, 0.0]
    """
    return share / 2 * (1 + math.cos(math.pi * progress / end)) if progress < end else 0.0


def exchange(places: Tensor, strength: Tensor, gain: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which entries of each row go, and what comes in their places: the rule of RigL (arXiv:1911.11134), row by row.

    Args:
        places: shape ``(M, f)``, what each row has: different ones of ``n``.
        strength: shape ``(M, f)``, the weakest go.
        gain: shape ``(M, n)``, the largest of what a row has not come; negative: never.
        share: of a row that is replaced, at least one entry.

    Returns:
        Shape ``(M, f)``, whether an entry was replaced; and the new places.

    Example:
        >>> moved, places = exchange(
        ...     torch.tensor([[0, 1]]), torch.tensor([[5.0, 1.0]]), torch.tensor([[9.0, 9, 2, 3]]), 0.5
        ... )
        >>> moved.tolist(), places.tolist()
        ([[False, True]], [[0, 3]])
    """
    size, there = places.shape[1], gain.shape[1]
    count = min(max(int(share * size), 1), there - size)
    if count < 1:
        return torch.zeros_like(places, dtype=torch.bool), places
    weakest = strength.topk(count, 1, largest=False).indices
    best = gain.scatter(1, places.long(), -1.0).topk(count, 1)
    # The weakest of those that go faces the best of those that come; where nothing is worth coming, none goes.
    come = best.values >= 0
    slots = torch.zeros_like(places, dtype=torch.bool).scatter(1, weakest, come)
    now = places.long().gather(1, weakest)
    return slots, places.scatter(1, weakest, torch.where(come, best.indices, now).to(places.dtype))


@torch.no_grad()
def forget(optimizer: Optimizer, parameter: Tensor, moved: Tensor) -> None:
    """Let what an optimizer remembers of some entries of a parameter start anew.

    Whatever it keeps of the parameter's shape begins at zero, as moments do, and as an average of the weights does that
    are zero themselves.

    Args:
        optimizer: any.
        parameter: one of its own.
        moved: shape of the parameter, which entries.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == moved.shape and value.is_floating_point():
            local(value).masked_fill_(moved.to(value.device), 0)
