"""A picture of a comparison: results over parameters, and how far plain networks come."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

from pl_dendrites.comparing.runs import Run
from pl_dendrites.comparing.verdict import Mode
from pl_dendrites.reporting.figures import LIGHT, Theme, axes_of, can_draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "frontier"]

_MARKERS = {"dendrites": "o", "plain": "s", "restarted": "D", "wider": ">", "deeper": "^", "pruned": "v", "sparse": "P"}
_LABELS = {"dendrites": "with dendrites", "restarted": "plain, restarted", "wider": "as large", "deeper": "deeper"}
_PLAIN = ("plain", "restarted", "wider", "deeper")

Point = tuple[float, float]


def draw(metric: str, mode: Mode | None, runs: Sequence[Run], theme: Theme = LIGHT) -> Figure:
    """Draw the result of each network over its parameters: mean and standard deviation over the seeds.

    Args:
        metric: name of the result.
        mode: whether a good one is small or large; ``None``: not known, and there is no frontier.
        runs: of all networks and seeds.
        theme: the colours.

    Returns:
        A figure that no window and no global state of matplotlib knows of.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    if not can_draw():
        raise ModuleNotFoundError('a plot needs matplotlib, which draws: pip install "pl-dendrites[figures]"')
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = axes_of((6.4, 4.8), theme)
    labelled: set[str] = set()
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        kind, results = own[0].kind, [run.result for run in own]
        grown = kind == "dendrites"
        axes.errorbar(
            *_point(own),
            yerr=stdev(results) if len(own) > 1 else 0.0,
            fmt=_MARKERS.get(kind, "x"),
            color=theme.kept if grown else theme.ink if kind in _PLAIN else theme.rejected,
            markersize=9 if grown else 6,
            capsize=4,
            zorder=3,
            label="_" if kind in labelled else _LABELS.get(kind, kind),
        )
        labelled.add(kind)
        if grown:
            axes.annotate(
                name,
                _point(own),
                (-9, 7),
                textcoords="offset points",
                ha="right",
                color=theme.kept,
                fontsize=11,
                parse_math=False,
            )
    line = [] if mode is None else frontier(runs, mode)
    if line:
        right = max(_point([run])[0] for run in runs)
        at = ([x for x, _ in line] + [right], [y for _, y in line] + [line[-1][1]])
        axes.plot(*at, color=theme.soft, drawstyle="steps-post", linewidth=1.4, label="best plain network up to a size")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters", fontsize=13)
    axes.set_ylabel(metric, fontsize=13, parse_math=False)
    seeds = len({run.seed for run in runs})
    if seeds > 1:
        axes.set_title(f"mean and standard deviation over {seeds} seeds", loc="left", fontsize=12, color=theme.soft)
    axes.margins(0.12)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=12, labelcolor=theme.ink
    )
    return figure


def frontier(runs: Sequence[Run], mode: Mode) -> list[Point]:
    """Parameters and results of the plain networks that none smaller is as good as, in the mean over seeds.

    Args:
        runs: of all networks and seeds.
        mode: whether a good result is small or large.

    Example:
        >>> found = [("plain", 10, 0.5), ("wider", 30, 0.4), ("restarted", 10, 0.45), ("deeper", 40, 0.41)]
        >>> frontier([Run(kind, 0, result, 0.0, size, 1, 1.0, 0, 0, 0, kind) for kind, size, result in found], "min")
        [(10, 0.45), (30, 0.4)]
    """
    sign = 1 if mode == "min" else -1
    plain = [run for run in runs if run.kind in _PLAIN]
    points = [_point([run for run in plain if run.name == name]) for name in dict.fromkeys(run.name for run in plain)]
    best: list[Point] = []
    for size, result in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * result < sign * best[-1][1]:
            best.append((size, result))
    return best


def _point(runs: Sequence[Run]) -> Point:
    return mean(run.parameters for run in runs), mean(run.result for run in runs)
