"""A picture of growth: the score over the epochs, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["can_draw", "draw_growth", "pixels"]

# Told apart by the colour-blind too, and by lightness in print.
_KEPT, _REJECTED, _CORRELATION = "#1b5e9b", "#d9601a", "#dfe5ec"
_BEST: dict[str, Any] = {"color": "#555555", "linewidth": 1.2, "linestyle": (0, (5, 4))}
_SHORT = 10  # a curve of fewer scores is shown whole


def can_draw() -> bool:
    """Whether matplotlib, an optional dependency, is there."""
    return find_spec("matplotlib") is not None


def draw_growth(history: Sequence[Mapping[str, Any]], score_name: str, mode: Literal["min", "max"] = "min") -> Figure:
    """Draw the score over the epochs, the correlation phases, and what became of each set of dendrites.

    Args:
        history: records of finished phases, at least one.
        score_name: what the vertical axis is called.
        mode: whether a good score is small or large.

    Returns:
        A figure that no window and no global state of matplotlib knows of.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> from pl_dendrites.core.phases import PhaseMachine
        >>> from pl_dendrites.history import phase_record
        >>> figure = draw_growth([phase_record(PhaseMachine(), attach(nn.Linear(4, 2)), "training ended")], "loss")
        >>> pixels(figure).shape
        (690, 960, 3)
    """
    from matplotlib.figure import Figure

    # Large letters: TensorBoard shows pictures 300 pixels wide at first.
    figure = Figure(figsize=(6.4, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for record, start in _with_starts(history):
        _draw_phase(axes, record, start)
    best = history[-1]["best_score"]
    if best is not None:
        axes.axhline(best, **_BEST)
    axes.set_title(_title(history), loc="left", pad=22, fontsize=13, fontweight="bold")
    axes.set_xlabel("epoch", fontsize=13)
    axes.set_ylabel(score_name, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.set_xlim(0, max(1, sum(record["epochs"] for record in history)))
    _leave_out_the_start(axes, history, mode)
    axes.spines[["top", "right"]].set_visible(False)
    _draw_legend(axes, best)
    return figure


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


def _draw_phase(axes: Axes, record: Mapping[str, Any], start: int) -> None:
    epochs, scores = record["epochs"], record["scores"]
    if record["phase"] == "correlation":
        axes.axvspan(start, start + epochs, color=_CORRELATION, linewidth=0)
        return
    colour = _REJECTED if record["accepted"] is False else _KEPT
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


def _leave_out_the_start(axes: Axes, history: Sequence[Mapping[str, Any]], mode: str) -> None:
    """Show the range that matters: the first epochs of all are so bad that every later gain would look flat."""
    values = sorted(score for record in history for score in record["scores"] if score is not None)
    if len(values) < _SHORT:
        return
    bad = len(values) // 10
    low, high = (values[0], values[-1 - bad]) if mode == "min" else (values[bad], values[-1])
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _draw_legend(axes: Axes, best: float | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=_KEPT, linewidth=2.2, label="base phase"),
        Line2D([], [], color=_REJECTED, linewidth=2.2, label="with a rejected set"),
        Patch(color=_CORRELATION, label="correlation phase"),
        Line2D([], [], color="#777777", marker="|", linewidth=0, markersize=13, mew=2.2, label="dendrites per neuron"),
    ]
    if best is not None:
        handles.insert(2, Line2D([], [], **_BEST, label=f"best {best:.4g}"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2, frameon=False, fontsize=12)
