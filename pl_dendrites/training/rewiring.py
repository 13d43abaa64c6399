"""Fields that move while a base phase trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from pl_dendrites.core.fields.rewire import turnover
from pl_dendrites.core.shared import SharedNetwork
from pl_dendrites.training.processes import Processes

__all__ = ["Rewiring"]

# Where scores end a base phase nobody knows how long it is: fields are still after so many epochs then.
_EPOCHS = 30
_BATCHES = 50


class Rewiring:
    """Lets the fields of live shared dendrites move every fifty batches of a base phase, and once an epoch at least.

    In all processes after the same batch, by the gradients of all.

    Args:
        trainer: the Trainer.
        network: the network.
    """

    def __init__(self, trainer: pl.Trainer, network: SharedNetwork) -> None:
        self._trainer, self._network = trainer, network
        self._processes, self._manual = Processes(trainer), not trainer.lightning_module.automatic_optimization
        self._batches, self._looks_since, self._share = 0, -1, 0.0

    def begin_phase(self) -> None:
        """A base phase begins."""
        self._batches, self._looks_since = 0, -1
        self._network.look(False)

    def begin_batch(self, batch_idx: int, epochs: int, length: int | None) -> None:
        """See what this batch's backward pass asks for, if it is time.

        Args:
            batch_idx: of the batch in its epoch.
            epochs: of the base phase that are over.
            length: of the base phase in epochs; ``None``: not known.
        """
        self._batches += 1
        self._share = turnover(self._progress(batch_idx, epochs, length))
        every = min(_BATCHES, self._trainer.num_training_batches)
        if self._batches % max(every, 1) == 0 and self._looks_since < 0 and self._share > 0:
            self._network.look()
            self._looks_since = self._trainer.global_step

    def _progress(self, batch_idx: int, epochs: int, length: int | None) -> float:
        batches = float(self._trainer.num_training_batches)
        return (epochs + (batch_idx / batches if batches else 0.0)) / (length or _EPOCHS)

    def end_batch(self) -> None:
        """Let fields move once the optimizer stepped, by the gradients of all batches of a window."""
        if self._looks_since < 0:
            return
        stepped = self._looks_since < self._trainer.global_step
        # A model that steps its optimizers itself may pass one over in one process and not in another.
        if self._processes.any(stepped) if self._manual else stepped:
            self._network.rewire(self._share, self._trainer.optimizers)
            self._looks_since = -1

    def state_dict(self, together: bool = True) -> dict[str, Any]:
        """For a checkpoint.

        Args:
            together: whether all processes call this. If not, gradients of some of them are left out.
        """
        moves = self._network.moves.state_dict(together)
        return {"batches": self._batches, "looks_since": self._looks_since, **moves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._batches, self._looks_since = state["batches"], state["looks_since"]
        self._network.moves.load_state_dict(state)
