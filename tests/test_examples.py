"""The examples run, and show what they promise."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(path: Path, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True, timeout=1500)
    return done.stdout


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports an example into this process: in another one, importing takes longer than tiny fits."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what an example seeds is no other test's
    return importlib.import_module


def assert_has_controls(shown: str, page: Path) -> dict[str, str]:
    """What the example with digits shows; returns the accuracies by name."""
    assert re.search(r"\n +1 +1 .* yes ", shown), "no set was accepted"
    rows = dict(re.findall(r"(\d+ hidden neurons, (?:with dendrites|plain)) +test accuracy ([\d.]+)", shown))
    assert len(rows) == 3
    assert all(f"{name}</th>" in page.read_text() for name in [*rows][1:])
    return rows


@pytest.mark.long
@pytest.mark.timeout(300)
def test_digits_grows_and_shows_its_controls(tmp_path: Path) -> None:
    rows = assert_has_controls(run(Path("digits.py"), "--report", "page.html", cwd=tmp_path), tmp_path / "page.html")
    assert float(rows["8 hidden neurons, with dendrites"]) > float(rows["8 hidden neurons, plain"])


def test_digits_shows_its_controls_however_short_its_phases(
    here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = here("digits")

    def short(*args: Any, max_dendrites: int, **kwargs: Any) -> Any:
        of_phases = {"base_epochs": 1 if max_dendrites else None, "max_correlation_epochs": 1}
        return callback(*args, max_dendrites=min(max_dendrites, 1), **{**kwargs, **of_phases})

    callback = digits.DendriteCallback
    monkeypatch.setattr(digits, "DendriteCallback", short)
    monkeypatch.setattr(sys, "argv", ["digits.py", "--report", "page.html"])
    digits.main()
    assert_has_controls(capsys.readouterr().out, Path("page.html"))


@pytest.mark.long
def test_shared_dendrites_stand_beside_plain_networks(
    here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shared.py", "--seeds", "1", "--epochs", "1"])
    here("shared").main()
    rows = re.findall(
        r"^(shared dendrites|plain, \d+ hidden neurons) +([\d,]+) parameters", capsys.readouterr().out, re.M
    )
    assert rows[1] == ("shared dendrites", "870")
    assert [parameters for name, parameters in rows if name.startswith("plain")] == ["610", "1,210", "2,410"]


TINY = [
    "--trainer.enable_progress_bar=false",
    "--trainer.limit_train_batches=3",
    *(f"--trainer.callbacks.{name}=1" for name in ("base_epochs", "max_correlation_epochs", "max_dendrites")),
]


@pytest.mark.timeout(300)
def test_each_config_of_the_command_line_example(here: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    with gzip.open(tmp_path / "letter-recognition.csv.gz", "wt") as file:
        file.write("letter," + ",".join(f"x{i}" for i in range(16)) + "\n")
        for row in range(20_000):
            file.write(f"{chr(ord('A') + row % 26)},{','.join(str(rng.randrange(16)) for _ in range(16))}\n")

    def fit(name: str, *more: str) -> tuple[list[str], set[str]]:
        arguments = ["fit", "--config", str(EXAMPLES / "configs" / f"{name}.yaml"), *TINY, *more]
        trainer = here("cli").main(arguments).trainer
        return [record["phase"] for record in trainer.callbacks[0].history], set(trainer.callback_metrics)

    for name, metric in (("diabetes", "absolute_error"), ("characters", "accuracy"), ("letters", "accuracy")):
        phases, metrics = fit(name, *(["--data.data_dir=."] if name == "letters" else []))
        assert phases == ["base", "correlation", "base"]
        assert metrics >= {f"test_{metric}", "test_loss"}
    nowhere = "there is no 'data/letter-recognition.csv.gz': name the directory it is in with --data"
    with pytest.raises(FileNotFoundError, match=re.escape(nowhere)):
        fit("letters")


@pytest.mark.timeout(300)
def test_the_command_of_the_command_line_example(tmp_path: Path) -> None:
    config = EXAMPLES / "configs" / "digits.yaml"
    shown = run(Path("cli.py"), "fit", "--config", str(config), *TINY, cwd=tmp_path)
    assert re.search(r"\n +1 +1 +1,238 +1 \+ 1 ", shown)


# Two runs in one process, for importing takes longer than the fits. The second finds a line that was cut off.
QUALITY = """
import doctest
import json
import sys
from pathlib import Path
import quality
import results
import tasks

