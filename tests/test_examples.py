"""The examples run, and show what they promise."""

from __future__ import annotations

import gzip
import os
import random
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
    shown = run(Path("digits.py"), "--report", "page.html", cwd=tmp_path)
    assert re.search(r"\n +1 +1 .* yes ", shown), "no set was accepted"
    rows = dict(re.findall(r"(\d+ hidden neurons, (?:with dendrites|plain)) +test accuracy ([\d.]+)", shown))
    assert len(rows) == 3
    assert all(f"{name}</th>" in (tmp_path / "page.html").read_text() for name in [*rows][1:])
    assert float(rows["8 hidden neurons, with dendrites"]) > float(rows["8 hidden neurons, plain"])


# Every config in one process, for importing takes longer than the fits.
EACH_CONFIG = """
import sys
import cli

examples, *settings = sys.argv[1:]
for name, *more in (["diabetes"], ["characters"], ["letters", "--data.data_dir=."], ["letters"]):
    arguments = ["fit", "--config", f"{examples}/configs/{name}.yaml", *settings, *more]
    try:
        trainer = cli.main(arguments).trainer
    except FileNotFoundError as error:
        print(error)
    else:
        phases = [record["phase"] for record in trainer.callbacks[0].history]
        print(name, *phases, *sorted(trainer.callback_metrics))
"""
TINY = [
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_train_batches=3",
    *(f"--trainer.callbacks.{name}=1" for name in ("base_epochs", "max_correlation_epochs", "max_dendrites")),
]


@pytest.mark.timeout(300)
def test_each_config_of_the_command_line_example(tmp_path: Path) -> None:
    rng = random.Random(0)
    with gzip.open(tmp_path / "letter-recognition.csv.gz", "wt") as file:
        file.write("letter," + ",".join(f"x{i}" for i in range(16)) + "\n")
        for row in range(20_000):
            file.write(f"{chr(ord('A') + row % 26)},{','.join(str(rng.randrange(16)) for _ in range(16))}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])}
    command = [sys.executable, "-c", EACH_CONFIG, str(EXAMPLES), *TINY]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    for name, metric in (("diabetes", "absolute_error"), ("characters", "accuracy"), ("letters", "accuracy")):
        assert f"\n{name} base correlation base test_{metric} test_loss" in done.stdout
    assert "there is no 'data/letter-recognition.csv.gz': name the directory it is in with --data" in done.stdout


@pytest.mark.timeout(300)
def test_the_command_of_the_command_line_example(tmp_path: Path) -> None:
    config = EXAMPLES / "configs" / "digits.yaml"
    shown = run(Path("cli.py"), "fit", "--config", str(config), *TINY, cwd=tmp_path)
    assert re.search(r"\n +1 +1 +1,238 +1 \+ 1 ", shown)


@pytest.mark.slow
def test_two_spirals_are_solved_by_one_neuron(tmp_path: Path) -> None:
    shown = run(Path("two_spirals.py"), "--seeds", "10", "--picture", "regions.png", cwd=tmp_path)
    solved, mean = re.search(r"solved in (\d+) of 10 seeds with ([\d.]+)", shown).groups()
    assert int(solved) >= 9
    assert float(mean) <= 13
    assert (tmp_path / "regions.png").stat().st_size > 10_000
