"""Two processes do what one does with the same global batches, and end when one of them dies."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_dendrites import grow_on_load
from tests.models import QUIET, bits, classifier, loaders, quick, same_bits
from tests.together import DEATHS, SETTINGS, Manual, fit, launch, main

pytestmark = pytest.mark.timeout(240)

Results = dict[str, dict[str, Any]]
ON_CPU = QUIET | {"accelerator": "cpu"}  # where two devices are asked for; there may be one GPU


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple[int, str]]]:
    """A folder with what two processes saved, the runs of one process by name, and how the two ended: one raised."""
    folder = tmp_path_factory.mktemp("runs")
    one = {name: fit(setting, None, folder / "one" / name) for name, setting in SETTINGS.items()}
    with launch(main, folder, SETTINGS) as wait:
        ends = wait(150)
    assert all((folder / f"{name} {rank}.pt").exists() for name in SETTINGS for rank in range(2)), ends
    return folder, one, ends


@pytest.fixture(scope="module")
def runs(launched: Any) -> tuple[Path, dict[str, Any], dict[str, list[Results]]]:
    """A folder with checkpoints, the runs of one process by name, and those of each of two."""
    folder, one, _ = launched
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


@pytest.mark.parametrize("name", [name for name in SETTINGS if "fp16" not in name])
def test_two_processes_are_one_with_their_global_batch(name: str, runs: Any) -> None:
    _, one, two = runs
    assert_close(two[name][0]["whole"], one[name])
    trail, reference = two[name][0]["whole"]["trail"], one[name]["trail"]
    assert len(trail) == len(reference) >= 24
    assert max(map(difference, trail, reference)) < 1e-9, "after every batch, candidates included"


@pytest.mark.parametrize("name", SETTINGS)
def test_after_every_batch_all_processes_hold_the_same_bits(name: str, runs: Any) -> None:
    first, second = runs[2][name]
    for run, other in zip(first.values(), second.values(), strict=True):
        assert run["digests"] == other["digests"]
        assert run["history"] == other["history"]
        assert run["stop"] == other["stop"]
        assert run["optimizers"] == other["optimizers"]
        assert run["scales"] == other["scales"]


def test_a_loss_scale_that_is_too_large_in_one_process_comes_down_in_both(runs: Any) -> None:
    """And a score that one process alone logs decides for both."""
    run = runs[2]["fp16"][0]["whole"]
    scales = [scale for phase, scale in run["scales"] if phase == "correlation"]
    assert any(later < earlier for earlier, later in pairwise(scales))
    assert [record["phase"] for record in run["history"]][:3] == ["base", "correlation", "base"]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("shared")])
def test_fields_of_shared_dendrites_move_in_both_processes(name: str, runs: Any) -> None:
    """And alike: that digests are the same another test says."""
    trail = runs[2][name][0]["whole"]["trail"]
    fields = [{key: value for key, value in values.items() if key.endswith(".field")} for values in trail]
    moved = [any((b[key] != a[key]).any() for key in a) for a, b in pairwise(fields) if a.keys() == b.keys()]
    assert sum(moved) >= 4
    assert fields[-1]


def test_processes_with_different_numbers_of_batches_are_told_so_instead_of_waiting(runs: Any) -> None:
    for rank, own in enumerate((4, 3)):
        assert f"batches: {own} in this one, 3.5 in the mean" in (runs[0] / f"missing {rank}.txt").read_text()


def test_the_settings_show_what_they_are_meant_to(runs: Any) -> None:
    one = runs[1]
    assert [record["dendrites"] for record in one["automatic"]["history"]] == [0, 0, 1, 1, 2, 2, 3]
    for name in ("manual, uneven parts", "accumulation"):
        assert [record["dendrites"] for record in one[name]["history"]] == [0, 0, 1, 1, 2]
    assert False in [record["accepted"] for record in one["sets that fail"]["history"]]
    assert "expert.dendrites.0.nodes.weight" in one["expert"]["weights"]


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


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.resumed_from_one])
def test_resumed_with_another_number_of_processes(name: str, runs: Any, tmp_path: Path) -> None:
    folder, one, two = runs
    for epoch in SETTINGS[name].resumed_from_one:
        assert_close(two[name][0][f"from one's {epoch}"], one[name])
        path = folder / name / f"epoch={epoch}.ckpt"
        assert_close(fit(SETTINGS[name], None, tmp_path / str(epoch), ckpt_path=path), one[name])


def test_the_file_of_the_best_network_is_the_first_process(runs: Any) -> None:
    folder, _, two = runs
    saved = torch.load(folder / "automatic" / "best.ckpt", weights_only=True)["state_dict"]
    assert same_bits(saved, two["automatic"][0]["whole"]["weights"])
    assert not (folder / "automatic" / "best.ckpt.part").exists()


def test_what_is_communicated(runs: Any) -> None:
    """A base step: gradients. A correlation step: those of the pool, and a few sums per neuron. A cycle: the model."""
    weights, neurons, layers, pool = 4 * 5 + 5 + 5 * 2 + 2, 5 + 2, 2, 2
    copied = []
    for phase, dendrites, traffic in runs[2]["automatic"][0]["whole"]["traffic"]:
        if phase == "base":
            steps = [size for by, size in traffic if by == "DDP"]
            assert sum(steps) == 8 * (weights + dendrites * neurons)
        else:
            sums, gradients = [size for by, size in traffic if by == "dendrites"][-2:]
            assert sums == 8 * (3 * neurons * (1 + pool) + 2 * layers)
            assert gradients == 8 * (pool * (weights + dendrites * neurons) + 3 * layers)
        copied += [size for by, size in traffic if by == "wrapper"]
    nodes = [k * (weights + neurons) + k * (k - 1) // 2 * neurons for k in range(1, 4)]
    assert copied == [8 * (weights + frozen) for frozen in nodes]


def test_a_correlation_step_communicates_no_more_than_a_base_step(runs: Any) -> None:
    """Where a layer's samples are fewer numbers than its weights: the samples are gathered."""
    steps: dict[str, list[int]] = {"base": [], "correlation": []}
    for phase, dendrites, traffic in runs[2]["gathered"][0]["whole"]["traffic"]:
        if dendrites < 2:
            steps[phase].append(sum(size for by, size in traffic if by != "wrapper"))
    assert max(steps["correlation"]) < min(steps["base"])


