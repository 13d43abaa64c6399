"""Two processes do what one does with the same global batches, and end when one of them dies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from pl_dendrites import grow_on_load
from tests.models import QUIET, bits, quick, same_bits
from tests.together import DEATHS, SETTINGS, fit, launch, wait

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, list[Results]]]:
    """A folder with checkpoints, the runs of one process by name, and those of each of two."""
    folder = tmp_path_factory.mktemp("runs")
    one = {name: fit(setting, None, folder / "one" / name) for name, setting in SETTINGS.items()}
    with launch(folder, *SETTINGS) as processes:
        for status, errors in wait(processes, 150):
            assert status == 0, errors
    load = {"weights_only": False}
    two = {name: [torch.load(folder / f"{name} {rank}.pt", **load) for rank in range(2)] for name in SETTINGS}
    return folder, one, two


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest there is between two sets of tensors; infinite if these are not of one kind."""
    if {name: value.shape for name, value in one.items()} != {name: value.shape for name, value in other.items()}:
        return math.inf
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel())


def decisions(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    figures = ("phase", "cycle", "dendrites", "parameters", "epochs", "accepted", "reason")
    return [tuple(record[key] for key in figures) for record in run["history"]]


def assert_close(run: dict[str, Any], other: dict[str, Any]) -> None:
    assert decisions(run) == decisions(other)
    assert run["stop"] == other["stop"]
    for record, reference in zip(run["history"], other["history"], strict=True):
        for key in ("score", "best_score"):
            assert record[key] == pytest.approx(reference[key], abs=1e-9)
    assert difference(run["weights"], other["weights"]) < 1e-9


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_are_one_with_their_global_batch(name: str, runs: Any) -> None:
    _, one, two = runs
    assert_close(two[name][0]["whole"], one[name])
    trail, reference = two[name][0]["whole"]["trail"], one[name]["trail"]
    assert len(trail) == len(reference) >= 40
    assert max(map(difference, trail, reference)) < 1e-9, "after every batch, candidates included"


@pytest.mark.parametrize("name", SETTINGS)
def test_after_every_batch_all_processes_hold_the_same_bits(name: str, runs: Any) -> None:
    first, second = runs[2][name]
    for run, other in zip(first.values(), second.values(), strict=True):
        assert run["digests"] == other["digests"]
        assert run["history"] == other["history"]
        assert run["stop"] == other["stop"]
        assert run["optimizers"] == other["optimizers"]


def test_the_settings_show_what_they_are_meant_to(runs: Any) -> None:
    one = runs[1]
    for name in ("automatic", "manual", "accumulation"):
        assert [record["dendrites"] for record in one[name]["history"]] == [0, 0, 1, 1, 2, 2, 3]
    assert False in [record["accepted"] for record in one["sets that fail"]["history"]]
    assert "expert.dendrites.nodes.weight" in one["expert"]["weights"]


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.resumed])
def test_resumed_in_any_phase_two_processes_end_with_the_same_bits(name: str, runs: Any) -> None:
    results = runs[2][name][0]
    resumed = [run for key, run in results.items() if key.startswith("from ") and "one" not in key]
    assert len(resumed) == len(SETTINGS[name].resumed)
    for run in resumed:
        assert run["digests"] == results["whole"]["digests"][-len(run["digests"]) :]
        assert run["history"] == results["whole"]["history"]
        assert run["optimizers"] == results["whole"]["optimizers"]
        assert same_bits(run["weights"], results["whole"]["weights"])


def test_resumed_with_another_number_of_processes(runs: Any, tmp_path: Path) -> None:
    folder, one, two = runs
    for epoch in (2, 5):
        assert_close(two["automatic"][0][f"from one's {epoch}"], one["automatic"])
        path = folder / "automatic" / f"epoch={epoch}.ckpt"
        assert_close(fit(SETTINGS["automatic"], None, tmp_path / str(epoch), ckpt_path=path), one["automatic"])


def test_the_file_of_the_best_network_is_the_first_process(runs: Any) -> None:
    folder, _, two = runs
    saved = torch.load(folder / "automatic" / "best.ckpt", weights_only=True)["state_dict"]
    assert same_bits(saved, two["automatic"][0]["whole"]["weights"])
    assert not (folder / "automatic" / "best.ckpt.part").exists()


def test_what_is_communicated(runs: Any) -> None:
    """A base step: the gradients. A correlation step: those of the pool, and a few sums per neuron; nothing by DDP."""
    weights, neurons, layers, pool = 4 * 5 + 5 + 5 * 2 + 2, 5 + 2, 2, 2
    for phase, dendrites, traffic in runs[2]["automatic"][0]["whole"]["traffic"]:
        if phase == "base":
            steps = [size for by, size in traffic if by == "DDP"]
            assert sum(steps) == 8 * (weights + dendrites * neurons)
        else:
            assert "DDP" not in [by for by, _ in traffic]
            sums, gradients = [size for by, size in traffic if by == "dendrites"][-2:]
            assert sums == 8 * (3 * neurons * (1 + pool) + layers)
            assert gradients == 8 * (pool * (weights + dendrites * neurons) + 3 * layers)


@pytest.mark.parametrize("death", DEATHS)
def test_when_one_process_dies_the_other_ends_and_its_checkpoint_resumes(death: str, runs: Any, tmp_path: Path) -> None:
    with launch(tmp_path, death) as processes:
        (first, error), (second, _) = wait(processes, 60)
    assert first > 0, "an error, not a hang"
    assert second == (-9 if death == "is killed" else 1)
    assert "RuntimeError" in error or "DistBackendError" in error
    newest = max((tmp_path / death).glob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    again = fit(SETTINGS["automatic"], None, tmp_path / "again", ckpt_path=newest)
    assert_close(again, runs[1]["automatic"])


def test_spawned_processes_bring_the_dendrites_back(tmp_path: Path) -> None:
    from tests.models import classifier, loaders

    model, dendrites = classifier(), quick(base_epochs=1, max_correlation_epochs=1, dirpath=tmp_path)
    grow_on_load(model)
    trainer = L.Trainer(callbacks=[dendrites], strategy="ddp_spawn", devices=2, max_epochs=4, **QUIET)
    trainer.fit(model, *loaders(16))
    assert isinstance(model.net[0], nn.Linear)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert model.net[0].dendrites.count > 0
    assert same_bits(bits(model), saved)
