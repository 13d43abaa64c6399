"""The report: tables in Markdown, with pictures beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from costs.compiled import Gain
from costs.growth import Series
from costs.memory import Peak
from costs.peer import PeerRow
from costs.steps import Row


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    names = [name.strip() for name in head.split("|")]
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps(rows: Sequence[Row]) -> str:
    return table(
        "network | step | dendrites | pool | times plain | limit | over the limit",
        (
            (
                r.network,
                r.step,
                r.dendrites,
                r.pool or "",
                f"{r.ratio:.2f}",
                f"{r.limit:.2f}",
                f"{r.ratio / r.limit:.2f}",
            )
            for r in rows
        ),
    )


def memory(peaks: Sequence[Peak]) -> str:
    return table(
        "network | step | dendrites | pool | peak, MB | times plain | over what it needs",
        (
            (
                *(p.network, p.step, p.dendrites, p.pool or ""),
                *(f"{p.peak / 1e6:.2f}", f"{p.ratio:.2f}", "" if p.needed is None else f"{p.peak / p.needed:.2f}"),
            )
            for p in peaks
        ),
    )


def compiled(gains: Sequence[Gain]) -> str:
    return table(
        "network | dendrites | training step, ms | compiled, ms | times as fast",
        ((g.network, g.dendrites, f"{g.milliseconds:.2f}", f"{g.compiled:.2f}", f"{g.gain:.2f}") for g in gains),
    )


def growth(found: Sequence[Series]) -> str:
    return table(
        "over | step | sizes | milliseconds | exponent | off a straight line",
        (
            (
                *(one.over, one.step, ", ".join(map(str, one.sizes))),
                *(", ".join(f"{time:.3g}" for time in one.milliseconds), f"{one.exponent:.2f}", f"{one.off_line:.0%}"),
            )
            for one in found
        ),
    )


def peer(rows: Sequence[PeerRow]) -> str:
    return table(
        "network | dendrites | peer's step, times plain | our gradient step over it | our frozen base step over it"
        " | peer's switch, s | with its pictures, s",
        (
            (
                *(r.network, r.dendrites, f"{r.ratio:.2f}", f"{r.gradient / r.ratio:.2f}", f"{r.base / r.ratio:.2f}"),
                *(f"{r.switch_seconds:.2f}", f"{r.switch_seconds_drawing:.2f}"),
            )
            for r in rows
        ),
    )


def once(times: dict[str, float]) -> str:
    return table("what happens once | takes", ((name, f"{value:.3g}") for name, value in times.items()))


def picture(rows: Sequence[Row], path: Path) -> None:
    """Times plain over dendrites, each step with its limit as a dashed line."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style.use(Path(__file__).parents[1] / "pictures.mplstyle")
    networks = list(dict.fromkeys(row.network for row in rows))
    figure = Figure(figsize=(3.2 * len(networks), 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    for place, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        for color, step in zip(("C0", "C1", "C2"), ("base", "gradient", "inference"), strict=True):
            own = [row for row in rows if (row.network, row.step) == (network, step)]
            dendrites = [row.dendrites for row in own]
            place.plot(dendrites, [row.ratio for row in own], "o-", color=color, label=step)
            place.plot(dendrites, [row.limit for row in own], "--", color=color)
        place.set_title(network)
        place.set_xlabel("dendrites per neuron")
        place.set_ylim(0)
    figure.supylabel("times plain; dashed: limit")
    figure.legend(loc="outside lower center", ncols=3, handles=place.get_lines()[::2])
    figure.savefig(path)
