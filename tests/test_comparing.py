"""What surrounds the fits of a comparison: its progress, its files, its processes, its answer."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from scipy import stats
from torch import nn

from pl_dendrites import compare
from pl_dendrites.comparing import Comparison, Folder, Progress, Workers, in_order
from pl_dendrites.comparing.progress import time_left
from pl_dendrites.comparing.runs import Run
from pl_dendrites.comparing.verdict import interval, mode_of
from tests.models import Classifier
from tests.test_comparison import DENDRITES, Data

ROOT = Path(__file__).parents[1]
BRIEF: dict[str, Any] = DENDRITES | {"form": "private", "base_epochs": 1, "max_dendrites": 1, "max_tries": 0}
QUICK: dict[str, Any] = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}


def run_of(kind: str, seed: int, result: float, parameters: int = 100, **own: Any) -> Run:
    run = Run(kind, seed, result, result, parameters, 9, 1.0, 0, 0, 400, kind)
    return replace(run, **own)


@dataclass(frozen=True)
class Fake:
    """A job that takes no time."""

    name: str
    seed: int = 0
    needs: tuple[str, ...] = ()

    def train(self, beside: Sequence[Run], tell: Callable[[int, int], None]) -> Run:
        tell(2, 31)
        assert [run.name for run in beside] == list(self.needs)
        if self.name == "fails":
            raise ArithmeticError("of the model")
        if self.name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return run_of(self.name, self.seed, 0.5, parameters=torch.get_num_threads(), tries=os.getpid())


class Counted(Classifier):
    """Counts the batches of all fits."""

    batches = 0

    def on_train_batch_start(self, *_: Any) -> None:
        Counted.batches += 1


# -- what is said -----------------------------------------------------------------------------------------------------


def test_elsewhere_than_on_a_terminal_each_finished_network_has_a_line_and_lightning_is_quiet(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"loud": BRIEF | {"verbose": True}, "still": BRIEF}
    with caplog.at_level("INFO"):
        comparison = compare(Classifier, Data, settings, "val_acc", seeds=1, trainer=QUICK)
    head, *lines = [line for line in caplog.messages if not line.startswith("DendriteCallback: ")]
    assert head == "compare: each network is tried for a batch"
    for number, (line, run) in enumerate(zip(lines, comparison.runs, strict=True), 1):
        assert line.startswith(f"compare: {number} of 4: {run.name}, seed 0: val_acc {run.result:.4g}, ")
        assert ("left" in line) == (number < 4)
    loud, still, restarted = (caplog.messages.index(line) for line in lines[1:])
    assert "DendriteCallback: growth ends" in caplog.text
    assert restarted > still + 1 == loud + 2
    caplog.clear()
    with caplog.at_level("INFO"):
        L.Trainer(logger=False, accelerator="cpu")
    assert "GPU available" in caplog.text


def test_on_a_terminal_a_bar_says_which_network_fit_and_epoch_and_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("pl_dendrites.comparing.progress._PAUSE", 0.0)
    jobs = [Fake("plain"), Fake("with dendrites"), Fake("plain, restarted", needs=("with dendrites",))]
    with Progress(jobs, {}, workers=1, kept_in=None, verbose=True, bar=True) as progress:
        for run in in_order(jobs, {}, progress):
            progress.end(replace(run, seconds=300.0), "loss")
    shown = terminal.getvalue()
    assert re.search(r"compare: 1/3 .* about 10 min left, with dendrites, seed 0: fit 2, epoch 31", shown)
    assert re.search(r"compare: 3/3", shown)
    terminal.truncate(0)
    for settings in ({"verbose": False, "bar": True}, {"verbose": True, "bar": False}):
        with Progress(jobs, {}, workers=1, kept_in=None, **settings) as progress:
            progress.begin(jobs[0])
    assert "seed 0" not in terminal.getvalue()


def test_the_rest_takes_as_long_as_with_other_seeds_or_as_what_is_trained_as_much() -> None:
    names = {"plain": (), "grown": (), "restarted": ("grown",)}
    jobs = [Fake(name, seed, needs) for seed in (0, 1) for name, needs in names.items()]
    assert time_left(jobs, [], {}) is None
    plain, grown = run_of("plain", 0, 0.5, seconds=2.0), run_of("grown", 0, 0.5, seconds=30.0)
    assert time_left(jobs, [plain, grown], {}) == 30 + 2 + 30 + 30
    restarted = run_of("restarted", 0, 0.5, seconds=20.0)
    assert time_left(jobs, [plain, grown, restarted], {(1, "plain"): 5.0, (1, "grown"): 10.0}) == 0 + 20 + 20


# -- what is checked before -------------------------------------------------------------------------------------------


def eights(width: int) -> Counted:
    if width % 8:
        raise ValueError("embed_dim must be divisible by num_heads")
    return Counted(width)


def no_width() -> Counted:
    return Counted()


class Shallow(Counted):
    """Most of it is no weight, and cannot be left out."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.table = nn.Parameter(torch.zeros(200))


