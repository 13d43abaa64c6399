"""Draws ``pictures/growing.svg``, the animation in the README, from a fit: ``python docs/growing.py``.

One neuron solves two spirals. A picture for each number of dendrites shows what the neuron had learned when its next
dendrite came. It moves by CSS alone, light and dark; whoever wants no motion sees the last picture.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from contourpy import contour_generator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.two_spirals import OneNeuron, solve, spirals

PICTURE = Path(__file__).resolve().parent / "pictures" / "growing.svg"
SEED, EDGE, GRID = 0, 7.2, 141
SIDE, LEFT = 320, 380  # of the plane: its size, and where it begins
UNSEEN = "{stroke-dashoffset:1;opacity:0;stroke:var(--new)}"
NEW, OLD = ("{stroke-dashoffset:0;opacity:1;stroke:var(--" + age + ")}" for age in ("new", "old"))
SECONDS, LAST = 0.9, 3.5  # that a picture stays, and the last one

STYLE = """
svg{--old:#1b5e9b;--new:#c2500f}.t,.n{fill:#1d2730}.s{fill:#5b6770}.q{fill:#fdeadd}.p{fill:#cfe2f5}.x{fill:#1b5e9b}
.y{fill:#c2500f}.d{stroke:var(--old);fill:none;stroke-linecap:round;stroke-dasharray:1}.a{stroke:#1d2730;fill:none}
text{font:15px system-ui,sans-serif}.b{font-weight:600;font-size:19px}
@media (prefers-color-scheme:dark){svg{--old:#6db3f2;--new:#ff9a5c}.t,.n{fill:#e4e9ed}.s{fill:#a3b0ba}.q{fill:#3d2a1c}
.p{fill:#1b3a57}.x{fill:#8cc4f7}.y{fill:#ff9a5c}.a{stroke:#e4e9ed}}
@media (prefers-reduced-motion:reduce){*{animation:none!important}}
"""


class Frame(NamedTuple):
    """What the neuron says of each point of the plane ``(GRID, GRID)``, and of how many it is wrong."""

    plane: Tensor
    wrong: int


class Watch(L.Callback):
    """Keeps the last frame of each number of dendrites."""

    def __init__(self) -> None:
        self.frames: dict[int, Frame] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what a base phase has come to."""
        if trainer.callbacks[0].phase == "base":
            self.see(pl_module)

    def see(self, model: Any) -> None:
        """Keep what the neuron says now."""
        axis = torch.linspace(-EDGE, EDGE, GRID)
        points, side = spirals()
        with torch.no_grad():
            plane = model.neuron(torch.cartesian_prod(axis, axis)).reshape(GRID, GRID).T
            wrong = int(((model.neuron(points) > 0) != (side > 0)).sum())
        self.frames[model.neuron.dendrites.count] = Frame(plane, wrong)


def region(plane: Tensor) -> str:
    """Where the neuron says yes, as a path of SVG."""
    steps = torch.linspace(0, SIDE, GRID).numpy()
    outlines, offsets = contour_generator(steps, steps, plane.numpy()).filled(0, math.inf)
    rings = [ring[start:end] for ring, cuts in zip(outlines, offsets, strict=True) for start, end in pairwise(cuts)]
    return "".join("M" + " ".join(f"{x:.0f},{SIDE - y:.0f}" for x, y in ring) + "z" for ring in rings)


def branch(number: int, count: int) -> list[str]:
    """A dendrite of the drawn neuron: a stem with two twigs, in the order in which they grow."""
    step = 5 if count % 5 else 3  # neighbours in time are not neighbours in place
    order = [i * step % count for i in range(count)]
    angle = math.radians(-200 + 220 * (order[number] + 0.5) / count)
    length = 92 + 34 * ((number * 7) % 3) / 2
    bend = 0.1 * (-1) ** number

    def at(radius: float, turn: float) -> tuple[float, float]:
        return 170 + radius * math.cos(angle + turn), 205 + radius * math.sin(angle + turn)

    def curve(start: tuple[float, float], by: tuple[float, float], end: tuple[float, float], width: float) -> str:
        points = " ".join(f"{value:.1f}" for point in (by, end) for value in point)
        return f'<path pathLength="1" stroke-width="{width}" d="M{start[0]:.1f} {start[1]:.1f}Q{points}"/>'

    fork = at(0.62 * length, 0.45 * bend)
    return [
        curve(at(24, 0), at(0.45 * length, bend), fork, 5.5),
        curve(fork, at(0.8 * length, 0.5 * bend), at(length + 14, 0.1), 3.5),
        curve(fork, at(0.8 * length, 0.5 * bend), at(length, -0.11), 3.5),
    ]


def moves(frames: int) -> str:
    """The rules of CSS by which pictures follow each other and dendrites grow."""
    whole = SECONDS * (frames - 1) + LAST
    rules = []
    for i in range(frames):
        start, end = (100 * SECONDS * moment / whole for moment in (i, i + 1))
        before = f"0%,{start:.2f}%{{opacity:0}}" if i else ""
        after = f"{end:.2f}%{{opacity:1}}{end + 0.01:.2f}%,to{{opacity:0}}" if i < frames - 1 else "to{opacity:1}"
        rules.append(f"@keyframes f{i}{{{before}{start + 0.01 if i else 0:.2f}%{{opacity:1}}{after}}}")
        rules.append(f".f{i}{{animation:f{i} {whole:.1f}s infinite;opacity:{int(i == frames - 1)}}}")
        rules.append(
            f"@keyframes g{i}{{0%,{start:.2f}%{UNSEEN}{start + 0.01:.2f}%{{opacity:1}}{(start + end) / 2:.2f}%{NEW}"
        )
        rules.append(
            f"{end - 1:.2f}%{NEW}{end:.2f}%,to{OLD}}}.g{i} path{{animation:g{i} {whole:.1f}s infinite backwards}}"
        )
    rules.append(".d path+path{animation-delay:.35s!important}")
    return "".join(rules)


def picture(frames: list[Frame]) -> str:
    """The animation."""
    last = len(frames) - 1
    points, side = spirals()
    at = (points / EDGE + 1) * SIDE / 2
    dots = "".join(
        f'<circle class="{"x" if yes else "y"}" cx="{x:.1f}" cy="{SIDE - y:.1f}" r="2.6"/>'
        for (x, y), yes in zip(at.tolist(), (side[:, 0] > 0).tolist(), strict=True)
    )
    planes = "".join(f'<path class="p f{i}" d="{region(frame.plane)}"/>' for i, frame in enumerate(frames))
    words = "".join(
        f'<g class="f{i}" text-anchor="middle"><text class="t b" x="170" y="330">dendrites: {i}</text>'
        f'<text class="s" x="170" y="352">{frame.wrong} of {len(points)} points wrong</text></g>'
        for i, frame in enumerate(frames)
    )
    grown = "".join(f'<g class="d g{i}">{"".join(branch(i - 1, last))}</g>' for i in range(1, last + 1))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 366" role="img">'
        f"<title>One neuron grows {last} dendrites, one after the other, until it tells two spirals apart</title>"
        f"<style>{STYLE}{moves(len(frames))}</style>"
        f'{grown}<path class="a" stroke-width="5" d="M170 232Q168 262 172 300"/>'
        f'<circle class="n" cx="170" cy="205" r="30"/>{words}'
        f'<svg x="{LEFT}" y="20" width="{SIDE}" height="{SIDE}" viewBox="0 0 {SIDE} {SIDE}">'
        f'<clipPath id="c"><rect width="{SIDE}" height="{SIDE}" rx="10"/></clipPath>'
        f'<g clip-path="url(#c)"><rect class="q" width="{SIDE}" height="{SIDE}"/>{planes}</g>{dots}</svg></svg>\n'
    )


def main() -> None:
    """Fit, and draw."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    watch = Watch()
    model: OneNeuron = solve(SEED, watch)[0]
    watch.see(model)
    frames = [watch.frames[count] for count in sorted(watch.frames)]
    PICTURE.write_text(picture(frames), encoding="utf-8")


if __name__ == "__main__":
    main()
