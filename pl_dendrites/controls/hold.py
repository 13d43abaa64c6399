"""A fit of a network some of whose weights are zero, and stay so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.controls.masks import masks_of

__all__ = ["Hold", "Stage", "Stages"]


class Stage(NamedTuple):
    """One fit of a control.

    Attributes:
        epochs: that it takes.
        callbacks: that its Trainer needs.
    """

    epochs: int
    callbacks: tuple[pl.Callback, ...]


# A control, of a dense network, the parameters that it is to have, and the epochs of all its fits.
Stages = Callable[[nn.Module, int, int], Iterator[Stage]]


class Hold(pl.Callback):
    """Keeps weights zero where the masks of a model say so, whatever its optimizers do."""

    def __init__(self) -> None:
        self._weights: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the masks."""
        self._weights = [(pl_module.get_parameter(name), mask) for name, mask in masks_of(pl_module).items()]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Leave an optimizer nothing to remember of what is not there."""
        for weight, mask in self._weights:
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Undo what an optimizer did to it all the same, as one does that turns gradients."""
        for weight, mask in self._weights:
            weight.masked_fill_(~mask, 0)
