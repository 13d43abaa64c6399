"""Whether dendrites did better than other networks, in a sentence, as far as the seeds allow one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import NormalDist, mean, stdev
from typing import Literal, NamedTuple

from pl_dendrites.comparing.runs import Run

__all__ = ["AS_LARGE", "Interval", "Mode", "interval", "mode_of", "verdict"]

Mode = Literal["min", "max"]
AS_LARGE = ("wider", "deeper", "pruned", "sparse")
_SMALL_IS_GOOD = {"loss", "error", "err", "mse", "mae", "rmse", "nll", "perplexity"}
_LARGE_IS_GOOD = {"acc", "accuracy", "f1", "auc", "auroc", "r2", "iou", "dice", "precision", "recall"}
_PARTS = ("train", "val", "valid", "validation", "test")
_EXACT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


class Interval(NamedTuple):
    """A mean over seeds, and where the true one is with 95 % confidence: anywhere, where there is one seed."""

    mean: float
    low: float
    high: float


def mode_of(metric: str, monitored: Mapping[str, Mode]) -> Mode | None:
    """Whether a good result is small or large, by its name; ``None`` where that says nothing.

    Args:
        metric: what is tested.
        monitored: whether good scores are small or large, by what is monitored.

    Example:
        >>> (
        ...     mode_of("test_gain", {"val_gain": "max"}),
        ...     mode_of("test/mse", {}),
        ...     mode_of("test_gain", {"val_loss": "min"}),
        ... )
        ('max', 'min', None)
    """
    words = _words(metric)
    for name, mode in monitored.items():
        if _words(name) == words:
            return mode
    if _SMALL_IS_GOOD & set(words):
        return "min"
    return "max" if _LARGE_IS_GOOD & set(words) else None


def _words(metric: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word not in _PARTS]


def interval(values: Sequence[float]) -> Interval:
    """The mean of a few values and its 95 % interval, by Student's t.

    Args:
        values: one for each seed.

    Example:
        >>> [round(value, 3) for value in interval([0.1, 0.2, 0.3])]
        [0.2, -0.048, 0.448]
    """
    middle = mean(values)
    half = _student(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Interval(middle, middle - half, middle + half)


def _student(freedom: int) -> float:
    # The 97.5 % quantile: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.5.
    if freedom in _EXACT:
        return _EXACT[freedom]
    z = NormalDist().inv_cdf(0.975)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return math.fsum(term / float(freedom) ** power for power, term in enumerate(terms))


def verdict(metric: str, mode: Mode | None, runs: Sequence[Run]) -> str:
    r"""What all runs say of each network with dendrites, a sentence each.

    Each stands beside the plain network that was trained as long, and the best of those that are as large. What is
    compared is an error: the result, or one less the result where large ones are good; by its ratio, seed by seed, or
    by the difference of results where errors are not all positive.

    Args:
        metric: name of the result.
        mode: whether a good one is small or large.
        runs: of all networks and seeds.

    Example:
        >>> def trained(kind, seed, result):
        ...     return Run(kind, seed, result, result, 100, 9, 1.0, 0, 0, 400, kind)
        >>> runs = [trained("dendrites", seed, 0.2) for seed in (0, 1)] + [trained("restarted", s, 0.4) for s in (0, 1)]
        >>> print(verdict("loss", "min", runs).replace("; ", "\n").replace(". ", ".\n"))
        2 seeds: loss of 'dendrites' (100 parameters) is 0.5 times that of 'restarted' (100 parameters
        0.5 to 0.5 with 95 % confidence): better.
        No network as large was trained, which might have done as well: see `wider`.
    """
    if mode is None:
        return f"Whether a good {metric} is small or large is not known: `mode` says so, and then there is a verdict."
    grown = dict.fromkeys(run.name for run in runs if run.kind == "dendrites")
    return "\n".join(_sentence(metric, mode, runs, name) for name in grown)


def _sentence(metric: str, mode: Mode, runs: Sequence[Run], name: str) -> str:
    own = _named(runs, name)
    others = [
        _named(runs, run.name)
        for run in runs
        if run.kind in AS_LARGE and run.beside == name and run.seed == own[0].seed
    ]
    restarted = [run for run in runs if run.kind == "restarted"]
    best = min(others, key=lambda other: mean(_error(run, mode) for run in other), default=[])
    beside = [other for other in (restarted, best) if other]
    ratios = all(_error(run, mode) > 0 for each in (own, *beside) for run in each)
    what = f"1 - {metric}" if ratios and mode == "max" else metric
    said = "; ".join(_beside(own, other, mode, ratios) for other in beside)
    seeds = "One seed" if len(own) == 1 else f"{len(own)} seeds"
    alone = "" if best else " No network as large was trained, which might have done as well: see `wider`."
    return f"{seeds}: {what} of {name!r} ({_size(own)}) is {said}.{alone}"


def _beside(own: Sequence[Run], other: Sequence[Run], mode: Mode, ratios: bool) -> str:
    pairs = list(zip(own, other, strict=True))
    if ratios:
        found = interval([math.log(_error(a, mode) / _error(b, mode)) for a, b in pairs])
        middle, low, high = (f"{math.exp(value):.3g}" for value in found)
        text = f"{middle} times that of"
    else:
        found = interval([a.result - b.result for a, b in pairs])
        middle, low, high = (f"{value:+.3g}" for value in found)
        text = f"{middle} beside that of"
    bounds = f"; {low} to {high} with 95 % confidence" if len(pairs) > 1 else ""
    return (
        f"{text} {other[0].name!r} ({_size(other)}{bounds}): {_conclusion(found, mode == 'min' or ratios, len(pairs))}"
    )


def _conclusion(found: Interval, small_is_good: bool, seeds: int) -> str:
    if seeds == 1:
        return "one seed has no spread and allows no verdict"
    if found.low <= 0 <= found.high:
        return f"no difference that {seeds} seeds can show"
    return "better" if (found.high < 0) == small_is_good else "worse"


def _error(run: Run, mode: Mode) -> float:
    return run.result if mode == "min" else 1 - run.result


def _size(runs: Sequence[Run]) -> str:
    return f"{mean(run.parameters for run in runs):,.0f} parameters"


def _named(runs: Sequence[Run], name: str) -> list[Run]:
    return [run for run in runs if run.name == name]
