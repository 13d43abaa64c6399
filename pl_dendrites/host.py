"""The Trainer's side: everything that reaches into a running Trainer, its strategy, optimizers and callbacks.

No other file touches an attribute that Lightning does not document, but for refusals.py, which reads one. What is done
here to a Trainer is undone here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from pl_dendrites.core.structure import is_constant_key
from pl_dendrites.optimizers import OptimizerSettings

__all__ = [
    "METADATA_FILE",
    "BeforeLoading",
    "ProgressBar",
    "StandStill",
    "bar_aside",
    "callbacks_of",
    "computing_dtype",
    "gradient_scaler",
    "is_a",
    "is_validated",
    "logged_hyperparameters",
    "logging_step",
    "logs_default_result",
    "shards",
    "unwrap",
    "wrap",
    "write_hyperparameters",
]

# In the folder of a checkpoint that each process writes a part of: all but weights and optimizer states.
METADATA_FILE = "meta.pt"


def is_a(thing: object, name: str) -> bool:
    """Whether an object is of a class of that name: ``lightning.pytorch`` and ``pytorch_lightning`` both have one."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def callbacks_of(trainer: pl.Trainer) -> list[Any]:
    """A Trainer's callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def logging_step(trainer: pl.Trainer) -> int:
    """When an epoch ends, the step at which Lightning logs that epoch's metrics: its last one that stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped - 1


def logged_hyperparameters(trainer: pl.Trainer) -> dict[str, Any]:
    """What Lightning is about to log of the model's and the datamodule's ``save_hyperparameters``."""
    sources = [source for source in (trainer.lightning_module, trainer.datamodule) if source is not None]  # type: ignore[attr-defined]
    logged = [source.hparams_initial for source in sources if source._log_hyperparams]
    return {key: value for parameters in logged for key, value in parameters.items() if key != "_class_path"}


def logs_default_result(logger: Any) -> bool:
    """Whether Lightning makes ``hp_metric`` a result of each run (unless told ``default_hp_metric=False``)."""
    return bool(getattr(logger, "_default_hp_metric", True))


def write_hyperparameters(writer: Any, parameters: Mapping[str, Any], results: Iterable[str]) -> None:
    """Write hyperparameters and the names of result scalars into a run of TensorBoard.

    The writer's own ``add_hparams`` would begin a second run, and Lightning's ``log_hyperparams`` logs values for the
    results and puts the hyperparameters into ``hparams.yaml``, from which models are made.

    Args:
        writer: of a logger.
        parameters: mappings in it are written with their own entries.
        results: names of scalars.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(_flat(parameters), dict.fromkeys(results, 0.0)):
        writer.file_writer.add_summary(summary)


def _flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": entry for inner, entry in _flat(value).items()})
        else:
            flat[str(name)] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


class ProgressBar:
    """Adds items to a Trainer's progress bar, of any kind, at no cost while training.

    Metrics logged for the bar are numbers alone, cost a tensor each time, stay after their phase, and could be taken
    for the model's. ``get_metrics`` is where Lightning lets a bar be told what to show, and may return text.

    Args:
        trainer: the Trainer.

    Attributes:
        items: shown before all others.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.items: dict[str, str] = {}
        self._bar = trainer.progress_bar_callback
        if self._bar is not None:
            self._own = self._bar.__dict__.get("get_metrics")
            self._get_metrics = self._bar.get_metrics
            self._bar.get_metrics = self._with_items  # type: ignore[method-assign]

    def _with_items(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**self.items, **self._get_metrics(*args, **kwargs)}

    def release(self) -> None:
        """Give the bar back as it was."""
        if self._bar is not None:
            del self._bar.get_metrics
            if self._own is not None:
                self._bar.get_metrics = self._own  # type: ignore[method-assign]
            self._bar = None


@contextmanager
def bar_aside(trainer: pl.Trainer) -> Iterator[None]:
    """Take TQDM's bar off the screen: a line that is logged would stand behind it. Afterwards it stands below."""
    bar = getattr(trainer.progress_bar_callback, "_train_progress_bar", None)
    aside = getattr(bar, "external_write_mode", nullcontext)
    with aside():
        yield


