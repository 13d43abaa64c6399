"""Everything that reaches into a Trainer, its strategy, loops, callbacks and loggers.

No other file touches an attribute that Lightning does not document. What is put into a Trainer here is a
:class:`Shadows`, or has one, which takes it out again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, update_wrapper
from inspect import unwrap as innermost
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from pl_dendrites.core.keys import is_common_key

__all__ = [
    "BeforeLoading",
    "ProgressBar",
    "Shadows",
    "after_epoch_of",
    "bar_aside",
    "callbacks_of",
    "computing_dtype",
    "gradient_scaler",
    "has_communication_state",
    "has_endless_bar",
    "is_a",
    "load_within",
    "logged_hyperparameters",
    "logging_step",
    "logs_default_result",
    "logs_hyperparameters",
    "logs_itself",
    "loss_scale",
    "no_early_stopping",
    "no_validation",
    "note_trust",
    "save_by_way_of",
    "save_straight",
    "shards",
    "unwrap",
    "validate",
    "wrap",
    "wrap_only_trained",
    "write_hyperparameters",
]


class Shadows:
    """Methods that stand before those of objects' classes, on the instances, until they are released.

    A copy or a pickle of such an object has the method that stood there before, of its own.

    Example:
        >>> class Bar:
        ...     def text(self):
        ...         return "plain"
        >>> bar, shadows = Bar(), Shadows()
        >>> shadows.put(bar, "text", lambda: "shadowed")
        >>> bar.text()
        'shadowed'
        >>> shadows.release()
        >>> bar.text(), vars(bar)
        ('plain', {})
    """

    def __init__(self) -> None:
        self._put: list[tuple[Any, str, list[Any]]] = []

    def put(self, thing: Any, name: str, method: Callable[..., Any]) -> None:
        """Put one in place; one that the instance had by itself comes back on release."""
        before = [vars(thing)[name]] if name in vars(thing) else []
        self._put.append((thing, name, before))
        setattr(thing, name, _Shadow(thing, name, method, before))

    def release(self) -> None:
        """Take all away, the last one first. Twice is the same as once."""
        while self._put:
            thing, name, before = self._put.pop()
            vars(thing).pop(name, None)
            for value in before:
                setattr(thing, name, value)


class _Shadow:
    def __init__(self, thing: Any, name: str, method: Callable[..., Any], before: list[Any]) -> None:
        update_wrapper(self, innermost(getattr(thing, name)))  # Lightning asks whether a user overrode it
        self._of, self._method, self._before = (thing, name), method, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is copied is there already when its attributes are, and has its class' methods.
        return (_same, (self._before[0],)) if self._before else (getattr, self._of)


def _same(value: Any) -> Any:
    return value


def is_a(thing: object, name: str) -> bool:
    """Whether an object is of a class of that name: ``lightning.pytorch`` and ``pytorch_lightning`` both have one."""
    return any(kind.__name__ == name for kind in type(thing).__mro__)


def callbacks_of(trainer: pl.Trainer) -> list[Any]:
    """A Trainer's callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def logging_step(trainer: pl.Trainer) -> int:
    """When an epoch ends, the step at which Lightning logs that epoch's metrics: its last one that stepped."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped - 1


def logs_hyperparameters(trainer: pl.Trainer) -> bool:
    """Whether Lightning logs hyperparameters when a fit begins. Before version 2.5.2 nobody can tell it not to."""
    return bool(getattr(trainer, "enable_autolog_hparams", True))


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
        items: shown behind all others, for a narrow terminal cuts off what stands last.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.items: dict[str, str] = {}
        self._shadows = Shadows()
        bar = trainer.progress_bar_callback
        if bar is not None:
            self._get_metrics = bar.get_metrics
            self._shadows.put(bar, "get_metrics", self._with_items)

    def _with_items(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        shown = self._get_metrics(*args, **kwargs)
        return {**shown, **{name: text for name, text in self.items.items() if name not in shown}}

    def release(self) -> None:
        """Give the bar back as it was."""
        self._shadows.release()


@contextmanager
def bar_aside(trainer: pl.Trainer) -> Iterator[None]:
    """Take a bar off the terminal, TQDM's or Rich's, while a line is logged. Afterwards it stands below.

    The line would stand behind it otherwise, and what stands there Rich wipes out.
    """
    bar = trainer.progress_bar_callback
    tqdm_bar, progress = getattr(bar, "_train_progress_bar", None), getattr(bar, "progress", None)
    aside = getattr(tqdm_bar, "external_write_mode", nullcontext)
    with aside(), nullcontext() if progress is None else _hidden(progress):
        yield


@contextmanager
def _hidden(progress: Any) -> Iterator[None]:
    # Not stopped and started: Rich then wipes out as many lines as the bar had, of what was logged.
    tasks = [task for task in progress.tasks if task.visible]
    _show(progress, tasks, False)
    try:
        yield
    finally:
        _show(progress, tasks, True)


def _show(progress: Any, tasks: Iterable[Any], visible: bool) -> None:
    for task in tasks:
        task.visible = visible
    progress.refresh()


def has_endless_bar(trainer: pl.Trainer) -> bool:
    """Whether a bar of Rich's counts the epochs of a fit that has no limit, up to the -2nd."""
    return trainer.max_epochs == -1 and is_a(trainer.progress_bar_callback, "RichProgressBar")


