"""What a fit says on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.reporting.verdicts import result_line, set_line
from pl_dendrites.training.trainer import bar_aside, has_endless_bar

__all__ = ["Console"]


class Console:
    """A log line for each event of one fit, from the first process, beside any progress bar.

    Args:
        trainer: the Trainer.
        verbose: whether anything is said.
    """

    def __init__(self, trainer: pl.Trainer, verbose: bool) -> None:
        self._trainer, self._verbose = trainer, verbose

    def say(self, message: str) -> None:
        """Say something, in a line of its own."""
        if self._verbose:
            with bar_aside(self._trainer):
                rank_zero_info(f"DendriteCallback: {message}")

    def begin_training(self) -> None:
        """Say what an odd number on the bar means; nothing where there is none."""
        if has_endless_bar(self._trainer):
            self.say("epochs have no limit, which the bar shows as /-2: training ends when growth does")

    def end_phase(self, history: Sequence[Mapping[str, Any]], stays: bool) -> None:
        """Say whether the set that was on trial helped; nothing where none was.

        Args:
            history: records of finished phases, the one that ends last.
            stays: whether every set stays, be the score better or not.
        """
        line = set_line(history, stays)
        if line:
            self.say(line)

    def end_fit(self, history: Sequence[Mapping[str, Any]], network: DendriticNetwork, stays: bool) -> None:
        """Say what the fit leaves.

        Args:
            history: records of all phases.
            network: the best one, which is in the model again.
            stays: as in :meth:`end_phase`.
        """
        left = {
            "dendrites": network.num_dendrites,
            "parameters": parameter_count(network.model),
            **({} if network.units is None else {"units": network.units}),
        }
        self.say(result_line(history, left, stays))
