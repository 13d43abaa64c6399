"""What an exception found in a fit, for a checkpoint that is saved after it, when the model is the best one again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import nn

from pl_dendrites.saved.copies import has_weights, model_weights, on_cpu
from pl_dendrites.saved.partial import dendrite_entries, with_dendrites

__all__ = ["Interrupted"]


@dataclass(frozen=True)
class Interrupted:
    """A fit as it was at an exception.

    Attributes:
        state: of the callback.
        checkpoint: what else a checkpoint of that moment has, the weights among it.
        left: the weights that the model is left with.
    """

    state: dict[str, Any]
    checkpoint: dict[str, Any]
    left: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        module: pl.LightningModule,
        state: dict[str, Any],
        checkpoint: Mapping[str, Any],
        best: Mapping[str, Any] | None,
    ) -> Interrupted:
        """Keep the weights that a model has now.

        Args:
            module: the model, as it is interrupted.
            state: of the callback.
            checkpoint: what else stands aside.
            best: the weights that the model gets back; ``None``: it stays as it is.
        """
        weights = on_cpu(with_dendrites(module.state_dict(), dendrite_entries(module)))
        return cls(state, {**checkpoint, "state_dict": weights}, model_weights(module) if best is None else best)

    def still(self, module: nn.Module) -> bool:
        """Whether a model is what it was left as. Who trains it on, or sets its weights, means that when saving."""
        return has_weights(module, self.left)
