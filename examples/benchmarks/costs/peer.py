"""The open peer on the same networks, in a process and an environment of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from costs.steps import Row

SCRIPT = Path(__file__).parents[1] / "peer_speed.py"


@dataclass(frozen=True)
class PeerRow:
    """The peer's step by gradient learning, and ours, each times the plain step of its own process."""

    network: str
    dendrites: int
    ratio: float
    gradient: float
    base: float
    switch_seconds: float
    switch_seconds_drawing: float


def measure(python: str, rows: Sequence[Row], repeats: int) -> list[PeerRow]:
    """Run the peer on those of our networks that it is measured on.

    Args:
        python: of an environment that has the peer.
        rows: what was measured of ours.
        repeats: as for ours.
    """
    own = {(row.network, row.step, row.dendrites): row.ratio for row in rows if row.pool == 0}
    networks = [name for name in dict.fromkeys(row.network for row in rows) if name.startswith("mlp-")]
    if not networks:
        return []
    quiet, drawing = run(python, networks, repeats), run(python, networks, 1, "--drawing")
    return [
        PeerRow(
            name := row["network"],
            k := row["dendrites"],
            row["ratio"],
            own[name, "gradient", k],
            own[name, "base", k],
            row["switch_seconds"],
            drawn["switch_seconds"],
        )
        for row, drawn in zip(quiet, drawing, strict=True)
    ]


def run(python: str, networks: Sequence[str], repeats: int, *more: str) -> list[dict]:
    command = [python, str(SCRIPT), "--networks", *networks, "--repeats", str(repeats), *more]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
