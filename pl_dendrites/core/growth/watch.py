"""What looks at a layer's inputs and at the errors of its outputs, while its network stands still."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from pl_dendrites.core.kinds import Inputs

__all__ = ["Watch"]


class Watch(ABC):
    """Sees each use of a layer in training, and the error that comes back to it.

    Attributes:
        listening: whether uses of the layer are looked at: those of training, not those of a validation.
        watching: whether errors that come are taken in.
        loss_scale: what the loss was multiplied by before the backward pass; ``None``: nothing.
    """

    def __init__(self) -> None:
        self.listening = self.watching = True
        self.loss_scale: Tensor | None = None

    @property
    @abstractmethod
    def seen(self) -> int:
        """How much was seen so far; 0: nothing."""

    @abstractmethod
    def features(self, inputs: Inputs, out: Tensor) -> Tensor:
        """What of a use is kept until its error comes.

        Args:
            inputs: what the layer was called with.
            out: what the next layer sees.
        """

    @abstractmethod
    def take(self, x: Tensor, error: Tensor) -> None:
        """Take in a use whose error came.

        Args:
            x: from :meth:`features`.
            error: gradient of the loss with respect to what the next layer saw.
        """

    def watched(self, inputs: Inputs, out: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
        """What :class:`~pl_dendrites.core.rule.correlation.CorrelationRule` is to be given.

        Args:
            inputs: what the layer was called with.
            out: what the next layer sees.

        Returns:
            A tensor that lets the backward pass come by where all else is frozen, and what is to be called then.
        """
        x = self.features(inputs, out)

        def observe(_: Tensor, error: Tensor) -> None:
            if self.watching:
                self.take(x, error if self.loss_scale is None else error / self.loss_scale)

        return x.new_zeros(()).requires_grad_(), observe