def test_gradients_of_several_batches_are_communicated_once(runs: Any) -> None:
    """For a step of the candidates in three batches, and for the last of an epoch."""
    traffic = [
        traffic for phase, _, traffic in runs[2]["three batches a step"][0]["whole"]["traffic"] if phase != "base"
    ]
    collectives = [len(batch) for batch in traffic]
    without = min(collectives)
    # The first batch of an epoch is looked at, the third and the last one step.
    assert collectives == [without + 1, without, without + 1, without + 1] * (len(collectives) // 4)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "gradient"])
def test_ddp_has_nothing_to_say_where_the_network_stands_still(name: str, runs: Any) -> None:
    traffic = [by for phase, _, traffic in runs[2][name][0]["whole"]["traffic"] for by, _ in traffic if phase != "base"]
    alone = name.startswith(("shared", "placed"))  # what they look at stays in each process
    agreed = not alone or SETTINGS[name].model is Manual  # on whether a model stepped by itself
    assert set(traffic) == ({"dendrites"} if agreed else set())


def test_what_is_communicated_for_shared_dendrites(runs: Any) -> None:
    """Once for a set: the samples, and the set. Once for a move of fields: the gradients of all inputs."""
    base = [traffic for phase, _, traffic in runs[2]["shared"][0]["whole"]["traffic"] if phase == "base"]
    steps = [[size for by, size in traffic if by == "dendrites"] for traffic in base]
    assert [batch for batch, sizes in enumerate(steps) if sizes] == [4, 8, 11, 15, 19, 23]
    assert [batch for batch, traffic in enumerate(base) if "wrapper" in dict(traffic)] == [4, 8], "not fields"
    for batch in (4, 8):
        assert 8 * 4 * (4 * 16) in steps[batch], "inputs of a process' part of four batches, in double precision"
    units = runs[2]["shared"][0]["whole"]["trail"][-1]["net.dendrites.0.bias"].numel()
    assert steps[11][:5] == [8 * size for size in (units * 4, units, 4, 1, units * 2)]


@pytest.mark.parametrize("death", DEATHS)
def test_when_one_process_dies_the_other_ends_and_its_checkpoint_resumes(
    death: str, launched: Any, tmp_path: Path
) -> None:
    folder, one, ends = launched
    if death == "is killed":
        ends = [torch.load(folder / f"{death} {rank}.pt") for rank in range(2)]
    (first, error), (second, _) = ends
    assert first > 0, "an error, not a hang"
    assert second == (-9 if death == "is killed" else 1)
    assert "RuntimeError" in error or "DistBackendError" in error
    newest = max((folder / death).glob("epoch=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    again = fit(SETTINGS["automatic"], None, tmp_path / "again", ckpt_path=newest)
    assert_close(again, one["automatic"])


def test_spawned_processes_bring_the_dendrites_back(tmp_path: Path) -> None:
    model, dendrites = classifier(), quick(base_epochs=1, max_correlation_epochs=1, dirpath=tmp_path)
    grow_on_load(model)
    spawned = DDPStrategy(start_method="forkserver")  # as ddp_spawn, but that imports were made
    trainer = L.Trainer(callbacks=[dendrites], strategy=spawned, devices=2, max_epochs=4, **ON_CPU)
    trainer.fit(model, *loaders(16))
    assert isinstance(model.net[0], nn.Linear)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert model.net[0].dendrites.count > 0
    assert same_bits(bits(model), saved)


# -- refused -----------------------------------------------------------------------------------------------------------


def strategy_of(kind: type[Strategy], name: str = "", **kwargs: Any) -> Strategy:
    """A strategy; some need a package of their own, and are told by their name alone."""
    abstract = dict.fromkeys(kind.__abstractmethods__)
    return (type(name, (kind,), abstract) if name else kind)(**kwargs)


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (strategy_of(FSDPStrategy), "FSDPStrategy: it lays out parameters flat"),
        (strategy_of(DDPStrategy, "DeepSpeedStrategy"), "DeepSpeedStrategy: it hands the optimizer's parameters"),
        (strategy_of(DDPStrategy, "XLAStrategy"), "XLAStrategy: it traces a network of fixed size"),
        (strategy_of(ParallelStrategy, "Foreign"), "Foreign: it is not known to take in"),
        (strategy_of(DDPStrategy, ddp_comm_state=object()), "DDPStrategy: it has a communication hook"),
    ],
)
def test_strategies_that_cannot_grow(strategy: Strategy, says: str) -> None:
    # Not fitted: that would start processes.
    dendrites, trainer = quick(), L.Trainer(**QUIET)
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(MisconfigurationException, match=rf"{says}.*strategy='ddp'"):
        dendrites.setup(trainer, classifier(), "fit")
    dendrites.setup(trainer, classifier(), "test")


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true", DDPStrategy(static_graph=True)])
def test_strategies_that_can(strategy: Any) -> None:
    quick().setup(L.Trainer(strategy=strategy, devices=2, **ON_CPU), classifier(), "fit")


def test_spawned_processes_would_lose_the_dendrites() -> None:
    trainer, model = L.Trainer(strategy="ddp_spawn", devices=2, **ON_CPU), classifier()
    with pytest.raises(MisconfigurationException, match=r"Call `pl_dendrites\.grow_on_load\(model\)` before the fit"):
        quick().setup(trainer, model, "fit")
    model = classifier()
    grow_on_load(model)
    quick().setup(trainer, model, "fit")
