"""Would a wider network, or the same one trained for longer, have done as well? The controls beside the dendrites."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng

from pl_dendrites.callback import DendriteCallback
from pl_dendrites.core.cost import parameter_count

__all__ = ["Comparison", "Run", "closest_width", "compare"]

_QUIET = {
    "max_epochs": -1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_WIDEST = 2**20


@dataclass(frozen=True)
class Run:
    """One network of a comparison, trained and tested.

    Attributes:
        name: what was compared: ``"plain"``, ``"plain, restarted"``, ``"with dendrites"`` or ``"wider, restarted"``; of
            several settings, the name of each and ``"as large as NAME, restarted"``.
        seed: of the run.
        result: the metric on test data, which is read once.
        score: the best one on validation data, which decided when to stop and what to keep.
        parameters: of the network that was kept.
        epochs: of all its fits together.
        seconds: of these, wall clock.
        dendrites: per neuron.
        tries: sets of dendrites that were tried.
    """

    name: str
    seed: int
    result: float
    score: float
    parameters: int
    epochs: int
    seconds: float
    dendrites: int
    tries: int


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; printed, it is a table.

    Attributes:
        metric: name of the metric on test data.
        runs: one for every network and seed.
    """

    metric: str
    runs: tuple[Run, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Every run as a dict of plain values, as for JSON."""
        return [asdict(run) for run in self.runs]

    def __str__(self) -> str:
        """A row for every network: mean and standard deviation over the seeds."""
        names = list(dict.fromkeys(run.name for run in self.runs))
        width = max(map(len, names))
        lines = [f"{'':{width}}  {self.metric:>18}  parameters  epochs  seconds"]
        for name in names:
            runs = [run for run in self.runs if run.name == name]
            results = [run.result for run in runs]
            spread = f" ± {statistics.stdev(results):.2g}" if len(runs) > 1 else ""
            result = f"{statistics.mean(results):.4g}{spread}"
            means = [statistics.mean(getattr(run, key) for run in runs) for key in ("parameters", "epochs", "seconds")]
            lines.append(f"{name:{width}}  {result:>18}  {means[0]:10,.0f}  {means[1]:6.0f}  {means[2]:7.1f}")
        return "\n".join(lines)


def compare(
    model: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    dendrites: Mapping[str, Any] | Mapping[str, Mapping[str, Any]],
    metric: str,
    *,
    wider: Callable[[int], pl.LightningModule] | None = None,
    seeds: int = 3,
    trainer: Mapping[str, Any] | None = None,
) -> Comparison:
    """Train a model as it is, with dendrites, and with as many parameters in a wider network.

    All stop by the rule of :class:`~pl_dendrites.DendriteCallback`, by their validation score, and are tested once with
    the best weights. Restarts alone can help, and so can longer training: the controls are restarted from their best
    weights, with fresh optimizers, as often as sets of dendrites were tried and until they have had as many epochs, and
    the best network of all these fits is tested.

    Args:
        model: makes the model.
        data: makes its data, with a test part.
        dendrites: arguments of the ``DendriteCallback``, or several such by what they are to be called. The plain model
            is then trained as much as the one that took most, by the arguments of the first.
        metric: what the model logs in ``test_step``.
        wider: makes the model with a width; the width whose parameters come closest to those of the network with
            dendrites is taken, for each of several settings. ``None``: no such control, and no honest answer to whether
            width would have done.
        seeds: the whole is run with seeds 0, 1, ...
        trainer: settings of the Trainer, added to ``max_epochs=-1`` and no output. Every fit gets a copy of what is in
            them, for callbacks and loggers remember the fits they saw.

    Returns:
        All runs.

    Raises:
        ValueError: if ``seeds`` is not positive, or no width makes ``wider`` large enough.
        MisconfigurationException: if the metric is not logged in ``test_step``; lists those that are. If ``trainer``
            ends a first fit before it was validated.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> class Model(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.step(batch))
        ...
        ...     def test_step(self, batch, batch_idx):
        ...         self.log("test_loss", self.step(batch))
        >>> comparison = compare(
        ...     Model,
        ...     BoringDataModule,
        ...     {"monitor": "val_loss", "base_epochs": 1, "max_correlation_epochs": 1, "max_dendrites": 1},
        ...     metric="test_loss",
        ...     seeds=1,
        ...     trainer={"limit_train_batches": 2, "limit_val_batches": 2},
        ... )
        >>> [run.name for run in comparison.runs]
        ['plain', 'with dendrites', 'plain, restarted']
    """
    if seeds < 1:
        raise ValueError(f"`seeds` must be at least 1, got {seeds}")
    several = bool(dendrites) and all(isinstance(value, Mapping) for value in dendrites.values())
    settings: Mapping[str, Mapping[str, Any]] = dendrites if several else {"with dendrites": dendrites}
    fits = _Fits(data, metric, {**_QUIET, **(trainer or {})})
    first = _none(next(iter(settings.values())))
    runs = []
    with _seeds_aside():
        for seed in range(seeds):
            grown = [fits.run(name, seed, model, arguments) for name, arguments in settings.items()]
            runs += [fits.run("plain", seed, model, first), *grown]
            runs.append(fits.run("plain, restarted", seed, model, first, beside=grown))
            if wider is not None:
                runs += _wider(fits, wider, grown, settings)
    return Comparison(metric, tuple(runs))


def _none(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {**arguments, "max_dendrites": 0}


def _wider(
    fits: _Fits,
    wider: Callable[[int], pl.LightningModule],
    grown: Sequence[Run],
    settings: Mapping[str, Mapping[str, Any]],
) -> list[Run]:
    def count(width: int) -> int:
        with isolate_rng():
            return parameter_count(wider(width))

    runs = []
    for run in grown:
        name = f"as large as {run.name}, restarted" if len(grown) > 1 else "wider, restarted"
        arguments, width = _none(settings[run.name]), closest_width(count, run.parameters)
        runs.append(fits.run(name, run.seed, partial(wider, width), arguments, beside=[run]))
    return runs


@contextmanager
def _seeds_aside() -> Iterator[None]:
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
class _Fits:
    data: Callable[[], pl.LightningDataModule]
    metric: str
    settings: dict[str, Any]

    def run(
        self,
        name: str,
        seed: int,
        make: Callable[[], pl.LightningModule],
        arguments: Mapping[str, Any],
        *,
        beside: Sequence[Run] = (),
    ) -> Run:
        pl.seed_everything(seed, workers=True, verbose=False)
        model, data = make(), self.data()
        restarts = max((run.tries for run in beside), default=0)
        long_enough = max((run.epochs for run in beside), default=0)
        start, fits, epochs, trained = time.perf_counter(), 0, 0, True
        best: float | None = None
        # A limit on time may end fits before their first epoch does: more of them would not add up.
        while fits <= restarts or (trained and epochs < long_enough):
            callback = DendriteCallback(**arguments)
            settings = copy.deepcopy(self.settings)
            users = settings.pop("callbacks", None) or []
            callbacks = [*(users if isinstance(users, Sequence) else [users]), callback]
            trainer = pl.Trainer(**settings, callbacks=callbacks)
            trainer.fit(model, datamodule=data)
            fits, epochs, trained = fits + 1, epochs + trainer.current_epoch, trainer.current_epoch > 0
            score = callback.best_model_score
            if score is not None and (best is None or (score > best if callback.mode == "max" else score < best)):
                best, weights = score, copy.deepcopy(model.state_dict())
            elif best is None:
                raise MisconfigurationException(
                    f"`trainer`: the fit of {name!r} ended before its first validation; give it more epochs or time"
                )
            else:
                model.load_state_dict(weights)
        assert best is not None
        seconds = time.perf_counter() - start
        logged = {
            key: value for found in trainer.test(model, datamodule=data, verbose=False) for key, value in found.items()
        }
        if self.metric not in logged:
            raise MisconfigurationException(
                f"`metric`: {self.metric!r} is not logged in test_step; logged are {sorted(logged)}"
            )
        return Run(
            name=name,
            seed=seed,
            result=float(logged[self.metric]),
            score=best,
            parameters=parameter_count(model),
            epochs=epochs,
            seconds=seconds,
            dendrites=callback.num_dendrites,
            tries=max(record["cycle"] for record in callback.history),
        )


def closest_width(count: Callable[[int], int], parameters: int) -> int:
    """The width whose network comes closest to so many parameters.

    Args:
        count: the parameters of a network with a width; more for a larger one.
        parameters: that are asked for.

    Returns:
        A width of at least 1; of two that are equally close, the smaller one.

    Raises:
        ValueError: if no width is large enough.

    Example:
        >>> closest_width(lambda width: 43 * width + 26, 3108)
        72
    """
    high = 1
    while count(high) < parameters:
        if high >= _WIDEST:
            raise ValueError(f"`wider` has {count(high)} parameters at a width of {high}, and is to have {parameters}")
        high *= 2
    low = high // 2 + 1 if high > 1 else 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(middle) < parameters else (low, middle)
    return min(range(max(low - 1, 1), low + 1), key=lambda width: abs(count(width) - parameters))
