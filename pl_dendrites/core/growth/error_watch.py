"""What comes into a module and the error of what goes out, of samples: for dendrites that a module shares."""

from __future__ import annotations

from torch import Tensor

from pl_dendrites.core.fields.sample import Reservoir
from pl_dendrites.core.growth.shared_block import features
from pl_dendrites.core.growth.watch import Watch
from pl_dendrites.core.kinds import Inputs
from pl_dendrites.core.tensors import below_transforms

__all__ = ["ErrorWatch"]


class ErrorWatch(Watch):
    """Takes samples of a module's inputs and of the errors of its outputs.

    Args:
        samples: most of them.
        seed: which ones they are follows from it.
        parts: into which batches are split, of which one comes here.

    Attributes:
        reservoir: the samples.
    """

    def __init__(self, samples: int, seed: int = 0, parts: int = 1) -> None:
        super().__init__()
        self.reservoir = Reservoir(samples, seed, parts)

    @property
    def seen(self) -> int:
        """Samples so far."""
        return self.reservoir.seen

    def features(self, inputs: Inputs, out: Tensor) -> Tensor:
        """See :meth:`Watch.features`."""
        return below_transforms(features(inputs, out).detach())

    def take(self, x: Tensor, error: Tensor) -> None:
        """See :meth:`Watch.take`."""
        self.reservoir.add(x, error)
