"""Draws ``pictures/house.svg`` from the imports of the package: ``python docs/house.py``, or ``--check`` to compare.

A room is a folder; a band across holds rooms that stand on the same floor. An arrow says that a room imports another.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "house.svg"
LEAVES = {"activations", "checks", "keys", "markup", "tensors"}  # of the core, which all may use

WIDTH, LINE, HEAD, PAD, GAP = 760, 17, 46, 14, 34
STYLE = """
.g{fill:#f6f8fa}.t{fill:#1d2730}.s{fill:#5b6770}.n{fill:#fff;stroke:#1d2730;stroke-width:1.6}
.w{stroke:#1b5e9b;stroke-width:1.6;fill:none;opacity:.75}.k{fill:#1b5e9b}
text{font:15px system-ui,sans-serif}.m{font-size:12.5px}.h{font-weight:600}
@media (prefers-color-scheme:dark){.g{fill:#1d242b}.t{fill:#e4e9ed}.s{fill:#a3b0ba}.n{fill:#14191e;stroke:#e4e9ed}
.w{stroke:#6db3f2}.k{fill:#6db3f2}}
"""
SAYS = {
    "pl_dendrites": "what a user imports, and one fit",
    "comparing": "a comparison, apart from its fits",
    "reporting": "what people see",
    "training": "the Trainer's side",
    "controls": "what could do as well",
    "saved": "what is saved, how it returns",
    "exporting": "files for other machines",
    "core": "dendrites of a model; torch alone",
    "core/growth": "what hangs on a layer",
    "core/fusing": "a layer in plain PyTorch",
    "core/rule": "what candidates learn",
    "core/fields": "what shared dendrites see",
    "core/kinds": "a kind of layer each",
    "core (leaves)": "what all may use",
}


def room_of(module: str) -> str:
    """The room of a module by its full name."""
    _, *folders, name = module.split(".")
    if folders == ["core"] and name in LEAVES:
        return "core (leaves)"
    return "/".join(folders) or "pl_dendrites"


def read() -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The files of each room, and the rooms that each imports."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "pl_dendrites").rglob("*.py")
    }
    files: dict[str, list[str]] = {}
    arrows: dict[str, set[str]] = {}
    for module, path in sorted(paths.items()):
        room, name = room_of(module), module.rpartition(".")[2]
        arrows.setdefault(room, set())
        if name == "__init__":
            continue  # it hands on what its room has
        files.setdefault(room, []).append(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pl_dendrites"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    # A folder named as a whole is its room.
                    inner = next((m for m in (whole, node.module, f"{node.module}.__init__") if m in paths), whole)
                    arrows[room].add(room_of(inner))
    return files, {room: others - {room} for room, others in arrows.items()}


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The rooms by floor, the top one first: each stands above all that it imports."""
    height: dict[str, int] = {}
    while len(height) < len(arrows):
        ready = [room for room in arrows if room not in height and arrows[room] <= height.keys()]
        if not ready:
            raise SystemExit(f"imports run in a circle among {sorted(arrows.keys() - height.keys())}")
        for room in ready:
            height[room] = 1 + max((height[other] for other in arrows[room]), default=-1)
    return [sorted(r for r in height if height[r] == level) for level in range(max(height.values()), -1, -1)]


def rows_of(names: list[str], width: float) -> list[str]:
    """Names in lines that fit."""
    rows = [""]
    for name in names:
        longer = f"{rows[-1]} · {name}" if rows[-1] else name
        if len(longer) * 6.6 > width - 2 * PAD:
            rows.append(name)
        else:
            rows[-1] = longer
    return rows


def draw() -> str:
    """The picture as SVG."""
    files, arrows = read()
    shapes, places, y = [], {}, float(PAD)
    levels = floors(arrows)
    for level in levels:
        width = (WIDTH - PAD * (len(level) + 1)) / len(level)
        inner = [rows_of(files[room], width) for room in level]
        height = HEAD + LINE * max(map(len, inner)) + PAD / 2
        for i, (room, rows) in enumerate(zip(level, inner, strict=True)):
            x = PAD + i * (width + PAD)
            places[room] = (x, y, width, height)
            title = room if room == "core (leaves)" else f"{room}/"
            shapes.append(f'<rect class="n" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>')
            shapes.append(
                f'<text x="{x + PAD:g}" y="{y + 23:g}"><tspan class="t h">{title}</tspan>'
                f'<tspan class="s" dx="10">{SAYS[room]}</tspan></text>'
            )
            shapes += [
                f'<text class="s m" x="{x + PAD:g}" y="{y + HEAD + LINE * j:g}">{row}</text>'
                for j, row in enumerate(rows)
            ]
        y += height + GAP
    lines = []
    for room in (room for level in levels for room in level):
        # All that a room reaches by way of another is not drawn: the picture would say less.
        beyond = {far for near in arrows[room] for far in reach(near, arrows)}
        for other in sorted(arrows[room] - beyond):
            x, top, width, height = places[room]
            ox, otop, owidth, _ = places[other]
            start = x + width / 2 if width <= owidth else ox + owidth / 2
            lines.append(f'<path class="w" marker-end="url(#k)" d="M{start:g} {top + height:g} V{otop - 2:g}"/>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - GAP + PAD:g}" role="img">'
        "<title>The rooms of the package and what they import; arrows run down</title>\n"
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="k" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"'
        ' markerUnits="userSpaceOnUse"><path class="k" d="M0 0 8 4 0 8z"/></marker></defs>\n'
        f'<rect class="g" width="{WIDTH}" height="{y - GAP + PAD:g}" rx="10"/>\n'
        + "\n".join([*lines, *shapes])
        + "\n</svg>\n"
    )


def reach(room: str, arrows: dict[str, set[str]]) -> set[str]:
    """All rooms that one imports, directly or not."""
    return arrows[room] | {far for near in arrows[room] for far in reach(near, arrows)}


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PICTURE.read_text(encoding="utf-8") != draw() and "docs/pictures/house.svg is old: run docs/house.py")
    PICTURE.write_text(draw(), encoding="utf-8")
