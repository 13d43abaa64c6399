"""What a model configures its optimizers from: itself as its author knows it, and a training that has a length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import getclosurevars, isfunction
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pl_dendrites.core.growth.hooks import attached_layers
from pl_dendrites.training.empty_optimizers import empty_optimizers
from pl_dendrites.training.trainer import Shadows, wrap_only_trained

__all__ = ["Configuring", "hidden_dendrites"]

_WHAT_TO_DO = (
    "Give the callback `base_epochs`: with `restart=True`, the default, `trainer.estimated_stepping_batches` and"
    " `trainer.max_epochs` then answer with the length of one base phase, which is what a schedule goes over. Or make"
    " the schedule from a number of steps of your own, or give the Trainer `max_epochs`."
)


class Configuring:
    """While ``configure_optimizers`` runs, the model shows no dendrites and the Trainer the length of one base phase.

    A model that sorts its parameters into groups by name or type knows its own; the output weights of dendrites join
    the groups of their layers afterwards, as they do when they arrive in the middle of a fit. Where nothing is
    trainable yet, an optimizer may be made over no parameters. And growth ends by itself, so that a
    Trainer has no limit: where each base phase starts with schedulers as new, a schedule goes over one.

    Args:
        trainer: the Trainer, about to set up its strategy.
        module: the model.
        epochs: of a base phase; ``None``: nobody knows.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, epochs: int | None) -> None:
        self._trainer, self._module, self._epochs = trainer, module, epochs
        self._set_up, self._shadows = trainer.strategy.setup_optimizers, Shadows()
        self._shadows.put(trainer.strategy, "setup_optimizers", self._setup_optimizers)
        wrap_only_trained(trainer, self._shadows)

    def release(self) -> None:
        """Give the strategy back as it was."""
        self._shadows.release()

    def _over_what_is_to_grow(self) -> AbstractContextManager[None]:
        # An optimizer over nothing is a mistake, but where there is nothing else to train.
        trainable = any(parameter.requires_grad for parameter in self._module.parameters())
        return nullcontext() if trainable else empty_optimizers()

    def _setup_optimizers(self, trainer: pl.Trainer) -> None:
        endless = trainer.max_epochs == -1 and trainer.max_steps == -1
        answers = endless and self._epochs is not None
        if answers:
            trainer.fit_loop.max_epochs = self._epochs
        try:
            with hidden_dendrites(self._module), self._over_what_is_to_grow():
                self._set_up(trainer)
        except (ValueError, OverflowError, TypeError) as error:
            if endless and not answers and "inf" in str(error).lower():
                raise MisconfigurationException(
                    f"`configure_optimizers` asked how long training is, and with `max_epochs=-1` it has no end:"
                    f" {error}. {_WHAT_TO_DO}"
                ) from error
            raise
        finally:
            if answers:
                trainer.fit_loop.max_epochs = -1
        if endless:
            for config in trainer.lr_scheduler_configs:
                if _is_endless(config.scheduler):
                    rank_zero_warn(
                        f"{type(config.scheduler).__name__} was made from a number of steps that has no end, as"
                        " `max_epochs=-1` gives it: its learning rates may be flat, zero or not finite. " + _WHAT_TO_DO
                    )


@contextmanager
def hidden_dendrites(model: nn.Module) -> Iterator[None]:
    """Within the block, dendrites are at work but no part of the module tree: neither modules nor parameters.

    Args:
        model: the model.

    Example:
        >>> from pl_dendrites import attach
        >>> model = nn.Linear(3, 2)
        >>> attach(model).grow([""])
        >>> with hidden_dendrites(model):
        ...     [name for name, _ in model.named_parameters()]
        ['weight', 'bias']
        >>> len(list(model.parameters()))
        6
    """
    hidden = [(layer, list(layer._modules)) for _, layer in attached_layers(model)]
    for layer, _ in hidden:
        # A plain attribute in its place, for the layer's hook.
        vars(layer)["dendrites"] = layer._modules.pop("dendrites")
    try:
        yield
    finally:
        for layer, order in hidden:
            layer._modules["dendrites"] = vars(layer).pop("dendrites")
            for name in order[order.index("dendrites") + 1 :]:
                if name in layer._modules:
                    layer._modules[name] = layer._modules.pop(name)


def _is_endless(scheduler: Any) -> bool:
    # One that looks at a metric begins with an infinite one. Others have no use for what is not finite, nor for a
    # length below zero, which is what `trainer.max_epochs` is here.
    if isinstance(scheduler, ReduceLROnPlateau):
        return False
    own = {key: value for key, value in vars(scheduler).items() if key != "optimizer"}
    lengths = [value for key, value in own.items() if key in ("T_max", "total_iters", "total_steps")]
    return any(isinstance(v, int | float) and v < 0 for v in lengths) or _holds_no_number(own, depth=4)


def _holds_no_number(value: Any, depth: int) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    if depth == 0 or value is None or isinstance(value, str | bytes | int | type | nn.Module):
        return False
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, list | tuple):
        inner = list(value)
    elif isinstance(value, partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isfunction(value):
        inner = _captured(value)
    elif hasattr(value, "__dict__") and ("Scheduler" in type(value).__name__ or callable(value) or _is_schedule(value)):
        inner = [v for k, v in vars(value).items() if k != "optimizer"]
    return any(_holds_no_number(one, depth - 1) for one in inner)


def _captured(function: Any) -> list[Any]:
    return [*getclosurevars(function).nonlocals.values(), *(function.__defaults__ or ())]


def _is_schedule(value: Any) -> bool:
    return any(kind.__name__ == "LRScheduler" for kind in type(value).__mro__)
