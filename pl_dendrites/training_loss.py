"""The loss on training data, epoch by epoch: while it falls and scores do not improve, a network overfits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["TrainingLoss"]


class TrainingLoss:
    """Mean of what training steps return as their loss. Nothing waits for the device before an epoch ends.

    Example:
        >>> import torch
        >>> loss = TrainingLoss()
        >>> loss.add({"loss": torch.tensor(3.0)}), loss.add(torch.tensor(1.0)), loss.add(None)
        (None, None, None)
        >>> loss.take(), loss.take()
        (2.0, None)
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, outputs: Any) -> None:
        """Take in what a training step returned, if a loss is in it.

        Args:
            outputs: as ``on_train_batch_end`` gets it.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = loss.detach()
            self._sum = self._sum + (loss.reshape(()) if loss.ndim else loss)
            self._count += 1

    def take(self) -> float | None:
        """The mean since the last call; ``None`` if there was no loss, or one that was not finite."""
        mean = float(self._sum) / self._count if self._count else math.nan
        self._sum, self._count = 0.0, 0
        return mean if math.isfinite(mean) else None

    def state_dict(self) -> dict[str, float]:
        """Of the running epoch, as plain values."""
        return {"sum": self._sum.item() if isinstance(self._sum, Tensor) else self._sum, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._sum, self._count = state["sum"], state["count"]
