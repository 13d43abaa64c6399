"""What a forward pass leaves for candidates that learn after the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pl_dendrites.core.kinds import Inputs
from pl_dendrites.core.shapes import flat_nested

__all__ = ["Pool", "Rows", "Use"]

# Outputs of candidates, given what their layer was called with, its output, and outputs of its dendrites.
Pool = Callable[[Inputs, Tensor, list[Tensor]], Tensor]


class Rows(NamedTuple):
    """All that the candidates of a Linear layer learn from, a row for each sample.

    Attributes:
        inputs: shape ``(samples, n)``.
        dendrites: shape ``(samples, k, C)``, outputs of the dendrites there are.
        error: shape ``(samples, C)``.
    """

    inputs: Tensor
    dendrites: Tensor
    error: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """All rows, one part after another."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def outputs(self, pool: Pool, dtype: torch.dtype, half: torch.dtype | None) -> Tensor:
        """Outputs of a pool, shape ``(P, samples, C)``.

        Args:
            pool: the candidates.
            dtype: of their weights.
            half: what autocast has them compute in, if it does.
        """
        x, dendrites = (value.to(dtype) for value in (self.inputs, self.dendrites))
        return _compute(pool, Inputs((x,), {}), self.error, list(dendrites.unbind(1)), half)


class Use:
    """One use of a layer in a forward pass.

    Args:
        pool: its candidates.
        waits: whether they compute later, or at once.
        inputs: what the layer was called with.
        out: the layer's output, whose shape alone matters.
        dendrites: outputs of the ``k`` dendrites there are.

    Attributes:
        half: what autocast has the candidates compute in, if it does.
    """

    def __init__(self, pool: Pool, waits: bool, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> None:
        device = out.device.type
        self.half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._pool, self._seen = pool, (inputs, out.detach(), dendrites)
        self._outputs = None if waits else pool(*self._seen)

    def outputs(self) -> Tensor:
        """Outputs of the pool."""
        return _compute(self._pool, *self._seen, self.half) if self._outputs is None else self._outputs

    def rows(self, error: Tensor) -> Rows | None:
        """What candidates that wait learn from, of a Linear layer; ``None`` if it was called in a way of its own.

        Args:
            error: gradient of the loss with respect to the layer's output.
        """
        inputs, _, dendrites = self._seen
        if not inputs.args:
            return None
        x = inputs.args[0].detach()
        x = flat_nested(x) if x.is_nested else x
        neurons = error.shape[-1]
        samples, below = error.numel() // neurons, (len(dendrites), neurons)
        stacked = torch.stack(dendrites, -2) if dendrites else error.new_empty(samples, *below)
        return Rows(x.reshape(samples, x.shape[-1]), stacked.reshape(samples, *below), error.reshape(samples, neurons))


@torch.enable_grad()
def _compute(pool: Pool, inputs: Inputs, out: Tensor, seen: list[Tensor], half: torch.dtype | None) -> Tensor:
    with torch.autocast(out.device.type, half, enabled=half is not None):
        return pool(inputs, out, seen)
