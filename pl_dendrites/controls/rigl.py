"""A network that is sparse from its first step on, with weights that move: RigL (arXiv:1911.11134)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.controls.hold import Hold, Stage
from pl_dendrites.controls.masks import keep_some, left_for, weights_of
from pl_dendrites.core.fields.rewire import exchange, forget, turnover

__all__ = ["Rewire", "sparse"]

# What entered must have had the time to grow before it is compared with others.
_RARELY = 10


def sparse(model: nn.Module, parameters: int, epochs: int, names: Iterable[str] | None = None) -> Iterator[Stage]:
    """Train a network that has some of its weights alone, in one fit.

    Args:
        model: the dense network, not trained yet.
        parameters: that it is to have, all in all.
        epochs: of the fit.
        names: of the weights that are sparse; ``None``: all that can be.

    Yields:
        The fit, to be done before the next is asked for.

    Raises:
        ValueError: if the model cannot have so many parameters.

    Example:
        >>> from pl_dendrites.controls import parameters_left
        >>> model = nn.Linear(20, 5)
        >>> for stage in sparse(model, 35, epochs=10):
        ...     stage.epochs, parameters_left(model)
        (10, 35)
    """
    weights = weights_of(model, names)
    keep_some(model, list(weights), left_for(model, parameters, weights.values()))
    yield Stage(epochs, (Rewire(epochs),))


class Rewire(Hold):
    """Every so many steps the weakest entries of a weight leave, and those with the largest gradient enter, at zero.

    Of each weight of a model that has a mask, by the same rule as fields of dendrites move; the share that moves falls
    as theirs does.

    Args:
        epochs: of the fit.
        every: so many steps; in epochs that are shorter once an epoch, or every ten steps.
    """

    def __init__(self, epochs: int, every: int = 50) -> None:
        super().__init__()
        self._epochs, self._every, self._progress = epochs, every, 0.0
        self._steps = Counter[nn.Parameter]()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See how far the fit is."""
        self._progress = (trainer.current_epoch + batch_idx / trainer.num_training_batches) / self._epochs

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Move what it is time for, by gradients that all processes have in common."""
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        share, every = turnover(self._progress), int(min(self._every, max(trainer.num_training_batches, _RARELY)))
        for weight, mask in self._weights:
            self._steps[weight] += weight in own
            # Not where an epoch ends: a score would be that of a network some of whose weights have not begun.
            if weight in own and share > 0 and self._steps[weight] % every == every // 2:
                _move(weight, mask, optimizer, share)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


@torch.no_grad()
def _move(weight: nn.Parameter, mask: Tensor, optimizer: Optimizer, share: float) -> None:
    gradient = weight.grad
    if gradient is None or not gradient.isfinite().all() or not mask.any():
        return
    places = mask.flatten().nonzero().T
    gain = gradient.abs().where(gradient != 0, -1).flatten()  # nothing asks for what has none
    _, places = exchange(places, weight.abs().flatten()[places], gain[None], share)
    kept = torch.zeros_like(mask).flatten().scatter(0, places[0], True).view_as(mask)
    moved = kept ^ mask
    mask.copy_(kept)
    weight.masked_fill_(moved, 0)
    gradient.masked_fill_(moved, 0)  # what one batch chose begins with the next
    forget(optimizer, weight, moved)
