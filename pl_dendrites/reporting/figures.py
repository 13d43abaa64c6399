"""Pictures of growth: the score over the epochs, phase by phase, and the correlations of the layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["DARK", "LIGHT", "Theme", "axes_of", "can_draw", "draw_correlations", "draw_growth", "pixels"]


class Theme(NamedTuple):
    """The colours of a figure, told apart by the colour-blind too, and by lightness in print."""

    ground: str
    ink: str
    soft: str
    kept: str
    rejected: str
    shade: str


LIGHT = Theme("#ffffff", "#1d2730", "#555555", "#1b5e9b", "#d9601a", "#dfe5ec")
DARK = Theme("#14191e", "#e4e9ed", "#aaaaaa", "#6db3f2", "#ff9a5c", "#2b343d")
_BEST: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (5, 4))}
_CONTROL: dict[str, Any] = {"linewidth": 1.6, "linestyle": (0, (1, 1.5))}
_SHORT = 10  # a curve of fewer scores is shown whole
_MOST_LAYERS = 40  # in one picture


def can_draw() -> bool:
    """Whether matplotlib, an optional dependency, is there."""
    return find_spec("matplotlib") is not None


def draw_growth(
    history: Sequence[Mapping[str, Any]],
    score_name: str,
    mode: Literal["min", "max"] = "min",
    theme: Theme = LIGHT,
    controls: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the score over the epochs, the correlation phases, and what became of each set of dendrites.

    Args:
        history: records of finished phases, at least one.
        score_name: what the vertical axis is called.
        mode: whether a good score is small or large.
        theme: the colours.
        controls: scores of plain networks by what these are called.

    Returns:
        A figure that no window and no global state of matplotlib knows of.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> from pl_dendrites.core.phases import PhaseMachine
        >>> from pl_dendrites.reporting.records import phase_record
        >>> figure = draw_growth([phase_record(PhaseMachine(), attach(nn.Linear(4, 2)), "training ended")], "loss")
        >>> pixels(figure).shape
        (690, 960, 3)
    """
    figure, axes = axes_of((6.4, 4.6), theme)
    for record, start in _with_starts(history):
        _draw_phase(axes, record, start, theme)
    best = history[-1]["best_score"]
    if best is not None:
        axes.axhline(best, color=theme.soft, **_BEST)
    for score in (controls or {}).values():
        axes.axhline(score, color=theme.ink, **_CONTROL)
    axes.set_title(_title(history), loc="left", pad=22, fontsize=13, fontweight="bold", color=theme.ink)
    axes.set_xlabel("epoch", fontsize=13)
    axes.set_ylabel(score_name, fontsize=13, parse_math=False)
    axes.set_xlim(0, max(1, sum(record["epochs"] for record in history)))
    _leave_out_the_start(axes, history, mode, list((controls or {}).values()))
    _draw_legend(axes, best, theme, controls or {})
    return figure