def gradient_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """What scales the loss under ``precision="16-mixed"``; ``None`` where nothing does."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def is_validated(trainer: pl.Trainer, metric: str) -> bool:
    """Whether the validation that just ended logged a metric.

    ``callback_metrics`` also holds metrics of training: then not yet their means over the epoch, but older values.
    """
    own = metric in trainer._logger_connector.metrics["callback"]
    return own or ("/dataloader_idx_" in metric and metric in trainer.callback_metrics)


def shards(trainer: pl.Trainer) -> bool:
    """Whether a Trainer's model shards its parameters."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def computing_dtype(module: Any) -> torch.dtype | None:
    """The type that a module which went through ``fully_shard`` casts its parameters to; ``None``: it casts none."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    dtype: torch.dtype | None = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
    return dtype


class BeforeLoading:
    """Does something with the path of a checkpoint before a strategy loads it.

    Args:
        trainer: the Trainer.
        prepare: called with the path.
    """

    def __init__(self, trainer: pl.Trainer, prepare: Callable[[str], None]) -> None:
        self._strategy, self._prepare, self._load = trainer.strategy, prepare, trainer.strategy.load_checkpoint
        self._strategy.load_checkpoint = self._prepare_and_load  # type: ignore[method-assign]

    def _prepare_and_load(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._prepare(checkpoint_path)
        return self._load(checkpoint_path, *args, **kwargs)

    def release(self) -> None:
        """Give the strategy back as it was."""
        self._strategy.__dict__.pop("load_checkpoint", None)


def unwrap(trainer: pl.Trainer) -> None:
    """Take the wrapper of DDP off a network that stands still: it has no gradients to average."""
    strategy = trainer.strategy
    if is_a(strategy, "DDPStrategy") and strategy.model is not trainer.lightning_module:
        strategy.model = trainer.lightning_module
        gc.collect()  # a wrapper is part of a cycle, and as large as all gradients


def wrap(trainer: pl.Trainer) -> None:
    """Wrap a network for DDP anew, which knows only parameters that were there, and trainable, when it was made.

    All processes must call this; the first one's weights and buffers become those of all.
    """
    strategy: Any = trainer.strategy
    if is_a(strategy, "DDPStrategy"):
        unwrap(trainer)
        module: Any = trainer.lightning_module
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return
        # DDP copies the first process' buffers before each forward pass. Those of dendrites are constants: without
        # them a model that has no others is spared that.
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        own = [name for name, _ in module.named_buffers() if is_constant_key(name)]
        module._ddp_params_and_buffers_to_ignore = [*(ignored or ()), *own]
        try:
            strategy.configure_ddp()
        finally:
            if ignored is None:
                del module._ddp_params_and_buffers_to_ignore
            else:
                module._ddp_params_and_buffers_to_ignore = ignored
        strategy._pl_static_graph_delay_done = False


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
        self._loop = trainer.fit_loop.epoch_loop
        if not validate:
            self._loop._should_check_val_fx = _never  # type: ignore[method-assign]
        self._module, self._strategy, self._released = trainer.lightning_module, trainer.strategy, False
        unwrap(trainer)
        self._settings = OptimizerSettings(trainer)
        self._set_aside = self._strategy.lr_scheduler_configs
        if self._module.automatic_optimization:
            self._strategy.lr_scheduler_configs = []
        self._strategy.optimizer_step = self._skip_step  # type: ignore[method-assign]
        self._module.toggle_optimizer = self._toggle  # type: ignore[method-assign]
        self._module.untoggle_optimizer = self._untoggle  # type: ignore[method-assign]
        # A model that takes its optimizers without Lightning's wrapper steps them past the strategy.
        self._hooks = [optimizer.register_step_pre_hook(self._note_step) for optimizer in trainer.optimizers]
        self._muted = [callback for callback in callbacks_of(trainer) if is_a(callback, "EarlyStopping")]
        for callback in self._muted:
            callback._run_early_stopping_check = _do_nothing

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
        self._loop.__dict__.pop("_should_check_val_fx", None)
        self._strategy.__dict__.pop("optimizer_step", None)
        self._module.__dict__.pop("toggle_optimizer", None)
        self._module.__dict__.pop("untoggle_optimizer", None)
        self._strategy.lr_scheduler_configs = self._set_aside
        for hook in self._hooks:
            hook.remove()
        for callback in self._muted:
            callback.__dict__.pop("_run_early_stopping_check", None)


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _never(*_: Any, **__: Any) -> bool:
    return False