@pytest.mark.parametrize(
    ("arguments", "settings", "error"),
    [
        (
            {"monitor": "val_los"},
            {},
            r"monitor='val_los'\): no such metric was logged.*Logged are: \['train_loss', 'val_acc'",
        ),
        ({"patience": 0}, {}, "patience"),
        ({}, {"metric": "f1"}, "'f1' is not logged in test_step; logged are"),
        ({}, {"wider": eights}, "`wider` made no model of width 1 .*must be divisible by num_heads.*MyModel"),
        ({}, {"deeper": no_width}, "`deeper` made no model of width 1 .TypeError"),
        ({}, {"wider": lambda width: Counted(9 - width)}, "`wider` must make a larger network of a larger width"),
        ({}, {"wider": Shallow, "sparse": True}, "cannot have"),
    ],
)
def test_what_cannot_be_compared_is_known_before_the_first_long_fit(
    arguments: dict[str, Any], settings: dict[str, Any], error: str
) -> None:
    Counted.batches = 0
    with pytest.raises(Exception, match=error):
        compare(Counted, Data, DENDRITES | arguments, **{"metric": "val_acc", "seeds": 1, **settings})
    assert Counted.batches <= 5


# -- what is kept -----------------------------------------------------------------------------------------------------


class Interrupted(Classifier):
    """The user presses Ctrl-C in one of the fits."""

    fits, last = 0, 0

    def on_train_start(self) -> None:
        if not self.trainer.fast_dev_run:
            Interrupted.fits += 1
            if Interrupted.fits == Interrupted.last:
                raise KeyboardInterrupt


def found(comparison: Comparison) -> list[dict[str, Any]]:
    """All that does not depend on the clock."""
    return [row | {"seconds": 0} for row in comparison.rows()]


def test_what_is_finished_when_it_is_interrupted_is_not_done_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(seeds: int = 1, **settings: Any) -> Comparison:
        arguments = settings.pop("arguments", BRIEF)
        return compare(Interrupted, Data, arguments, "val_acc", seeds=seeds, trainer=QUICK, **settings)

    Interrupted.fits, Interrupted.last = 0, -1
    whole, fits = ask(), Interrupted.fits
    Interrupted.fits, Interrupted.last = 0, 3
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with caplog.at_level("INFO"), pytest.raises(KeyboardInterrupt):
        ask(dirpath=tmp_path / "runs")
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler  # Lightning would hear it no more
    assert (
        caplog.messages[-1]
        == f"compare: interrupted; 2 of 3 networks were finished and are in '{tmp_path}/runs': ask again"
    )
    assert found(ask(dirpath=tmp_path / "runs")) == found(whole)
    assert Interrupted.fits == fits + 1
    assert found(ask(dirpath=tmp_path / "runs")) == found(whole)
    assert Interrupted.fits == fits + 1
    more = ask(dirpath=tmp_path / "runs", seeds=2, deeper=Interrupted)
    names = ["plain", "with dendrites", "plain, restarted", "deeper, restarted"]
    assert [(run.seed, run.name) for run in more.runs] == [(seed, name) for seed in (0, 1) for name in names]
    assert found(more)[:3] == found(whole)
    with pytest.raises(ValueError, match=r"runs of another comparison.*\n  dendrites.*base_epochs: 1 there, 2 here$"):
        ask(dirpath=tmp_path / "runs", arguments=BRIEF | {"base_epochs": 2})
    with pytest.raises(ValueError, match=r"differs:\n  deeper.*: 2 there, 4 here"):
        ask(dirpath=tmp_path / "runs", deeper=lambda width: Interrupted(2 * width))


