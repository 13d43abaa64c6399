"""What a forward pass leaves for candidates that learn after the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pl_dendrites.core.functional import flat_nested
from pl_dendrites.core.kinds import Inputs

if TYPE_CHECKING:
    from pl_dendrites.core.candidates import Candidates

__all__ = ["Rows", "Use", "can_wait"]


def can_wait(pool: Candidates) -> bool:
    """Whether candidates can compute after the backward pass, with the samples of all processes.

    Those of a Linear layer can. Any other layer may have a state, or random numbers.
    """
    return type(pool.nodes) is nn.Linear


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

    @staticmethod
    def widths(pool: Candidates) -> list[tuple[int, ...]]:
        """Shapes of one row of each."""
        assert isinstance(pool.nodes, nn.Linear)
        _, dendrites, neurons = pool.links.shape
        return [(pool.nodes.in_features,), (dendrites, neurons), (neurons,)]

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """All rows, one part after another."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def outputs(self, pool: Candidates, half: torch.dtype | None) -> Tensor:
        """Outputs of a pool, shape ``(P, samples, C)``.

        Args:
            pool: the candidates.
            half: what autocast has them compute in, if it does.
        """
        x, dendrites = (value.to(pool.links.dtype) for value in (self.inputs, self.dendrites))
        return _compute(pool, Inputs((x,), {}), self.error, list(dendrites.unbind(1)), half)


class Use:
    """One use of a layer in a forward pass.

    Args:
        pool: its candidates, which compute at once if they cannot wait.
        inputs: what the layer was called with.
        out: the layer's output, whose shape alone matters.
        dendrites: outputs of the ``k`` dendrites there are.

    Attributes:
        half: what autocast has the candidates compute in, if it does.
    """

    def __init__(self, pool: Candidates, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> None:
        device = out.device.type
        self.half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._pool, self._seen = pool, (inputs, out.detach(), dendrites)
        self._outputs = None if can_wait(pool) else pool(*self._seen)

    def outputs(self) -> Tensor:
        """Outputs of the pool."""
        return _compute(self._pool, *self._seen, self.half) if self._outputs is None else self._outputs

    def rows(self, error: Tensor) -> Rows | None:
        """What the candidates learn from; ``None`` if they cannot wait, or the layer was called in its own way.

        Args:
            error: gradient of the loss with respect to the layer's output.
        """
        inputs, _, dendrites = self._seen
        if self._outputs is not None or not inputs.args:
            return None
        x = inputs.args[0].detach()
        x = flat_nested(x) if x.is_nested else x
        features, below, neurons = Rows.widths(self._pool)
        samples = error.numel() // neurons[0]
        stacked = torch.stack(dendrites, -2) if dendrites else error.new_empty(samples, *below)
        return Rows(x.reshape(samples, *features), stacked.reshape(samples, *below), error.reshape(samples, *neurons))


@torch.enable_grad()
def _compute(pool: Candidates, inputs: Inputs, out: Tensor, seen: list[Tensor], half: torch.dtype | None) -> Tensor:
    with torch.autocast(out.device.type, half, enabled=half is not None):
        outputs: Tensor = pool(inputs, out, seen)
        return outputs
