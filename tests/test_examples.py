"""The examples run, and show what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(path: Path, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True, timeout=1500)
    return done.stdout


@pytest.mark.timeout(300)
def test_digits_grows_and_shows_its_controls(tmp_path: Path) -> None:
    shown = run(Path("digits.py"), cwd=tmp_path)
    assert re.search(r"\n +1 +1 .* yes ", shown), "no set was accepted"
    rows = dict(re.findall(r"(\d+ hidden neurons, (?:with dendrites|plain)) +test accuracy ([\d.]+)", shown))
    assert len(rows) == 3
    assert float(rows["8 hidden neurons, with dendrites"]) > float(rows["8 hidden neurons, plain"])


@pytest.mark.slow
def test_two_spirals_are_solved_by_one_neuron(tmp_path: Path) -> None:
    shown = run(Path("two_spirals.py"), "--seeds", "10", "--picture", "regions.png", cwd=tmp_path)
    solved, mean = re.search(r"solved in (\d+) of 10 seeds with ([\d.]+)", shown).groups()
    assert int(solved) >= 9
    assert float(mean) <= 13
    assert (tmp_path / "regions.png").stat().st_size > 10_000
