"""The networks of a comparison: which there are, what each needs, and how it is trained."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.seed import isolate_rng

from pl_dendrites.comparing import Job, Run, Tell
from pl_dendrites.controls import Stages, closest_width, pruned, sparse, weights_of
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.trials import Trials, without_dendrites

__all__ = ["Control", "Factory", "Fitted", "check_widths", "plan", "rehearse"]

Factory = Callable[[int], pl.LightningModule]
# What a control is called, and beside one of several networks with dendrites.
_NAMES = {
    "wider": ("wider, restarted", "as large as {}, restarted"),
    "deeper": ("deeper, restarted", "deeper, as large as {}, restarted"),
    "pruned": ("pruned", "pruned, as large as {}"),
    "sparse": ("sparse", "sparse, as large as {}"),
}
_STAGES: dict[str, Stages] = {"pruned": pruned, "sparse": sparse}
_SOME_WIDTHS = (1, 2, 3)


@dataclass(frozen=True)
class Fitted:
    """A network that the user's own function makes, with dendrites or without.

    Attributes:
        trials: that train it.
        kind: of the run.
        name: of it.
        seed: of it.
        make: makes the model.
        arguments: of the callback.
        needs: names of the runs that it is trained as much as.
    """

    trials: Trials
    kind: str
    name: str
    seed: int
    make: Callable[[], pl.LightningModule]
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()

    def train(self, beside: Sequence[Run], tell: Tell) -> Run:
        """See :class:`~pl_dendrites.comparing.Job`."""
        trials = replace(self.trials, tell=tell)
        return replace(trials.restarted(self.name, self.seed, self.make, self.arguments, beside=beside), kind=self.kind)


@dataclass(frozen=True)
class Control:
    """A network beside one with dendrites: of a width that goes by its parameters, restarted or in stages.

    Attributes:
        trials: that train it.
        kind: of the run.
        name: of it.
        seed: of it.
        factory: makes the model with a width.
        named: what the user calls that.
        arguments: of the callback of the network with dendrites.
        needs: the name of that network alone.
        times: parameters to begin with, of those that are left.
        stages: fits that leave some of its weights zero; ``None``: it is restarted.
    """

    trials: Trials
    kind: str
    name: str
    seed: int
    factory: Factory
    named: str
    arguments: Mapping[str, Any]
    needs: tuple[str, ...]
    times: float
    stages: Stages | None

    def train(self, beside: Sequence[Run], tell: Tell) -> Run:
        """See :class:`~pl_dendrites.comparing.Job`."""
        trials, (grown,) = replace(self.trials, tell=tell), beside
        width = self._closest(grown.parameters) if self.stages is None else self._dense(grown.parameters)
        make = partial(self.factory, width)
        if self.stages is None:
            run = trials.restarted(self.name, self.seed, make, without_dendrites(self.arguments), beside=beside)
        else:
            run = trials.in_stages(self.name, grown, make, self.stages, self.arguments)
        return replace(run, kind=self.kind, beside=grown.name, width=width)

    def _closest(self, parameters: int) -> int:
        return closest_width(
            lambda width: parameter_count(_made(self.factory, self.named, width)), parameters, self.named
        )

    def _dense(self, left: int) -> int:
        width = self._closest(round(self.times * left))
        # What is no weight stays: of a small network it must leave some room.
        return max(bisect_right(range(1, width + 1), left // 2, key=self._beside_weights), 1)

    def _beside_weights(self, width: int) -> int:
        model = _made(self.factory, self.named, width)
        return parameter_count(model) - sum(weight.numel() for weight in weights_of(model).values())


def _made(factory: Factory, named: str, width: int) -> pl.LightningModule:
    with isolate_rng():
        try:
            return factory(width)
        except Exception as error:
            raise ValueError(
                f"`{named}` made no model of width {width} ({type(error).__name__}: {error}). It gets one number"
                f" and must take any from 1 on: where only some widths do, count in steps of these, as in"
                f" `{named}=lambda width: MyModel(hidden=8 * width)`"
            ) from error


def check_widths(factory: Factory, named: str) -> None:
    """Make a few small networks, of widths that have no divisor in common.

    Args:
        factory: makes a model with a width.
        named: what the user calls it.

    Raises:
        ValueError: if it makes none, or one that is no larger where it is wider.
    """
    sizes = [parameter_count(_made(factory, named, width)) for width in _SOME_WIDTHS]
    if sizes != sorted(sizes):
        raise ValueError(
            f"`{named}` must make a larger network of a larger width; of {_SOME_WIDTHS} it has {sizes} parameters"
        )


def plan(
    trials: Trials,
    *,
    model: Callable[[], pl.LightningModule],
    settings: Mapping[str, Mapping[str, Any]],
    factories: Mapping[str, Factory],
    cut: Iterable[str],
    dense: float,
    seeds: Iterable[int],
) -> list[Job]:
    """All networks, each after those that it needs.

    Args:
        trials: that train them.
        model: makes the model.
        settings: arguments of the callback, by what a network is called.
        factories: makes a model with a width, by the kind of control.
        cut: kinds of controls some of whose weights are zero, which ``factories["wider"]`` makes.
        dense: their parameters to begin with, of those that are left.
        seeds: of the runs.

    Raises:
        ValueError: if two networks have one name.
    """
    first, jobs = without_dendrites(next(iter(settings.values()))), list[Job]()
    for seed in seeds:
        fitted = partial(Fitted, trials, seed=seed, make=model)
        jobs.append(fitted("plain", "plain", arguments=first))
        jobs += [fitted("dendrites", name, arguments=arguments) for name, arguments in settings.items()]
        jobs.append(fitted("restarted", "plain, restarted", arguments=first, needs=tuple(settings)))
        for kind in (*factories, *cut):
            named, stages = (kind, None) if kind in factories else ("wider", _STAGES[kind])
            times = 1.0 if stages is None else dense
            for name, arguments in settings.items():
                called = _NAMES[kind][len(settings) > 1].format(name)
                make = factories[named]
                jobs.append(Control(trials, kind, called, seed, make, named, arguments, (name,), times, stages))
    names = [(job.seed, job.name) for job in jobs]
    twice = sorted({name for seed, name in names if names.count((seed, name)) > 1})
    if twice:
        raise ValueError(f"`dendrites`: {twice[0]!r} is what another network is called; choose another name")
    return jobs


def rehearse(jobs: Sequence[Job]) -> None:
    """Train and test each network for a batch, so that what cannot be compared is known before the first long fit.

    Args:
        jobs: of one seed, whose Trainers run for a batch.

    Raises:
        Exception: whatever fails.
    """
    done: dict[str, Run] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that are too short
        for job in jobs:
            run = job.train([done[name] for name in job.needs], _tell_nobody)
            done[job.name] = replace(run, parameters=run.parameters + 1)  # controls will have to be larger


def _tell_nobody(fit: int, epochs: int) -> None:
    pass
