"""Where the monitored value comes from, and whether it is news."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_dendrites.host import is_validated
from pl_dendrites.ranks import Ranks

__all__ = ["Score"]


class Score:
    """Reads a metric once for each time that it was measured.

    Lightning keeps the last value of every metric, so that there is one at each epoch's end, whenever it was measured.
    A metric that a validation logged is read when one ends; any other is one of training, read when an epoch ends.

    With several processes it is the mean over them, the same in all.

    Args:
        monitor: name of the metric.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self._source: Literal["validation", "training"] | None = None
        self._validated = False
        self._batches = -1

    def after_validation(self, trainer: pl.Trainer, batches: int) -> float | None:
        """The value that the validation which just ended logged; ``None`` if it logged none.

        Args:
            trainer: the Trainer.
            batches: trained so far.
        """
        self._validated = True
        value = self._agreed(trainer, is_validated(trainer, self.monitor))
        if self._source == "training" or value is None:
            return None
        self._source = "validation"
        return self._read(value, batches)

    def after_epoch(self, trainer: pl.Trainer, batches: int) -> float | None:
        """The value over the training epoch which just ended; ``None`` if the metric is one of validation.

        Args:
            trainer: the Trainer.
            batches: trained so far.

        Raises:
            MisconfigurationException: if nothing logs the metric; lists what is logged.
        """
        value = self._agreed(trainer, self.monitor in trainer.callback_metrics)
        if self._source is None and value is not None:
            self._source = "training"
        if self._source is None and (self._validated or not trainer.enable_validation):
            raise MisconfigurationException(
                f"DendriteCallback(monitor={self.monitor!r}): no such metric was logged by the end of an epoch. Logged"
                f" are: {sorted(trainer.callback_metrics)}. A metric of training must be logged in `training_step`."
            )
        return self._read(value, batches) if self._source == "training" else None

    def _agreed(self, trainer: pl.Trainer, there: bool) -> float | None:
        # Logged without `sync_dist`, or by one process alone, it differs; what is decided by it must not.
        return Ranks(trainer).mean(float(trainer.callback_metrics[self.monitor]) if there else None)

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
