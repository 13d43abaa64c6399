"""Where the monitored value comes from, and whether it is news."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_dendrites.host import is_validated

__all__ = ["Score"]


class Score:
    """Reads a metric once for each time that it was measured.

    Lightning keeps the last value of every metric, so that there is one at each epoch's end, whenever it was measured.
    A metric that a validation logged is read when one ends; any other is one of training, read when an epoch ends.

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
        if self._source == "training" or not is_validated(trainer, self.monitor):
            return None
        self._source = "validation"
        return self._read(trainer, batches)

    def after_epoch(self, trainer: pl.Trainer, batches: int) -> float | None:
        """The value over the training epoch which just ended; ``None`` if the metric is one of validation.

        Args:
            trainer: the Trainer.
            batches: trained so far.

        Raises:
            MisconfigurationException: if nothing logs the metric; lists what is logged.
        """
        if self._source is None and self.monitor in trainer.callback_metrics:
            self._source = "training"
        if self._source is None and (self._validated or not trainer.enable_validation):
            raise MisconfigurationException(
                f"DendriteCallback(monitor={self.monitor!r}): no such metric was logged by the end of an epoch. Logged"
                f" are: {sorted(trainer.callback_metrics)}. A metric of training must be logged in `training_step`."
            )
        return self._read(trainer, batches) if self._source == "training" else None

    def _read(self, trainer: pl.Trainer, batches: int) -> float | None:
        # A checkpoint that was saved in a validation makes Lightning end its epoch again, with nothing trained between.
        # Neither has it a mean over that epoch then.
        if self._batches == batches or self.monitor not in trainer.callback_metrics:
            return None
        self._batches = batches
        return float(trainer.callback_metrics[self.monitor])

    def state_dict(self) -> dict[str, Any]:
        """For the callback's state."""
        return {"source": self._source, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._source, self._batches = state["source"], state["batches"]
