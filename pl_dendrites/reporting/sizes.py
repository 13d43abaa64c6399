"""The score over the parameters: what each size that a fit passed is worth, beside plain networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pl_dendrites.reporting.figures import LIGHT, Theme, axes_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["best_of_each_size", "draw_sizes"]

Record = Mapping[str, Any]


def best_of_each_size(history: Sequence[Record], mode: Literal["min", "max"] = "min") -> list[Record]:
    """Of each size that a fit passed the base phase with the best score, the smallest first.

    Args:
        history: records of phases.
        mode: whether a good score is small or large.

    Example:
        >>> found = [(10, 0.5), (20, 0.3), (20, 0.4), (30, None)]
        >>> history = [{"phase": "base", "parameters": size, "score": score} for size, score in found]
        >>> [record["score"] for record in best_of_each_size(history)]
        [0.5, 0.3]
    """
    best: dict[int, Record] = {}
    for record in history:
        size, score = record["parameters"], record["score"]
        if record["phase"] == "base" and score is not None:
            before = best.get(size)
            if before is None or (score > before["score"] if mode == "max" else score < before["score"]):
                best[size] = record
    return [best[size] for size in sorted(best)]


def draw_sizes(
    history: Sequence[Record],
    score_name: str,
    mode: Literal["min", "max"] = "min",
    theme: Theme = LIGHT,
    controls: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Draw the best score of each size over its parameters; a line joins those that none smaller is as good as.

    Args:
        history: records of phases, at least one of a base phase with a score.
        score_name: what the vertical axis is called.
        mode: whether a good score is small or large.
        theme: the colours.
        controls: plain networks by what these are called; those without ``parameters`` are left out.
    """
    figure, axes = axes_of((6.4, 4.6), theme)
    sizes = best_of_each_size(history, mode)
    front = _better_than_all_smaller(sizes, mode)
    axes.plot(*_points(front), color=theme.kept, linewidth=2.2, marker="o", markersize=7, label="grown")
    rest = [record for record in sizes if record not in front]
    if rest:
        label = "no better than a smaller one"
        axes.plot(*_points(rest), "o", color=theme.rejected, markersize=7, fillstyle="none", mew=2, label=label)
    left = [record for record in sizes if record["score"] == history[-1]["best_score"]][:1]
    axes.plot(
        *_points(left), "o", color=theme.ink, markersize=15, fillstyle="none", mew=1.6, label="what the fit leaves"
    )
    plain = {name: control for name, control in (controls or {}).items() if "parameters" in control}
    if plain:
        axes.plot(*_points(list(plain.values())), "s", color=theme.ink, markersize=7, label="control")
    for name, control in plain.items():
        at = (control["parameters"], control["score"])
        axes.annotate(name, at, (7, 5), textcoords="offset points", color=theme.ink, fontsize=11, parse_math=False)
    axes.set_xscale("log")
    axes.set_xlabel("parameters", fontsize=13)
    axes.set_ylabel(score_name, fontsize=13, parse_math=False)
    axes.margins(0.12)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=12, labelcolor=theme.ink
    )
    return figure


def _better_than_all_smaller(sizes: Sequence[Record], mode: str) -> list[Record]:
    front: list[Record] = []
    for record in sizes:
        if not front or (
            record["score"] > front[-1]["score"] if mode == "max" else record["score"] < front[-1]["score"]
        ):
            front.append(record)
    return front


def _points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [record["parameters"] for record in records], [record["score"] for record in records]