def test_a_record_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError("No space left on device")

    first, second = run_of("a/b", 0, math.nan), run_of("plain, restarted", 1, 0.1 + 0.2)
    folder = Folder(tmp_path, {"metric": "loss"})
    folder.add(second)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            folder.add(first)
    assert Folder(tmp_path, {"metric": "loss"}).runs() == {(1, "plain, restarted"): second}
    folder.add(first)
    runs = folder.runs()
    assert runs.keys() == {(0, "a/b"), (1, "plain, restarted")}
    assert math.isnan(runs[0, "a/b"].result)
    file = tmp_path / "seed 1, plain, restarted.json"
    for text, error in (
        ("{", "is no JSON"),
        ("[]", "a list"),
        (json.dumps(asdict(second) | {"seed": "1"}), "see 'seed'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"{error}.*delete it, and its network is trained anew"):
            folder.runs()


# A comparison in a process of its own, of a model that waits to be killed in one of its fits.
SCRIPT = """
import sys, time
from pl_dendrites import compare
from tests.test_comparing import BRIEF, QUICK, Classifier, Data
class Slow(Classifier):
    fits = 0
    def on_train_start(self):
        Slow.fits += not self.trainer.fast_dev_run
        while Slow.fits == 3:
            time.sleep(0.01)
Slow.__qualname__ = "Classifier"
compare(Slow, Data, BRIEF, "val_acc", wider=Slow, seeds=1, trainer=QUICK, dirpath=sys.argv[1])
"""


@pytest.mark.long
def test_a_comparison_that_is_killed_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=environment, stderr=subprocess.DEVNULL)
    try:
        while len(list(path.glob("seed *.json"))) < 2:
            assert killed.poll() is None
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
    before = {file: file.stat().st_mtime_ns for file in path.glob("seed *.json")}
    settings: dict[str, Any] = {"wider": Classifier, "seeds": 1, "trainer": QUICK}
    comparison = compare(Classifier, Data, BRIEF, "val_acc", dirpath=path, **settings)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert found(comparison) == found(compare(Classifier, Data, BRIEF, "val_acc", **settings))


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_processes_give_the_results_of_one(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings: dict[str, Any] = {"wider": Classifier, "sparse": True, "seeds": 2, "trainer": QUICK}
        one, two = (
            compare(Classifier, Data, BRIEF, "val_loss", workers=workers, dirpath=tmp_path / str(workers), **settings)
            for workers in (1, 2)
        )
    finally:
        torch.set_num_threads(threads)
    assert found(one) == found(two)
    assert len(list((tmp_path / "2").glob("seed *.json"))) == 10


class Noted:
    """Notes which jobs were begun, and what they told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.told: list[tuple[str, int, int]] = []

    def begin(self, job: Any) -> None:
        self.begun.append(job.name)

    def epoch(self, job: Any, fit: int, epochs: int) -> None:
        self.told.append((job.name, fit, epochs))


@pytest.mark.long
def test_what_a_process_fails_of_is_told_whole_and_none_is_left() -> None:
    jobs = [Fake("one"), Fake("two"), Fake("both", needs=("one", "two")), Fake("fails", needs=("both",))]
    threads, noted, runs = torch.get_num_threads(), Noted(), list[Run]()

    def train() -> None:
        with Workers(jobs, 2, 4) as workers:
            for run in workers.train(jobs, {(0, "two"): run_of("two", 0, 0.1)}, noted):
                runs.append(run)  # before the next fails

    torch.set_num_threads(4)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)'fails' with seed 0.*in train\n.*ArithmeticError: of the model"):
            train()
    finally:
        torch.set_num_threads(threads)
    assert [run.name for run in runs] == ["one", "both"]
    assert {run.parameters for run in runs} == {2}  # half of the threads
    assert os.getpid() not in {run.tries for run in runs}
    assert noted.begun == ["one", "both", "fails"]
    assert noted.told == [(name, 2, 31) for name in noted.begun]
    assert not multiprocessing.active_children()


@pytest.mark.long
def test_a_process_that_dies_is_no_end_of_waiting() -> None:
    jobs = [Fake("dies")]
    with (
        pytest.raises(RuntimeError, match=r"'dies' with seed 0 ended by itself \(exit code -9"),
        Workers(jobs, 1, 1) as workers,
    ):
        list(workers.train(jobs, {}, Noted()))
    assert not multiprocessing.active_children()


def test_what_a_process_cannot_be_sent_is_refused_before_all() -> None:
    Counted.batches = 0
    with pytest.raises(ValueError, match=r"`workers`: a process .*lambda.*must be defined at the top of a file"):
        compare(Counted, Data, BRIEF, "val_acc", wider=lambda width: Counted(2 * width), workers=2)
    assert Counted.batches == 0


# -- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 7, 10, 30])
def test_the_interval_is_that_of_students_t(seeds: int) -> None:
    values = torch.rand(seeds, generator=torch.Generator().manual_seed(seeds)).tolist()
    error = statistics.stdev(values) / math.sqrt(seeds)
    expected = stats.t.interval(0.95, seeds - 1, statistics.mean(values), error)
    assert interval(values)[1:] == pytest.approx(expected, abs=2e-3 * error)


def compared(mode: Any, grown: list[float], restarted: list[float], wider: list[float] | None = None) -> Comparison:
    runs = [run_of("dendrites", seed, value, 2215) for seed, value in enumerate(grown)]
    runs += [run_of("restarted", seed, value, 610) for seed, value in enumerate(restarted)]
    runs += [run_of("wider", seed, value, 2210, beside="dendrites") for seed, value in enumerate(wider or [])]
    runs += [run_of("sparse", seed, 0.5 * value - 9, 2215, beside="another") for seed, value in enumerate(wider or [])]
    return Comparison("figure", tuple(runs), mode)


def test_a_verdict_says_what_the_seeds_allow() -> None:
    worse = [0.41, 0.40, 0.39]
    said = compared("min", [0.21, 0.2, 0.19], worse, [0.2, 0.18, 0.21]).verdict
    assert said.startswith(
        "3 seeds: figure of 'dendrites' (2,215 parameters) is 0.5 times that of 'restarted' (610 parameters; "
    )
    assert re.search(r"0\.4\d+ to 0\.5\d+ with 95 % confidence\): better; 1\.\d+ times that of 'wider' \(2,210 ", said)
    assert said.endswith("no difference that 3 seeds can show.")
    large = compared("max", [0.79, 0.8, 0.81], [0.59, 0.6, 0.61], [0.9, 0.91, 0.9]).verdict
    assert large.startswith("3 seeds: 1 - figure of 'dendrites' (2,215 parameters) is 0.5 times that of 'restarted'")
    assert "confidence): better; 2.07 times" in large
    assert large.endswith("confidence): worse.")
    rewards = compared("max", [210.0, 200.0, 190.0], [110.0, 100.0, 90.0]).verdict
    assert "figure of 'dendrites' (2,215 parameters) is +100 beside that of 'restarted'" in rewards
    assert "1 - figure" not in rewards
    assert "confidence): better. No network as large was trained" in rewards
    assert (
        "worse" in compared("min", [0.0, 0.01, 0.02], [-1.0, -1.01, -0.99]).verdict
    )  # no ratio of what is not positive
    assert compared("min", [0.2], [0.4], [0.3]).verdict.count("one seed has no spread and allows no verdict") == 2
    assert "is not known: `mode` says so" in compared(None, [0.2], [0.4]).verdict


@pytest.mark.parametrize(
    ("metric", "monitored", "mode"),
    [
        ("test_loss", {"val_acc": "max"}, "min"),
        ("test/accuracy", {}, "max"),
        ("test_score", {"val_score": "min"}, "min"),
        ("val_loss", {"val_loss": "max"}, "max"),
        ("place", {"val_loss": "min"}, None),  # has "acc" in it
    ],
)
def test_whether_a_good_result_is_small_is_said_by_the_monitor_or_the_name(
    metric: str, monitored: dict[str, Any], mode: str | None
) -> None:
    assert mode_of(metric, monitored) == mode


def test_a_comparison_comes_back_from_its_file_and_a_file_of_others_is_refused(tmp_path: Path) -> None:
    comparison, path = compared("min", [0.1 + 0.2, 1 / 3], [math.pi, 1e-30]), tmp_path / "comparison.json"
    comparison.save(path)
    assert Comparison.load(path) == comparison
    for text, error in (("[]", "is no comparison"), ('{"metric": 1}', "is no comparison"), ("\x00", "is no JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=error):
            Comparison.load(path)
    path.write_text(json.dumps({"metric": "loss", "mode": "min", "runs": [{"name": "plain"}]}))
    with pytest.raises(ValueError, match="no run of a comparison"):
        Comparison.load(path)


def test_a_plot_has_every_network_at_its_size_and_the_frontier_of_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = compared("min", [0.2, 0.3], [0.5, 0.3], [0.25, 0.15])
    axes = comparison.plot().axes[0]
    drawn = {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in axes.containers}
    assert drawn["with dendrites"] == [[2215, 0.25]]
    assert drawn["plain, restarted"] == [[610, 0.4]]
    assert drawn["as large"] == [[2210, 0.2]]
    spread = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert spread.tolist() == pytest.approx([0.25 - statistics.stdev([0.2, 0.3]), 0.25 + statistics.stdev([0.2, 0.3])])
    (line,) = [line for line in axes.lines if line.get_label() == "best plain network up to a size"]
    assert line.get_xydata().tolist() == [[610, 0.4], [2210, 0.2], [2215, 0.2]]
    monkeypatch.setattr("pl_dendrites.comparing.figure.can_draw", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pl-dendrites\[figures\]"'):
        comparison.plot()
