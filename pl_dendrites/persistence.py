"""What a fit saves in a checkpoint, and how it is taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_dendrites.core.used import UsedLayers
from pl_dendrites.correlation import CorrelationPhase
from pl_dendrites.score import Score
from pl_dendrites.sharding import SHARDED_KEY, is_sharded, saved_parameter_names
from pl_dendrites.state import STATE_FORMAT, check_state
from pl_dendrites.status import Status
from pl_dendrites.training_loss import TrainingLoss

__all__ = ["Persistence"]

_CHECKPOINT_KEY = "pl_dendrites_optimizer_parameters"


class Persistence(Status):
    """The part of the callback that checkpoints see."""

    _resumed: dict[str, Any] | None  # a state that was loaded, until training starts
    _interrupted: dict[str, Any] | None  # what a checkpoint is to hold after an exception
    _optimizer_parameters: list[list[list[str]]]
    _begun: bool
    _correlation: CorrelationPhase | None
    _used: UsedLayers | None
    _score: Score
    _loss: TrainingLoss
    _batches: int
    _counted: int
    _seed: int
    _stage: str

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values."""
        if self._interrupted is not None:
            return dict(self._interrupted["callback"])
        if not self._begun:
            return {}  # a learning rate finder saves before there is anything to save, and loads that
        # Until training starts, a resumed correlation phase is no more than the state that it was resumed from.
        resumed = self._resumed or {"correlation": None, "used": []}
        running = self._correlation.state_dict() if self._correlation else resumed["correlation"]
        return {
            "format": STATE_FORMAT,
            "machine": self._machine.state_dict(),
            "history": [dict(record) for record in self.history],
            "running": self._running(),
            "best": self._best.state_dict(),
            "seed": self._seed,
            "score": self._score.state_dict(),
            "loss": self._loss.state_dict(),
            "batches": self._batches,
            "counted": self._counted,
            "correlation": running,
            "used": resumed["used"] if self._used is None else sorted(self._used.names),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up a saved state; what belongs to the network follows when the fit starts.

        Raises:
            MisconfigurationException: if the state has a format that this version does not know, or is no state of a
                callback at all. The callback is then left as it was.
        """
        if self._stage not in ("", "fit"):
            return  # trainer.test(ckpt_path=...) looks at a model; it does not rewrite what happened here
        try:
            check_state(state_dict, STATE_FORMAT)
        except ValueError as error:
            raise MisconfigurationException(
                f"the checkpoint's DendriteCallback state cannot be read: {error}"
            ) from error
        if self._correlation is None:
            self._resumed = dict(state_dict)
        elif state_dict["correlation"] is not None:  # a learning rate finder puts back what it disturbed
            self._correlation.load_state_dict(state_dict["correlation"])
        self._begun = True
        self._machine.load_state_dict(state_dict["machine"])
        self.history = [dict(record) for record in state_dict["history"]]
        self._best.load_state_dict(state_dict["best"])
        self._score.load_state_dict(state_dict["score"])
        self._loss.load_state_dict(state_dict["loss"])
        self._seed = state_dict["seed"]
        self._batches, self._counted = state_dict["batches"], state_dict["counted"]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put into the checkpoint what stands aside: schedulers in a correlation phase, all that an exception undid.

        Optimizer state is saved by position; the names say what each position was.
        """
        if self._interrupted is not None:
            checkpoint.update(self._interrupted["checkpoint"])
            return
        if not self._begun:
            return
        if self._correlation is not None:
            self._correlation.hold_still()  # an exception may have come between a forward pass and its batch's end
            checkpoint["lr_schedulers"] = self._correlation.scheduler_states()
            checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]
        checkpoint[_CHECKPOINT_KEY] = saved_parameter_names(trainer.optimizers, pl_module)
        checkpoint[SHARDED_KEY] = is_sharded(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the names that :meth:`on_save_checkpoint` wrote."""
        self._optimizer_parameters = checkpoint.get(_CHECKPOINT_KEY, [])