assert doctest.testmod(results) == (0, 2)
assert doctest.testmod(tasks) == (0, 1)
tiny = {"base_epochs": 1, "max_correlation_epochs": 1, "max_dendrites": 1, "candidates": 1}
options = ["--tasks", "digits", "--seeds", "1", "--out", "out", "--arguments", json.dumps(tiny), "--rows", "gradient"]
path = Path("out", "results.jsonl")
quality.main([*options, '{"learning": "hybrid", "activation": "relu"}'])
lines = path.read_text().splitlines()
path.write_text("\\n".join(lines)[:-20])
print("again")
quality.main(options)
print(len(lines), [json.loads(line)["stages"][0]["result"] for line in (lines[-1], path.read_text().splitlines()[-1])])
"""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_benchmark_of_quality_has_its_controls_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES / "benchmarks"), str(EXAMPLES.parent)])}
    command = [sys.executable, "-c", QUALITY]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("\nagain\n")
    *_, last = second.splitlines()
    count, results = last.split(maxsplit=1)
    assert first.count(", seed 0: ") == int(count) > 5
    assert second.count(", seed 0: ") == 1
    one, two = json.loads(results)
    assert one == two
    rows = {
        cells[1]: cells
        for cells in ([cell.strip() for cell in line.split("|")] for line in first.splitlines())
        if len(cells) > 5
    }
    for name in ("gradient", "learning=hybrid, activation=relu"):
        _, _, error, parameters, epochs, _, dendrites, same, wider, _, _ = rows[name]
        assert (parameters, dendrites) == ("1,238", "1.0")
        for control in (same, wider):
            result, ratio = re.fullmatch(r"([\d.]+) \(x ([\d.]+), [01] of 1\)", control).groups()
            assert float(ratio) == pytest.approx(float(error) / float(result), abs=0.03)
        assert float(rows["plain, 8 wide, restarted"][4]) >= float(epochs) > 1
    *_, gradient = json.loads((tmp_path / "out" / "quality.json").read_text())["digits"]
    controls = [gradient[name]["parameters"] for name in ("same network", "as many parameters")]
    assert controls == [610, 1210]
    assert (tmp_path / "out" / "digits.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_benchmark_of_speed_measures_steps_and_memory(tmp_path: Path) -> None:
    options = ["--networks", "mlp-letters", "--parts", "steps", "memory", "--repeats", "1", "--out", "out"]
    shown = run(Path("benchmarks/speed.py"), *options, cwd=tmp_path)
    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert {(row["step"], row["dendrites"], row["pool"]) for row in found["Steps"]} >= {
        ("base", 3, 0),
        ("correlation", 0, 4),
        ("gradient", 3, 0),
        ("inference", 3, 0),
    }
    # What is allocated does not depend on the machine's load.
    (three,) = [row for row in found["Peak memory"] if (row["step"], row["dendrites"]) == ("base", 3)]
    assert 0.8 * three["needed"] < three["peak"] <= 1.1 * three["needed"]
    assert "| mlp-letters | base | 3 |" in shown
    assert "| mlp-letters | base | 3 |" in (tmp_path / "out" / "speed.md").read_text()
    assert "<svg" in (tmp_path / "out" / "steps.svg").read_text()


@pytest.mark.slow
def test_two_spirals_are_solved_by_one_neuron(tmp_path: Path) -> None:
    shown = run(Path("two_spirals.py"), "--seeds", "10", "--picture", "regions.png", cwd=tmp_path)
    solved, mean = re.search(r"solved in (\d+) of 10 seeds with ([\d.]+)", shown).groups()
    assert int(solved) >= 9
    assert float(mean) <= 13
    assert (tmp_path / "regions.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_benchmark_of_peak_memory_measures_a_row(here: Any, tmp_path: Path) -> None:
    memory = here("benchmarks.memory")
    memory.ROWS[memory.FILE][0](0.01, tmp_path)
    own, most = memory.measure("load", 0.01, tmp_path)
    assert max(own, most) < 100


def test_fingerprints_stand_beside_a_plain_network(
    here: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.rand(count, 64).round()
        y = x[:, :3].clone()
        y[::7] = torch.nan  # assays that were not made
        return x, y

    example = here("fingerprints")
    monkeypatch.setitem(example.DATA, "tox21", lambda folder: [answers(count) for count in (300, 60, 60)])
    settings = ["--seeds", "2", "--epochs", "1", "--max-parameters", "400", "--hidden", "4"]
    monkeypatch.setattr(sys, "argv", ["fingerprints.py", "--data-dir", "nowhere", *settings])
    example.main()
    rows = re.findall(r"^(.+?) +(\d+) parameters +(\d+) epochs +0\.\d+ ± 0\.\d+$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == ["shared dendrites", "plain, 4 hidden neurons"]
    assert rows[0][2] == rows[1][2]
    assert int(rows[0][1]) <= 400


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pretrained_encoder_is_finetuned_within_a_budget(
    here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("all_minilm_l6_v2")
    for part, count in (("train", 540), ("test", 8)):
        lines = [("LOC:city Where is it ?", "NUM:date When was it ?")[i % 2] for i in range(count)]
        (tmp_path / f"trec-{part}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode("latin-1")))
    options = ["--data-dir", str(tmp_path), "--questions", "32", "--budget", "3000", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options])
    here("finetune").main()
    trained = re.findall(r"^(head alone|dendrites) .* ([\d,]+) trainable", capsys.readouterr().out, re.MULTILINE)
    assert dict(trained)["head alone"] == "770"  # a head of two classes
    assert 770 <= int(dict(trained)["dendrites"].replace(",", "")) <= 3_000  # a head that is always right is the best
    assert Path("questions.pt").stat().st_size < 100_000
