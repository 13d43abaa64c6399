"""The callback's arguments: checks whose errors say what is allowed and what was given; and who gets which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pl_dendrites.core.checks import check, check_at_least, check_one_of
from pl_dendrites.core.growth.block import check_form

__all__ = ["Settings", "check_patterns"]

_BOUNDS: dict[str, float] = {
    "max_dendrites": 0,
    "candidates": 1,
    "candidate_batches": 1,
    "patience": 1,
    "min_delta": 0.0,
    "base_epochs": 1,
    "correlation_patience": 1,
    "correlation_min_delta": 0.0,
    "max_correlation_epochs": 1,
    "max_tries": 0,
}

# Arguments that are the phase machine's.
_DECIDE = (
    "mode",
    "max_dendrites",
    "patience",
    "min_delta",
    "min_delta_mode",
    "base_epochs",
    "correlation_patience",
    "max_correlation_epochs",
    "max_tries",
    "stop_on_overfit",
)
# Runs are compared by these and by those that are not at their default, but not by those of a run's surroundings.
_SHOWN, _NOT_SHOWN = ("candidates", "max_dendrites"), ("dirpath", "best_on", "optimizer", "verbose")


class Settings:
    """The arguments of a :class:`~pl_dendrites.DendriteCallback`, as those want them who work with them.

    Args:
        given: all of them by name.
        of: what they were given to; it knows the defaults.

    Attributes:
        monitor: the metric that decides.
        mode: whether a good score is small or large.
        targets: the layers that grow.
        exclude: taken out of ``targets``.
        next: what dendrites to come are like, for :meth:`~pl_dendrites.core.DendriticNetwork.set_next`.
        machine: of the :class:`~pl_dendrites.core.phases.PhaseMachine`.
        phase: of a :class:`~pl_dendrites.training.correlation_phase.CorrelationPhase`.
        record: what every record of the history says of the rule.
        shown: by which runs are told apart.
        by_gradient: whether there are no correlation phases.
        max_dendrites: most dendrites per neuron.
        correlation_min_delta: smallest rise of a correlation that counts, as a share of it.
        restart: whether each base phase starts with optimizers and schedulers as they were when the fit began.
        schedule_epochs: over which a schedule goes: those of a base phase, if they are known and each starts anew.
        dirpath: where to write the best network.
        best_on: whether it is in memory or on the disk alone.
        verbose: whether to say on the console what happens.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, given: Mapping[str, Any], of: Callable[..., Any]) -> None:
        _check(given)
        self.monitor: str = given["monitor"]
        self.mode: Literal["min", "max"] = given["mode"]
        self.targets, self.exclude = given["targets"], given["exclude"]
        self.by_gradient, live = given["learning"] == "gradient", given["learning"] != "correlation"
        self.next: dict[str, Any] = {
            "activation": given["activation"] or ("gelu" if live else "tanh"),
            "live": live,
            "fan_in": given["fan_in"],
            "share": given["share"],
        }
        self.machine: dict[str, Any] = {name: given[name] for name in _DECIDE} | {
            "score_name": given["monitor"],
            "correlation": not self.by_gradient,
            "sparse": given["fan_in"] is not None,
        }
        self.phase: dict[str, Any] = {
            "pool": given["candidates"],
            "batches": given["candidate_batches"],
            "optimizer": given["optimizer"],
            "validate": not given["skip_validation"],
        }
        self.record = {name: given[name] for name in ("monitor", "mode", "learning")}
        defaults = {name: parameter.default for name, parameter in signature(of).parameters.items()}
        changed = {name for name, value in given.items() if value != defaults[name]} - set(_NOT_SHOWN)
        self.shown = {name: given[name] for name in sorted(changed.union(_SHOWN))}
        self.max_dendrites: int = given["max_dendrites"]
        self.correlation_min_delta: float = given["correlation_min_delta"]
        self.schedule_epochs: int | None = given["base_epochs"] if given["restart"] else None
        self.restart, self.verbose = given["restart"], given["verbose"]
        self.dirpath, self.best_on = given["dirpath"], given["best_on"]


def check_patterns(name: str, value: object) -> None:
    """Raise ``ValueError`` unless a value is a list of texts, or a predicate.

    Example:
        >>> check_patterns("exclude", "head.*")
        Traceback (most recent call last):
        ValueError: `exclude` must be a list of names or patterns, got 'head.*'
    """
    texts = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) and v for v in value)
    check(name, texts or callable(value), "a list of names or patterns", value)


def _check(given: Mapping[str, Any]) -> None:
    monitor, optimizer, dirpath = given["monitor"], given["optimizer"], given["dirpath"]
    check("monitor", isinstance(monitor, str) and bool(monitor), "the name of a metric", monitor)
    check_one_of("mode", given["mode"], ("min", "max"))
    check_one_of("learning", given["learning"], ("correlation", "gradient", "hybrid"))
    check_one_of("min_delta_mode", given["min_delta_mode"], ("abs", "rel"))
    activation = given["activation"]
    check_form("tanh" if activation is None else activation, given["fan_in"])
    for name in ("targets", "exclude"):
        check_patterns(name, () if name == "targets" and given[name] is None else given[name])
    for name, bound in _BOUNDS.items():
        check_at_least(name, bound if name == "base_epochs" and given[name] is None else given[name], bound)
    share = given["share"]
    number = isinstance(share, int | float) and not isinstance(share, bool)
    check("share", number and 0 < share <= 1, "a number above 0 and up to 1", share)
    by_gradient = given["learning"] == "gradient"
    check("share", share == 1 or not by_gradient, "1 with learning='gradient', which knows no worth", share)
    check("optimizer", optimizer is None or callable(optimizer), "a callable", optimizer)
    check("dirpath", dirpath is None or (isinstance(dirpath, str | Path) and dirpath != ""), "a path", dirpath)
    check_one_of("best_on", given["best_on"], ("memory", "disk"))
    there = dirpath is not None and isinstance(fsspec.core.url_to_fs(str(dirpath))[0], LocalFileSystem)
    check("dirpath", there or given["best_on"] != "disk", "a local directory with best_on='disk'", dirpath)
    for name in ("skip_validation", "stop_on_overfit", "restart", "verbose"):
        check(name, isinstance(given[name], bool), "true or false", given[name])
