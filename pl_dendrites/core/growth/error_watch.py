"""What comes into a module and the error of what goes out: looked at while a network trains or stands still."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pl_dendrites.core.fields.sample import Reservoir
from pl_dendrites.core.growth.shared_block import features
from pl_dendrites.core.kinds import Inputs
from pl_dendrites.core.tensors import below_transforms

__all__ = ["ErrorWatch"]


class ErrorWatch:
    """Takes samples of a module's inputs and of the errors of its outputs.

    Args:
        samples: most of them.
        seed: which ones they are follows from it.
        parts: into which batches are split, of which one comes here.

    Attributes:
        reservoir: the samples.
        listening: whether uses of the module are looked at: those of training, not those of a validation.
        watching: whether errors that come are taken in.
        loss_scale: what the loss was multiplied by before the backward pass; ``None``: nothing.
    """

    def __init__(self, samples: int, seed: int = 0, parts: int = 1) -> None:
        self.reservoir = Reservoir(samples, seed, parts)
        self.listening = self.watching = True
        self.loss_scale: Tensor | None = None

    def watched(self, inputs: Inputs, out: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
        """What :class:`~pl_dendrites.core.rule.correlation.CorrelationRule` is to be given.

        Args:
            inputs: what the module was called with.
            out: what the next layer sees.

        Returns:
            A tensor that lets the backward pass come by where all else is frozen, and what is to be called then.
        """
        x = below_transforms(features(inputs, out).detach())

        def observe(_: Tensor, error: Tensor) -> None:
            if self.watching:
                self.reservoir.add(x, error if self.loss_scale is None else error / self.loss_scale)

        return x.new_zeros(()).requires_grad_(), observe
