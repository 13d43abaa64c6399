"""The fits of a comparison: a network after another, each from its seed to its result on test data."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from pl_dendrites.callback import DendriteCallback
from pl_dendrites.comparing import Run, Tell
from pl_dendrites.controls import Stages, parameters_left, saved_bytes

__all__ = ["Trials", "seeds_aside", "without_dendrites"]

_QUIET = {
    "max_epochs": -1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
# What of a callback's arguments says how a network is trained that does not grow.
_OF_THE_SCORE = ("monitor", "mode", "min_delta", "min_delta_mode", "verbose")


def without_dendrites(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a callback that trains a network by the same rule, and adds nothing to it."""
    return {**arguments, "max_dendrites": 0}


def _for_epochs(arguments: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    # A schedule that asks the Trainer for its length goes over these epochs.
    scored = {name: arguments[name] for name in _OF_THE_SCORE if name in arguments}
    return {**scored, "form": "private", "max_dendrites": 0, "base_epochs": epochs}


@contextmanager
def seeds_aside() -> Iterator[None]:
    """Within the block, seeds are set; afterwards the caller's random numbers are what they were."""
    # Lightning keeps its seed in the environment too, for processes to come.
    before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    try:
        with isolate_rng():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@dataclass(frozen=True)
class Trials:
    """Trains and tests networks, each with data, a Trainer and callbacks of its own.

    Attributes:
        data: makes the data.
        metric: what the model logs in ``test_step``.
        trainer: settings of each Trainer.
        tell: is told after each epoch which fit of a network it was, and how many epochs there were in all.
    """

    data: Callable[[], pl.LightningDataModule]
    metric: str
    trainer: Mapping[str, Any]
    tell: Tell | None = None

    def restarted(
        self,
        name: str,
        seed: int,
        make: Callable[[], pl.LightningModule],
        arguments: Mapping[str, Any],
        *,
        beside: Sequence[Run] = (),
    ) -> Run:
        """Fit a network, and again from its best weights until it was trained as much as others.

        Args:
            name: of the run.
            seed: of it.
            make: makes the model.
            arguments: of the callback.
            beside: the others: as many restarts as the most sets they tried, and at least as many epochs.
        """
        trial = _Trial(self, name, seed, make)
        restarts = max((run.tries for run in beside), default=0)
        long_enough = max((run.epochs for run in beside), default=0)
        trained = True
        # A limit on time may end fits before their first epoch does: more of them would not add up.
        while trial.fits <= restarts or (trained and trial.epochs < long_enough):
            trained = trial.fit(arguments) > 0
        return trial.tested()

    def in_stages(
        self,
        name: str,
        grown: Run,
        make: Callable[[], pl.LightningModule],
        stages: Stages,
        arguments: Mapping[str, Any],
    ) -> Run:
        """Train a network to as many parameters as another, for as many epochs.

        Args:
            name: of the run.
            grown: the other.
            make: makes the dense model.
            stages: one of the controls, such as :func:`~pl_dendrites.controls.pruned`.
            arguments: of the callback, of which those count that tell a better score.
        """
        trial = _Trial(self, name, grown.seed, make)
        for stage in stages(trial.model, grown.parameters, grown.epochs):
            trial.forget()  # what was larger, or not trained
            trial.fit(_for_epochs(arguments, stage.epochs), stage.callbacks)
        return trial.tested()


@contextmanager
def _interruptible() -> Iterator[None]:
    # Lightning exits when it is interrupted, and is deaf to it from then on. Who compares may want to go on.
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise  # it was told to end
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


class _Told(pl.Callback):
    # Tells how far a network is.

    def __init__(self, tell: Tell, fit: int, epochs: int) -> None:
        self._tell, self._fit, self._epochs = tell, fit, epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(self._fit, self._epochs + trainer.current_epoch + 1)


class _Trial:
    # One network: its fits, and the best weights that one of them left.

    def __init__(self, trials: Trials, name: str, seed: int, make: Callable[[], pl.LightningModule]) -> None:
        self._trials, self._name, self._seed = trials, name, seed
        pl.seed_everything(seed, workers=True, verbose=False)
        self.model, self._data = make(), trials.data()
        self._start, self.fits, self.epochs = time.perf_counter(), 0, 0
        self.forget()

    def forget(self) -> None:
        self._best: float | None = None
        self._weights: dict[str, Any] = {}

    def fit(self, arguments: Mapping[str, Any], callbacks: Sequence[pl.Callback] = ()) -> int:
        """Returns the epochs that it took."""
        self._callback = callback = DendriteCallback(**{"verbose": False, **arguments})
        settings = copy.deepcopy(dict(self._trials.trainer))
        users = settings.pop("callbacks", None) or []
        users = users if isinstance(users, Sequence) else [users]
        told = [_Told(self._trials.tell, self.fits + 1, self.epochs)] if self._trials.tell else []
        self._trainer = trainer = pl.Trainer(**{**_QUIET, **settings}, callbacks=[*users, *callbacks, callback, *told])
        with _interruptible():
            trainer.fit(self.model, datamodule=self._data)
        self.fits, self.epochs = self.fits + 1, self.epochs + trainer.current_epoch
        score, best = callback.best_model_score, self._best
        if score is None and trainer.fast_dev_run:  # type: ignore[attr-defined]
            score = math.nan  # one batch may say nothing
        if score is not None and (best is None or (score > best if callback.mode == "max" else score < best)):
            self._best, self._weights = score, copy.deepcopy(self.model.state_dict())
        elif best is None:
            raise MisconfigurationException(
                f"`trainer`: the fit of {self._name!r} ended before its first validation; give it more epochs or time"
            )
        else:
            self.model.load_state_dict(self._weights)
        return trainer.current_epoch

    def tested(self) -> Run:
        assert self._best is not None
        seconds, metric = time.perf_counter() - self._start, self._trials.metric
        with _interruptible():
            found = self._trainer.test(self.model, datamodule=self._data, verbose=False)
        logged = {key: value for part in found for key, value in part.items()}
        if metric not in logged:
            raise MisconfigurationException(
                f"`metric`: {metric!r} is not logged in test_step; logged are {sorted(logged)}"
            )
        return Run(
            name=self._name,
            seed=self._seed,
            result=float(logged[metric]),
            score=self._best,
            parameters=parameters_left(self.model),
            epochs=self.epochs,
            seconds=seconds,
            dendrites=self._callback.num_dendrites,
            tries=max(record["cycle"] for record in self._callback.history),
            bytes=saved_bytes(self.model),
        )