def gradient_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """What scales the loss under ``precision="16-mixed"``; ``None`` where nothing does."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale(trainer: pl.Trainer) -> torch.Tensor | None:
    """What Lightning multiplies the loss by before a backward pass, where the device has it; ``None``: by nothing."""
    scaler = gradient_scaler(trainer)
    return None if scaler is None else scaler._scale


def logs_itself(trainer: pl.Trainer, metric: str) -> bool:
    """Whether the loop that is at its end, be it an epoch's or a validation's, logged a metric.

    ``callback_metrics`` also holds what others logged, and what an earlier epoch did.
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


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether a part of a model is compiled, by ``torch.compile`` or its own ``compile``."""
    if getattr(model, "_compiler_ctx", None):
        return True
    return any(isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl for m in model.modules())


def after_epoch_of(module: pl.LightningModule, then: Callable[[], None]) -> Shadows:
    """Do something once, when the model's own ``on_train_epoch_end`` is over: no callback's comes after it.

    Args:
        module: the model, whose turn has yet to come.
        then: called after it.
    """
    shadows, own = Shadows(), module.on_train_epoch_end

    def own_and_then() -> None:
        shadows.release()
        own()
        then()

    shadows.put(module, "on_train_epoch_end", own_and_then)
    return shadows


class BeforeLoading:
    """Does something with the path of a checkpoint before a strategy loads it.

    Args:
        trainer: the Trainer.
        prepare: called with the path, and whether the user said that anything may be read from it.
    """

    def __init__(self, trainer: pl.Trainer, prepare: Callable[[str, bool], None]) -> None:
        self._prepare, self._load, self._shadows = prepare, trainer.strategy.load_checkpoint, Shadows()
        self._shadows.put(trainer.strategy, "load_checkpoint", self._prepare_and_load)

    def _prepare_and_load(self, checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        self._prepare(checkpoint_path, _is_trusted(**options))
        return self._load(checkpoint_path, **options)

    def release(self) -> None:
        """Give the strategy back as it was."""
        self._shadows.release()


def _is_trusted(weights_only: bool | None = None) -> bool:
    # Before version 2.6 Lightning has no such option: nobody said it.
    return weights_only is False


def load_within(trainer: pl.Trainer, context: Callable[[], AbstractContextManager[None]]) -> Shadows:
    """Have a Trainer load a model's weights within a context until this is released."""
    load = trainer.strategy.load_model_state_dict

    def load_here(*args: Any, **kwargs: Any) -> None:
        with context():
            load(*args, **kwargs)

    shadows = Shadows()
    shadows.put(trainer.strategy, "load_model_state_dict", load_here)
    return shadows


