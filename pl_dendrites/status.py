"""What a user reads off the callback, during a fit and after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from pl_dendrites.checkpoint import BestModel
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.history import summary_table
from pl_dendrites.report import write_report

__all__ = ["Status"]


class Status(pl.Callback):
    """The state of growth.

    Attributes:
        network: the :class:`~pl_dendrites.core.DendriticNetwork`, once a fit began.
        history: a dict of plain values for every finished phase.
    """

    network: DendriticNetwork | None
    history: list[dict[str, Any]]
    _machine: PhaseMachine
    _best: BestModel

    @property
    def phase(self) -> Literal["base", "correlation"]:
        """The phase that is running."""
        return self._machine.phase

    @property
    def cycle(self) -> int:
        """0 in the first base phase; each set of dendrites that is tried starts the next."""
        return self._machine.cycle

    @property
    def num_dendrites(self) -> int:
        """Dendrites per neuron, of the layers that have most."""
        return 0 if self.network is None else self.network.num_dendrites

    @property
    def best_model_score(self) -> float | None:
        """Score of the best network so far."""
        return self._machine.best

    @property
    def best_model_path(self) -> str:
        """Path of ``best.ckpt``; empty where none was written."""
        return self._best.path

    @property
    def stop_reason(self) -> str:
        """Why growth is over; empty while it is not."""
        return self._machine.stop_reason

    def summary(self) -> str:
        """A table with a row per cycle: dendrites, parameters, epochs, best score, whether it was kept, and why."""
        return summary_table(self.history)

    def report(self, path: str | Path, controls: Mapping[str, Mapping[str, float]] | None = None) -> None:
        """Write a page that tells what grew where and when, what it gained, what was rejected and why, and the cost.

        Args:
            path: a ``.html`` file, complete in itself, or a ``.md`` file, which has its pictures beside it.
            controls: plain networks to compare with; errors too are as in :func:`~pl_dendrites.report.write_report`.
        """
        write_report(path, [*self.history, *filter(None, [self._running()])], controls)

    @abstractmethod
    def _running(self) -> dict[str, Any] | None:
        """The record of the phase that is running."""
