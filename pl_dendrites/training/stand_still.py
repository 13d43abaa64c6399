"""A Trainer whose loops go on while the network stands still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from pl_dendrites.training.restart import OptimizerSettings
from pl_dendrites.training.trainer import Shadows, no_early_stopping, no_validation, unwrap

__all__ = ["StandStill"]


class StandStill:
    """Keeps a Trainer's loops running while its optimizers, schedulers and early stopping do nothing.

    The strategy's ``optimizer_step`` is shadowed on the instance: closures run, so that there are gradients, and every
    counter goes on, so that checkpoints, limits and loggers work as always. ``global_step`` must advance, or
    ``ModelCheckpoint`` would stop saving. Schedulers are set aside; under manual optimization the model steps them
    itself and must find them, so there their steps are undone.

    Args:
        trainer: the Trainer.
        validate: whether it goes on to validate.

    Attributes:
        stepped: an optimizer would have stepped since this was last set to false.
        toggled: the optimizer whose turn it is by the model's ``toggle_optimizer``; ``None``: every one's.
    """

    def __init__(self, trainer: pl.Trainer, validate: bool = True) -> None:
        self.stepped = False
        self.toggled: Optimizer | None = None
        self._module, self._strategy, self._released = trainer.lightning_module, trainer.strategy, False
        unwrap(trainer)
        self._settings = OptimizerSettings(trainer, whole=False)
        self._set_aside = self._strategy.lr_scheduler_configs
        if self._module.automatic_optimization:
            self._strategy.lr_scheduler_configs = []
        own = Shadows()
        own.put(self._strategy, "optimizer_step", self._skip_step)
        own.put(self._module, "toggle_optimizer", self._toggle)
        own.put(self._module, "untoggle_optimizer", self._untoggle)
        self._shadows = [own, no_early_stopping(trainer), *([] if validate else [no_validation(trainer)])]
        # A model that takes its optimizers without Lightning's wrapper steps them past the strategy.
        self._hooks = [optimizer.register_step_pre_hook(self._note_step) for optimizer in trainer.optimizers]

    def _skip_step(self, optimizer: Optimizer, closure: Callable[[], Any], *_: Any, **__: Any) -> Any:
        self.stepped = True
        return closure()

    def _note_step(self, *_: Any) -> None:
        self.stepped = True

    def _toggle(self, optimizer: Any) -> None:
        # Lightning's own would set flags of parameters, which are all frozen.
        self.toggled = getattr(optimizer, "optimizer", optimizer)

    def _untoggle(self, optimizer: Any) -> None:
        self.toggled = None

    def scheduler_states(self) -> list[dict[str, Any]]:
        """States of the schedulers as they will be again, for a checkpoint."""
        return self._settings.scheduler_states

    def hold(self) -> None:
        """Undo what the model did to its schedulers and learning rates."""
        if not self._module.automatic_optimization:
            self._settings.restore()

    def release(self) -> None:
        """Give everything back."""
        if self._released:
            return
        self._released = True
        self.hold()
        for shadows in self._shadows:
            shadows.release()
        self._strategy.lr_scheduler_configs = self._set_aside
        for hook in self._hooks:
            hook.remove()