def save_by_way_of(trainer: pl.Trainer, way: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]) -> Shadows:
    """Have a Trainer make its checkpoints by way of a function until this is released.

    No hook comes after the model's own, and checkpoints of weights alone have no hook of a callback at all.

    Args:
        trainer: the Trainer.
        way: called with what makes a checkpoint, all hooks included; what it returns is saved.
    """
    shadows, connector = Shadows(), trainer._checkpoint_connector
    make = connector.dump_checkpoint
    shadows.put(connector, "dump_checkpoint", lambda *args, **kwargs: way(partial(make, *args, **kwargs)))
    return shadows


def note_trust(trainer: pl.Trainer, shadows: Shadows, note: Callable[[bool], None]) -> None:
    """Have it noted, until shadows are released, whether what a Trainer loads is told to be read whatever it holds."""
    load = trainer.strategy.load_checkpoint

    def load_here(checkpoint_path: Any, **options: Any) -> dict[str, Any]:
        note(_is_trusted(**options))
        return load(checkpoint_path, **options)

    shadows.put(trainer.strategy, "load_checkpoint", load_here)


def save_straight(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint to a local file; Lightning itself puts the whole file together in memory first.

    Args:
        trainer: the Trainer; all its processes must call this.
        path: the file, which is not whole until this is over.
    """

    def save(checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:  # of a full disk Python says so; PyTorch, which may write to a path, does not
            torch.save(checkpoint, file)

    shadows = Shadows()
    shadows.put(trainer.strategy.checkpoint_io, "save_checkpoint", save)
    try:
        trainer.save_checkpoint(path)
    finally:
        shadows.release()


def calls_for_steps(trainer: pl.Trainer) -> bool:
    """Whether the strategy calls the model, as that of DDP does, when it wants its ``training_step``."""
    return is_a(trainer.strategy, "DDPStrategy")


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
        # DDP copies the first process' buffers before each forward pass. Those of dendrites are the same
        # in all: without them a model that has no others is spared that.
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", None)
        own = [name for name, _ in module.named_buffers() if is_common_key(name)]
        module._ddp_params_and_buffers_to_ignore = [*(ignored or ()), *own]
        try:
            strategy.configure_ddp()
        finally:
            if ignored is None:
                del module._ddp_params_and_buffers_to_ignore
            else:
                module._ddp_params_and_buffers_to_ignore = ignored
        strategy._pl_static_graph_delay_done = False


def wrap_only_trained(trainer: pl.Trainer, shadows: Shadows) -> None:
    """Have DDP not wrap a network of which nothing is trainable, until shadows are released: it refuses that.

    Args:
        trainer: the Trainer, about to set up its strategy.
        shadows: released when that is done.
    """
    strategy: Any = trainer.strategy
    if is_a(strategy, "DDPStrategy"):
        configure = strategy.configure_ddp

        def configure_if_trained() -> None:
            if any(parameter.requires_grad for parameter in trainer.lightning_module.parameters()):
                configure()

        shadows.put(strategy, "configure_ddp", configure_if_trained)


def has_communication_state(strategy: Any) -> bool:
    """Whether DDP has a communication hook that remembers gradients."""
    return getattr(strategy, "_ddp_comm_state", None) is not None


def validate(trainer: pl.Trainer) -> None:
    """Run a whole validation before the first batch of an epoch. Training draws the random numbers it would without.

    Args:
        trainer: the Trainer, which validates.
    """
    connector = trainer._logger_connector
    first, trainer.validating = connector._first_loop_iter, True
    with isolate_rng():
        trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training, connector._first_loop_iter = True, first


def no_validation(trainer: pl.Trainer) -> Shadows:
    """Have a Trainer not validate until this is released."""
    shadows = Shadows()
    shadows.put(trainer.fit_loop.epoch_loop, "_should_check_val_fx", lambda *_, **__: False)
    return shadows


def no_early_stopping(trainer: pl.Trainer) -> Shadows:
    """Have ``EarlyStopping`` not look at its metric until this is released."""
    shadows = Shadows()
    for callback in callbacks_of(trainer):
        if is_a(callback, "EarlyStopping"):
            shadows.put(callback, "_run_early_stopping_check", lambda *_, **__: None)
    return shadows
