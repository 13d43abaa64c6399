"""Would another network, or the same one trained for longer, have done as well? The controls beside the dendrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from pl_dendrites.comparing import (
    Comparison,
    Folder,
    Key,
    Progress,
    Run,
    Workers,
    in_order,
    mode_of,
    question,
    quiet,
)
from pl_dendrites.controls import closest_width
from pl_dendrites.plan import Factory, check_widths, plan, rehearse
from pl_dendrites.trials import Trials, seeds_aside

__all__ = ["Comparison", "Run", "closest_width", "compare"]

# Arguments of callbacks and Trainers that say what is shown and kept, and change no result.
_OF_NO_RESULT = (
    "dirpath",
    "verbose",
    "logger",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
)


def compare(
    model: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    dendrites: Mapping[str, Any] | Mapping[str, Mapping[str, Any]],
    metric: str,
    *,
    wider: Factory | None = None,
    deeper: Factory | None = None,
    pruned: bool = False,
    sparse: bool = False,
    dense: float = 4.0,
    seeds: int = 3,
    trainer: Mapping[str, Any] | None = None,
    dirpath: str | Path | None = None,
    workers: int = 1,
    mode: Literal["min", "max"] | None = None,
    verbose: bool = True,
) -> Comparison:
    """Train a model as it is, with dendrites, and other networks with as many parameters.

    All stop by the rule of :class:`~pl_dendrites.DendriteCallback`, by their validation score, and are tested once with
    the best weights. Restarts alone can help, and so can longer training: networks that are plain are restarted from
    their best weights, with fresh optimizers, as often as sets of dendrites were tried and until they have had as many
    epochs, and the best network of all these fits is tested. Networks some of whose weights are zero have just as many
    that are not as the network with dendrites has parameters, and are trained for as many epochs in all.

    Before the first long fit every network is trained and tested for one batch, as by Lightning's ``fast_dev_run``, so
    that a metric which nothing logs, or a width that ``wider`` cannot make, is known at once.

    Args:
        model: makes the model.
        data: makes its data, with a test part.
        dendrites: arguments of the ``DendriteCallback``, or several such by what they are to be called. The plain model
            is then trained as much as the one that took most, by the arguments of the first. ``verbose`` is ``False``
            here unless it is among them.
        metric: what the model logs in ``test_step``.
        wider: makes the model with a width; the width whose parameters come closest to those of the network with
            dendrites is taken, for each of several settings. ``None``: no such control, and no honest answer to whether
            width would have done.
        deeper: the same with one more hidden layer, say; ``None``: no such control.
        pruned: whether to cut a large network down: trained whole for two sevenths of the epochs, then without the
            smallest of all its weights, in four cuts; every fit between begins with fresh optimizers and from the best
            weights of the last. See :func:`~pl_dendrites.controls.pruned`.
        sparse: whether to train a large network that is sparse from the start, with weights that move: RigL, see
            :func:`~pl_dendrites.controls.sparse`.
        dense: how large that large network is, which ``wider`` makes: so many times the parameters that are left, or
            less where its biases and what else is no weight would take more than half of these.
        seeds: the whole is run with seeds 0, 1, ...
        trainer: settings of the Trainer, added to ``max_epochs=-1`` and no output. Every fit gets a copy of what is in
            them, for callbacks and loggers remember the fits they saw.
        dirpath: a folder for finished runs, a JSON file each. The same call goes on from there after it was
            interrupted; more ``seeds`` or controls may be asked for then. ``None``: nothing is kept.
        workers: networks that are trained at a time, each in a process of its own with its share of PyTorch's threads.
            Results are those of one process with so many threads. Models and data must then be made by classes or
            functions of a module, which a new process can import.
        mode: whether a good result is small or large, for the verdict; ``None``: what the monitor of the same name
            says, or the name itself (a loss, an accuracy).
        verbose: say which network is trained and how long the rest will take: by a bar on a terminal, elsewhere, and
            where ``trainer`` enables bars of its own, in a line for each finished network.

    Returns:
        All runs.

    Raises:
        ValueError: if ``seeds`` or ``workers`` is not positive, ``dense`` not above 1, ``pruned`` or ``sparse`` have no
            ``wider``, two networks have one name, or a width makes no network, or none as large as it must be. If
            ``dirpath`` has runs of another comparison; says what differs. If a process cannot be sent what it needs.
        MisconfigurationException: if the metric is not logged in ``test_step``, or a monitor not at all; lists those
            that are. If ``trainer`` ends a first fit before it was validated.
        RuntimeError: if a network fails in a process of its own; has all that it said.

    Example:
        >>> from torch import nn
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
        >>> class Model(BoringModel):
        ...     def __init__(self, width=1):
        ...         super().__init__()
        ...         self.layer = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 2))
        ...
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
        ...     wider=Model,
        ...     pruned=True,
        ...     seeds=1,
        ...     trainer={"limit_train_batches": 2, "limit_val_batches": 2},
        ...     verbose=False,
        ... )
        >>> [run.name for run in comparison.runs]
        ['plain', 'with dendrites', 'plain, restarted', 'wider, restarted', 'pruned']
    """
    _check(seeds, workers, dense, wider, pruned or sparse)
    several = bool(dendrites) and all(isinstance(value, Mapping) for value in dendrites.values())
    settings: Mapping[str, Mapping[str, Any]] = dendrites if several else {"with dendrites": dendrites}
    factories = {kind: make for kind, make in (("wider", wider), ("deeper", deeper)) if make is not None}
    cut = [kind for kind, asked in (("pruned", pruned), ("sparse", sparse)) if asked]
    trials = Trials(data, metric, dict(trainer or {}))
    planned = partial(plan, model=model, settings=settings, factories=factories, cut=cut, dense=dense)
    jobs = planned(trials, seeds=range(seeds))
    with ExitStack() as stack:
        stack.enter_context(seeds_aside())
        stack.enter_context(quiet())
        for named, factory in factories.items():
            check_widths(factory, named)
        folder, done = None, dict[Key, Run]()
        if dirpath is not None:
            folder = Folder(dirpath, _question(model, trials, factories, settings, dense if cut else None))
            done = {(job.seed, job.name): run for job in jobs if (run := folder.runs().get((job.seed, job.name)))}
        bar = not trials.trainer.get("enable_progress_bar")
        progress = Progress(jobs, done, workers=workers, kept_in=dirpath, verbose=verbose, bar=bar)
        stack.enter_context(progress)
        left, train = len(jobs) - len(done), in_order
        if left and workers > 1:
            # Begun before the rehearsal: they have much to import, and a script that cannot be imported fails at once.
            train = stack.enter_context(Workers(jobs, workers, left)).train
        if left:
            progress.say("each network is tried for a batch")
            rehearse(planned(replace(trials, trainer={**trials.trainer, "fast_dev_run": True}), seeds=[0]))
        for run in train(jobs, done, progress):
            if folder is not None:
                folder.add(run)
            progress.end(run, metric)
            done[run.seed, run.name] = run
    monitored = {own["monitor"]: own.get("mode", "min") for own in settings.values()}
    return Comparison(metric, tuple(done[job.seed, job.name] for job in jobs), mode or mode_of(metric, monitored))


def _check(seeds: int, workers: int, dense: float, wider: Factory | None, cut: bool) -> None:
    if seeds < 1:
        raise ValueError(f"`seeds` must be at least 1, got {seeds}")
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}")
    if not dense > 1:
        raise ValueError(f"`dense` must be above 1, got {dense}")
    if cut and wider is None:
        raise ValueError("`pruned` and `sparse` begin with a network that `wider` makes, and there is none")


def _question(
    model: Callable[[], pl.LightningModule],
    trials: Trials,
    factories: Mapping[str, Factory],
    settings: Mapping[str, Mapping[str, Any]],
    dense: float | None,
) -> dict[str, Any]:
    return question(
        model,
        trials.data,
        factories,
        metric=trials.metric,
        dendrites={name: _without(arguments, _OF_NO_RESULT) for name, arguments in settings.items()},
        trainer=_without(trials.trainer, _OF_NO_RESULT),
        **({} if dense is None else {"dense": dense}),
    )


def _without(arguments: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}
