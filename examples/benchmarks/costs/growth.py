"""How does the time of a step grow with dendrites, layers, neurons, pool and batch?

Each series is fitted by ``fixed + slope * size ** exponent``. An exponent of 1 is growth in proportion; the elementwise
part of a cascade alone has 2 over dendrites, so it is measured by itself, as a share of a step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from costs.networks import Make, mlp
from costs.steps import Key, Step, step_of, turns
from pl_dendrites.core.growth.block import cascade

WIDTH, BATCH = 512, 256


@dataclass(frozen=True)
class Series:
    """Milliseconds of a step over a size, and the fit."""

    over: str
    step: str
    sizes: list[int]
    milliseconds: list[float]
    exponent: float
    off_line: float  # the largest distance from the best straight line, as a share of the time


def sweeps() -> Iterable[tuple[str, str, dict[int, Step]]]:
    """The steps of every series: what grows, the step's name, and the steps by size."""

    def steps(make: Make, key: Key, shape: tuple[int, ...] = (BATCH, WIDTH)) -> Step:
        return step_of(key, make, torch.randn(shape))

    three: Make = lambda: mlp(WIDTH)  # noqa: E731
    base, pool = Key("base", 3), Key("correlation", 0, 4)
    for step in ("base", "inference", "gradient"):
        yield "dendrites", step, {k: steps(three, Key(step, k)) for k in (0, 1, 2, 3, 4, 6, 8)}
    yield "pool", "correlation", {size: steps(three, Key("correlation", 0, size)) for size in (1, 2, 4, 8, 16)}
    for key in (base, pool):
        yield "layers", key.step, {n: steps(lambda n=n: mlp(WIDTH, n), key) for n in (1, 2, 4, 8)}
        yield "batch", key.step, {n: steps(three, key, (n, WIDTH)) for n in (64, 128, 256, 512, 1024)}
        neurons = (128, 256, 512, 1024, 2048)
        yield "neurons", key.step, {n: steps(lambda n=n: nn.Linear(WIDTH, n), key) for n in neurons}


def series(repeats: int) -> list[Series]:
    found = []
    for over, step, steps in sweeps():
        # The shortest, not the median: what else the machine does can only add to a time, and a fit is of all of them.
        times = [1e3 * min(seconds) for seconds in turns(steps, repeats).values()]
        found.append(Series(over, step, list(steps), times, *fitted(list(steps), times)))
    return found


def fitted(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """The exponent of the best ``fixed + slope * size ** exponent``, and how far the times are off a straight line."""
    exponents = [step / 100 for step in range(50, 251)]
    best = min(exponents, key=lambda exponent: sum(off**2 for off in distances(sizes, times, exponent)))
    return best, max(map(abs, distances(sizes, times, 1.0)))


def distances(sizes: Sequence[int], times: Sequence[float], exponent: float) -> list[float]:
    """Of each time from the best fit with this exponent, as shares of the time; no fixed part is below zero."""
    powers = [size**exponent for size in sizes]
    weights = [1 / time**2 for time in times]
    mean_power = sum(w * p for w, p in zip(weights, powers, strict=True)) / sum(weights)
    mean_time = sum(w * t for w, t in zip(weights, times, strict=True)) / sum(weights)
    spread = sum(w * (p - mean_power) ** 2 for w, p in zip(weights, powers, strict=True))
    joint = sum(w * (p - mean_power) * (t - mean_time) for w, p, t in zip(weights, powers, times, strict=True))
    slope = joint / spread
    fixed = mean_time - slope * mean_power
    if fixed < 0:
        products = sum(w * p * t for w, p, t in zip(weights, powers, times, strict=True))
        slope, fixed = products / sum(w * p**2 for w, p in zip(weights, powers, strict=True)), 0.0
    return [(fixed + slope * p) / t - 1 for p, t in zip(powers, times, strict=True)]


def cascade_share(repeats: int, dendrites: int = 5) -> float:
    """The share of a base step that dendrites spend on seeing the earlier ones of their neuron."""
    torch.manual_seed(0)
    stacked = torch.randn(BATCH, dendrites * WIDTH)
    potentials = stacked.unflatten(1, (dendrites, WIDTH)).unbind(1)
    links = torch.randn(dendrites * (dendrites - 1) // 2, WIDTH)

    def with_links() -> None:
        with torch.no_grad():
            cascade(potentials, links, torch.tanh, -1)

    def without() -> None:
        for potential in potentials:
            torch.tanh(potential)

    x = torch.randn(BATCH, WIDTH)
    step = step_of(Key("base", dendrites), lambda: mlp(WIDTH), x)
    seconds = turns({"with": with_links, "without": without, "step": step}, repeats)
    shares = zip(seconds["with"], seconds["without"], seconds["step"], strict=True)
    return statistics.median(3 * (own - other) / whole for own, other, whole in shares)


def picture(found: Sequence[Series], path: Path) -> None:
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style.use(Path(__file__).parents[1] / "pictures.mplstyle")
    kinds = list(dict.fromkeys(one.over for one in found))
    figure = Figure(figsize=(3.2 * len(kinds), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for place, over in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        for one in found:
            if one.over == over:
                place.plot(one.sizes, one.milliseconds, "o-", label=f"{one.step}, exponent {one.exponent:.2f}")
        place.set_xlabel(over)
        place.set_ylim(0)
        place.set_xlim(0, math.nextafter(max(place.get_xlim()), math.inf))
        place.legend(fontsize="small")
    figure.supylabel("milliseconds a step")
    figure.savefig(path)
