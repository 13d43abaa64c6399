"""A model that a Trainer is about to fit, made ready for dendrites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.placed import PlacedNetwork
from pl_dendrites.core.shared import SharedNetwork
from pl_dendrites.core.targets import Predicate, Targets
from pl_dendrites.training import optimizers
from pl_dendrites.training.processes import Processes
from pl_dendrites.training.refusals import refuse_homeless
from pl_dendrites.training.trainer import calls_for_steps

__all__ = ["CALLED_FOR_STEPS", "attach_to_fit"]

CALLED_FOR_STEPS = (
    "this strategy calls the model itself for its steps, and what comes in and out of them are batches and losses."
    " Let a module of the model be its network, as `self.net`"
)


def attach_to_fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    following: Mapping[str, Any],
    *,
    targets: Targets | None = None,
    exclude: Sequence[str] | Predicate = (),
    around: Sequence[str] | None = None,
    places: bool = False,
    mirrors: Mapping[str, str] | None = None,
) -> DendriticNetwork:
    """Take in the model, which may have dendrites already, and have its optimizers follow it.

    Args:
        trainer: the Trainer, with its optimizers.
        module: the model.
        following: what sets to come are like, for the network's ``set_next``.
        targets: see :func:`~pl_dendrites.core.targets.select_targets`.
        exclude: see there.
        around: modules that shared dendrites hang around; ``None``: dendrites are private, or placed.
        places: whether dendrites are placed on layers where the error asks for them.
        mirrors: see :class:`~pl_dendrites.core.DendriticNetwork`.

    Raises:
        MisconfigurationException: if the fit could not grow such dendrites; says what to do.
        ValueError: if the model cannot have them.
    """
    network: DendriticNetwork
    if places:
        network = PlacedNetwork(module, targets, exclude, mirrors, Processes(trainer))
    elif around is None:
        network = DendriticNetwork(module, targets, exclude, mirrors)
    else:
        if "" in around and calls_for_steps(trainer):
            raise MisconfigurationException(f"`around`: '' cannot be, for {CALLED_FOR_STEPS}")
        network = SharedNetwork(module, around, mirrors, Processes(trainer))
    network.set_next(**following)
    if targets is None and around is None:
        optimizers.leave_unheld_alone(trainer.optimizers, network)
    refuse_homeless(trainer.optimizers, network)
    # A fit that grows dendrites gives optimizers their output weights alone; let fresh optimizers of a model that had
    # dendrites before hold the same.
    arriving = optimizers.trained(trainer.optimizers, network)
    optimizers.adopt_parameters(trainer.optimizers, network.frozen_parameters(), arriving)
    return network
