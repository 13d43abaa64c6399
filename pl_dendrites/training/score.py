"""What decides about growth: the monitored value, where it comes from and whether it is news, and the training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_dendrites.training.processes import Processes
from pl_dendrites.training.trainer import logs_itself

__all__ = ["Score", "TrainingLoss"]


class Score:
    """Reads a metric once for each time that it was measured.

    Lightning keeps the last value of every metric, so that there is one at each epoch's end, whenever it was measured.
    A metric that a validation logs is read when one ends; any other is one of training, read when an epoch ends. Where
    both log one name, validation decides, from the first time that it does.

    With several processes it is the mean over them, the same in all.

    Args:
        monitor: name of the metric.

    Attributes:
        settled: whether it is known where the metric comes from, so that decisions can rest on it.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.settled = True
        self._source: Literal["validation", "training"] | None = None
        self._validated = self._logged = False
        self._batches = -1

    def after_check(self, trainer: pl.Trainer) -> bool:
        """Look at what the validation that just ended logged, be it the one before training, whose values say nothing.

        Args:
            trainer: the Trainer.

        Returns:
            Whether scores so far were those of training, and are worth nothing any more.
        """
        if self._source == "validation" or self._agreed(trainer, logs_itself(trainer, self.monitor)) is None:
            return False
        before, self._source, self.settled = self._source, "validation", True
        return before == "training"

    def after_validation(self, trainer: pl.Trainer, batches: int) -> float | None:
        """The value that the validation which just ended logged; ``None`` if it logged none.

        Args:
            trainer: the Trainer.
            batches: trained so far.
        """
        self._validated = self.settled = True
        return self._read(self._agreed(trainer, logs_itself(trainer, self.monitor)), batches)

    def may_come(self, trainer: pl.Trainer) -> bool:
        """Whether the value of the epoch that ends is yet to be logged, if it is: by the model when its epoch ends.

        Args:
            trainer: the Trainer.
        """
        own = self._source != "validation"
        return own and self._agreed(trainer, logs_itself(trainer, self.monitor)) is None

    def after_epoch(self, trainer: pl.Trainer, batches: int) -> float | None:
        """The value over the training epoch which just ended; ``None`` if the metric is one of validation.

        Args:
            trainer: the Trainer.
            batches: trained so far.

        Raises:
            MisconfigurationException: if nothing logs the metric; lists what is logged.
        """
        if self._source == "validation":
            return None
        value = self._agreed(trainer, logs_itself(trainer, self.monitor))
        self._logged |= value is not None
        if not self._logged:  # what was never logged in an epoch's own way may have been put there
            value = self._agreed(trainer, self.monitor in trainer.callback_metrics)
        known = self._validated or not trainer.enable_validation
        if self._source is None and value is not None:
            self._source = "training"
        if self._source is None and known:
            self._refuse(trainer, "an epoch")
        # A validation to come may log it too, and then decides.
        self.settled = known
        return self._read(value, batches)

    def refuse_silence(self, trainer: pl.Trainer) -> None:
        """Raise at the end of a fit in which nothing ever logged the metric.

        Args:
            trainer: the Trainer.

        Raises:
            MisconfigurationException: lists what is logged.
        """
        if self._source is None:
            self._refuse(trainer, "training")

    def _refuse(self, trainer: pl.Trainer, when: str) -> None:
        raise MisconfigurationException(
            f"DendriteCallback(monitor={self.monitor!r}): no such metric was logged by the end of {when}. Logged"
            f" are: {sorted(trainer.callback_metrics)}. A metric of training must be logged in `training_step` or in"
            " `on_train_epoch_end`, one of validation in a validation: see `check_val_every_n_epoch`."
        )

    def _agreed(self, trainer: pl.Trainer, there: bool) -> float | None:
        # Logged without `sync_dist`, or by one process alone, it differs; what is decided by it must not.
        return Processes(trainer).mean(float(trainer.callback_metrics[self.monitor]) if there else None)

    def _read(self, value: float | None, batches: int) -> float | None:
        # A checkpoint that was saved in a validation makes Lightning end its epoch again, with nothing trained between.
        # Neither has it a mean over that epoch then.
        if self._batches == batches or value is None:
            return None
        self._batches = batches
        return value

    def state_dict(self) -> dict[str, Any]:
        """For the callback's state."""
        return {"source": self._source, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._source, self._batches = state["source"], state["batches"]
        self._validated = self._source is not None  # where validations are to say something, one most likely has


class TrainingLoss:
    """Mean of what training steps return as their loss: while it falls and scores do not improve, a network overfits.

    Nothing waits for the device before an epoch ends.

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
