"""A fit that begins with nothing to train, or grows before it trains: the network is scored as it is, and grows."""

from __future__ import annotations

import itertools

import lightning.pytorch as pl
from torch import Tensor

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.training.stand_still import StandStill
from pl_dendrites.training.trainer import validate

__all__ = ["Untrained"]


class Untrained:
    """The base phase of a network of which nothing is trained, as a pretrained one that is frozen whole.

    The Trainer validates before the first batch, and the first score ends the phase. A metric of training has one when
    an epoch is over, in which neither the network nor optimizers and schedulers move.
    """

    def __init__(self) -> None:
        self._still: StandStill | None = None
        self._validated = False

    def begin(self, trainer: pl.Trainer, machine: PhaseMachine, network: DendriticNetwork, grows_first: bool) -> None:
        """Training is about to begin, and perhaps with such a phase.

        Args:
            trainer: the Trainer.
            machine: decides about phases.
            network: what grows.
            grows_first: whether it does before anything is trained, unless its layers learn themselves.
        """
        over = machine.phase == "correlation" or machine.pending is not None or machine.stop_reason
        grows_first = grows_first and machine.growing and not (machine.cycle or machine.epochs)
        layers = itertools.chain.from_iterable(network.own_parameters().values())
        learns = layers if grows_first else trainer.lightning_module.parameters()
        if not over and not any(parameter.requires_grad for parameter in learns):
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