def draw_correlations(history: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> Figure:
    """Draw, for each layer and set of dendrites, the mean and the largest correlation at the end of its phase.

    Args:
        history: records of finished phases, at least one of a correlation phase that has correlations.
        theme: the colours.
    """
    sets = [record for record in history if record["correlation"]]
    layers = list(dict.fromkeys(name for record in sets for name in record["correlation"]))
    largest = {name: max(r["correlation"][name]["max"] for r in sets if name in r["correlation"]) for name in layers}
    shown = [name for name in layers if name in sorted(layers, key=largest.__getitem__)[-_MOST_LAYERS:]]
    figure, axes = axes_of((6.4, 1.3 + 0.14 * len(shown) * (len(sets) + 1)), theme)
    for row, name in enumerate(shown):
        for i, record in enumerate(sets):
            if name in record["correlation"]:
                values, at = record["correlation"][name], row + 0.8 * ((i + 0.5) / len(sets) - 0.5)
                axes.plot([values["mean"], values["max"]], [at, at], color=theme.kept, linewidth=1.6)
                axes.plot(values["mean"], at, "o", color=theme.kept, markersize=5)
                axes.plot(values["max"], at, "|", color=theme.kept, markersize=9, markeredgewidth=2)
                axes.annotate(
                    str(record["cycle"]), (1.01, at), xycoords=("axes fraction", "data"), va="center", color=theme.soft
                )
    axes.set_yticks(range(len(shown)), [name or "model" for name in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, min(1.0, 1.1 * max(largest.values())) or 1.0)
    axes.set_xlabel("correlation: mean (dot) to largest (bar); right: cycle", fontsize=12)
    axes.grid(axis="x", color=theme.shade)
    axes.set_axisbelow(True)
    return figure


def axes_of(size: tuple[float, float], theme: Theme) -> tuple[Figure, Axes]:
    """A figure with axes, which no window and no global state of matplotlib knows of.

    Args:
        size: width and height in inches.
        theme: the colours.
    """
    from matplotlib.figure import Figure

    # Large letters: TensorBoard shows pictures 300 pixels wide at first, and so do telephones.
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor=theme.ground)
    axes = figure.add_subplot(facecolor=theme.ground)
    axes.tick_params(labelsize=12, colors=theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.spines[["left", "bottom"]].set_color(theme.ink)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """A figure as pixels ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # By hand: pyplot would choose a backend for the whole process and keep the figure.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]  # type: ignore[no-untyped-call]


def _with_starts(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int]]:
    start = 0
    for record in history:
        yield record, start
        start += record["epochs"]


def _draw_phase(axes: Axes, record: Mapping[str, Any], start: int, theme: Theme) -> None:
    epochs, scores = record["epochs"], record["scores"]
    if record["phase"] == "correlation":
        axes.axvspan(start, start + epochs, color=theme.shade, linewidth=0)
        return
    colour = theme.rejected if record["accepted"] is False else theme.kept
    # A phase has its scores at equal distances, be they several in an epoch or one in several epochs.
    at = [start + (i + 1) * epochs / len(scores) for i in range(len(scores))]
    values = [float("nan") if score is None else score for score in scores]
    axes.plot(at, values, color=colour, linewidth=2.2, marker="o" if len(scores) == 1 else "", markersize=4)
    if record["accepted"] is not None:
        axes.axvline(start, color=colour, linewidth=2.2)
        axes.annotate(
            f"{record['dendrites']}",
            (start, 1.0),
            (0, 4),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=13,
            fontweight="bold",
        )


def _title(history: Sequence[Mapping[str, Any]]) -> str:
    verdicts = [record["accepted"] for record in history if record["accepted"] is not None]
    sets = f"{verdicts.count(True)} kept, {verdicts.count(False)} rejected" if verdicts else "none so far"
    return f"Sets of dendrites: {sets}"


def _leave_out_the_start(
    axes: Axes, history: Sequence[Mapping[str, Any]], mode: str, controls: Sequence[float]
) -> None:
    """Show the range that matters: the first epochs of all are so bad that every later gain would look flat."""
    values = sorted(score for record in history for score in record["scores"] if score is not None)
    if len(values) < _SHORT:
        return
    bad = len(values) // 10
    low, high = (values[0], values[-1 - bad]) if mode == "min" else (values[bad], values[-1])
    low, high = min([low, *controls]), max([high, *controls])
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _draw_legend(axes: Axes, best: float | None, theme: Theme, controls: Mapping[str, float]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=theme.kept, linewidth=2.2, label="base phase"),
        Line2D([], [], color=theme.rejected, linewidth=2.2, label="with a rejected set"),
        Patch(color=theme.shade, label="correlation phase"),
        Line2D([], [], color=theme.soft, marker="|", linewidth=0, markersize=13, mew=2.2, label="dendrites per neuron"),
    ]
    if best is not None:
        handles.insert(2, Line2D([], [], color=theme.soft, **_BEST, label=f"best {best:.4g}"))
    if controls:
        label = f"control {next(iter(controls.values())):.4g}" if len(controls) == 1 else "controls"
        handles.append(Line2D([], [], color=theme.ink, **_CONTROL, label=label))
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.16),
        ncols=2,
        frameon=False,
        fontsize=12,
        labelcolor=theme.ink,
    )
