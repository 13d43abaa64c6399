"""A fit that begins with nothing to train: the network is scored as it is, and then grows."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor

from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.training.stand_still import StandStill
from pl_dendrites.training.trainer import validate

__all__ = ["Untrained"]


class Untrained:
    """The base phase of a network of which nothing is trainable, as a pretrained one that is frozen whole.

    The Trainer validates before the first batch, and the first score ends the phase. A metric of training has one when
    an epoch is over, in which neither the network nor optimizers and schedulers move.
    """

    def __init__(self) -> None:
        self._still: StandStill | None = None
        self._validated = False

    def begin(self, trainer: pl.Trainer, machine: PhaseMachine) -> None:
        """Training is about to begin, and perhaps with such a phase.

        Args:
            trainer: the Trainer.
            machine: decides about phases.
        """
        over = machine.phase == "correlation" or machine.pending is not None or machine.stop_reason
        if not over and not any(parameter.requires_grad for parameter in trainer.lightning_module.parameters()):
            machine.trains = False
            self._still, self._validated = StandStill(trainer), False

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """Have the network validated before its first epoch begins.

        Args:
            trainer: the Trainer.
        """
        if self._still is not None and not self._validated and trainer.enable_validation:
            self._validated = True
            validate(trainer)

    def begin_backward(self, loss: Tensor) -> None:
        """Let a backward pass run that reaches nothing.

        Args:
            loss: where it begins.
        """
        if self._still is not None and not loss.requires_grad:
            loss.requires_grad_(True)

    def end(self) -> None:
        """The phase is over, if this was one."""
        if self._still is not None:
            self._still.release()
            self._still = None
