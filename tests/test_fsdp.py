"""Two processes that share out a model between them do what one does with the same global batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pl_dendrites import load_from_checkpoint
from pl_dendrites.core import Form, attach, attach_shared
from pl_dendrites.core.growth.placed_block import PlacedForm
from pl_dendrites.core.growth.sharded import scatter_weights
from pl_dendrites.core.growth.shared_block import SharedForm
from tests import sharded
from tests.models import QUIET, loaders, quick, same_bits
from tests.sharded import SETTINGS, Linears, Setting, fit, strategy
from tests.test_ddp import assert_close, difference
from tests.together import Net, double_precision, launch

pytestmark = pytest.mark.timeout(360)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder with checkpoints, the runs of one process by name, and those of each of two."""
    folder = tmp_path_factory.mktemp("runs")
    one = {name: fit(setting, None, folder / "one" / name) for name, setting in SETTINGS.items()}
    with launch(sharded.main, folder, SETTINGS) as wait:
        errors = wait(240)
    assert all((folder / f"{name} {rank}.pt").exists() for name in SETTINGS for rank in range(2)), errors
    load = {"weights_only": False}
    two = {name: [torch.load(folder / f"{name} {rank}.pt", **load) for rank in range(2)] for name in SETTINGS}
    assert [status > 0 for status, _ in errors] == [True, True], "one dies, the other ends with an error"
    return folder, one, two


@pytest.fixture
def alone() -> Iterator[dict[str, Any]]:
    """Settings of a Trainer with a single process, in this one, that shards all the same."""
    yield QUIET | {"devices": 1, "max_epochs": 1, "strategy": strategy(data_parallel_size=1)}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_are_one_with_their_global_batch(name: str, runs: Any) -> None:
    _, one, two = runs
    assert_close(two[name][0]["whole"], one[name])
    trail, reference = two[name][0]["whole"]["trail"], one[name]["trail"]
    assert len(trail) == len(reference) >= 40
    assert max(map(difference, trail, reference)) < 1e-9, "after every batch, candidates included"
    accepted = [record["accepted"] for record in one[name]["history"] if record["accepted"] is not None]
    assert accepted == {"files": [True, True], "folders": [True, False, True], "shared": [True, True]}[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_both_processes_hold_the_same_network(name: str, runs: Any) -> None:
    first, second = (results["whole"] for results in runs[2][name])
    assert all(map(same_bits, first["trail"], second["trail"]))
    assert first["history"] == second["history"]
    assert first["stop"] == second["stop"]


@pytest.mark.parametrize("name", ["files", "folders"])
def test_each_process_holds_its_part_of_the_dendrites(name: str, runs: Any) -> None:
    first, second = (results["whole"] for results in runs[2][name])
    nodes = [key for key in first["weights"] if ".nodes." in key]
    assert nodes
    for key in nodes:
        assert first["here"][key] + second["here"][key] == first["weights"][key].numel()
        assert second["here"][key] > 0


def test_shared_dendrites_are_whole_in_each_process_and_their_fields_move(runs: Any) -> None:
    for results in runs[2]["shared"]:
        run = results["whole"]
        own = [key for key in run["weights"] if ".dendrites." in key]
        assert len(own) == 10
        assert all(run["here"][key] == run["weights"][key].numel() for key in own)
        fields = [{key: value for key, value in values.items() if key.endswith(".field")} for values in run["trail"]]
        moved = [any((b[key] != a[key]).any() for key in a) for a, b in pairwise(fields) if a.keys() == b.keys()]
        assert sum(moved) >= 4


def test_where_the_network_stands_still_it_has_no_gradients(runs: Any) -> None:
    for name, results in runs[2].items():
        for run in [results[0]["whole"], *(results[0][f"from {epoch}"] for epoch in SETTINGS[name].resumed)]:
            assert ("correlation", True) not in run["gradients"]
        assert ("correlation", False) in results[0]["whole"]["gradients"]


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_in_any_phase_they_end_with_the_same_bits(name: str, runs: Any) -> None:
    results = runs[2][name][0]
    for epoch in SETTINGS[name].resumed:
        run = results[f"from {epoch}"]
        assert len(run["trail"]) == len(results["whole"]["trail"]) - 4 * (epoch + 1)
        assert all(map(same_bits, run["trail"], results["whole"]["trail"][4 * (epoch + 1) :]))
        assert run["history"] == results["whole"]["history"]
        assert same_bits(run["weights"], results["whole"]["weights"])


@pytest.mark.parametrize(("name", "epoch"), [("files", 2), ("files", 5), ("shared", 3), ("shared", 5)])
def test_one_process_goes_on_from_a_file_of_two(name: str, epoch: int, runs: Any, tmp_path: Path) -> None:
    folder, one, _ = runs
    assert_close(fit(SETTINGS[name], None, tmp_path, folder / name / f"epoch={epoch}.ckpt"), one[name])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_with_another_number_of_processes(name: str, runs: Any, tmp_path: Path) -> None:
    folder, one, _ = runs
    of_one = {"devices": 1, "strategy": strategy(data_parallel_size=1, **SETTINGS[name].strategy)}
    setting = replace(SETTINGS[name], trainer=SETTINGS[name].trainer | of_one | {"use_distributed_sampler": False})
    assert_close(fit(setting, None, tmp_path, folder / name / "epoch=5.ckpt"), one[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_best_network_loads_anywhere(name: str, runs: Any) -> None:
    folder, _, two = runs
    with double_precision():
        model = load_from_checkpoint(SETTINGS[name].model, folder / name / "best.ckpt")
    assert same_bits(dict(model.state_dict()), two[name][0]["whole"]["weights"])
    best = two[name][0]["whole"]["history"][-1]["best_score"]
    assert sum(results["score of the best"] for results in two[name]) / 2 == pytest.approx(best, abs=1e-9)
    assert {path.name for path in (folder / name).glob("best*")} == {"best.ckpt"}


def test_dendrites_are_private_where_nobody_asks_for_others(alone: dict[str, Any]) -> None:
    dendrites = quick(form=None)
    with double_precision():
        L.Trainer(callbacks=[dendrites], **alone).fit(Linears(), *sharded.loaders(Setting(), None))
    assert dendrites.history[-1]["form"] == "private"
    assert "the model is sharded, and nobody asked" in dendrites.history[-1]["form_reason"]


# -- refused -----------------------------------------------------------------------------------------------------------


def test_tensor_parallelism(runs: Any) -> None:
    for rank in range(2):
        assert "cannot work with tensor parallelism" in (runs[0] / f"refused {rank}.txt").read_text()


class Half(Net):
    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class Grown(Linears):
    def configure_model(self) -> None:
        attach(self).grow(["net.0"])
        super().configure_model()


class GrownShared(Linears):
    def configure_model(self) -> None:
        attach_shared(self.net)
        self.net.dendrites.add(self.net, SharedForm(units=4, inputs=4, outputs=2, field=2))
        super().configure_model()


class GrownPlaced(Linears):
    def configure_model(self) -> None:
        attach(self)
        self.net[0].dendrites.add(self.net[0], PlacedForm(units=1, directions=2, neurons=self.net[0].out_features))
        super().configure_model()


class Casting(Net):
    def configure_model(self) -> None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"], mp_policy=policy)


class OtherMesh(Net):
    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel", "tensor_parallel"])


class Elsewhere(Linears):
    """A Trainer whose device its parameters are not on, as with ``CPUOffloadPolicy`` on a GPU."""

    def configure_optimizers(self) -> Any:
        self.trainer.strategy.parallel_devices = [torch.device("meta")]
        return super().configure_optimizers()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Half, "'net.2': its parameters are not sharded.*Call `fully_shard`"),
        (Casting, r"'net.0', 'net.2': its `MixedPrecisionPolicy`.*precision='bf16-mixed'"),
        (OtherMesh, r"'net.0', 'net.2': it is shared out over .*mesh=self.device_mesh\['data_parallel'\]"),
        (Grown, "'net.0': it had dendrites when it was sharded"),
        (Elsewhere, "'net.0', 'net.2': its parameters wait on another device.*`CPUOffloadPolicy`"),
    ],
)
def test_layers_that_cannot_grow(model: type[Net], says: str, alone: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s)ModelParallelStrategy.*{says}"):
        L.Trainer(callbacks=[quick()], **alone).fit(model(), *loaders())


@pytest.mark.parametrize(
    ("model", "settings"), [(Linears, {"targets": ["net.0"], "max_parameters": 100}), (GrownPlaced, {})]
)
def test_dendrites_cannot_be_placed(model: type[Net], settings: dict[str, Any], alone: dict[str, Any]) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"cannot be placed in a sharded model.*leave `max_parameters` out"
    ):
        L.Trainer(callbacks=[quick(**settings)], **alone).fit(model(), *loaders())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Half, "'net': its parameters are not sharded.*Call `fully_shard`"),
        (GrownShared, "'net': it had dendrites when it was sharded"),
    ],
)
def test_modules_that_shared_dendrites_cannot_hang_around(model: type[Net], says: str, alone: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=f"(?s)ModelParallelStrategy.*{says}"):
        L.Trainer(callbacks=[quick(around=["net"])], **alone).fit(model(), *loaders())


def test_layers_whose_dendrites_would_be_copies(alone: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(?s)\['LSTM'\].*'lstm' \(LSTM\): processes share out its weights"):
        L.Trainer(callbacks=[quick(targets=["LSTM"])], **alone).fit(Recurrent(), *loaders())


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it is a folder without 'meta.pt'"):
        load_from_checkpoint(Linears, tmp_path)


def test_a_grown_checkpoint_of_another_strategy(runs: Any, alone: dict[str, Any]) -> None:
    path = runs[0] / "one" / "files" / "epoch=5.ckpt"
    trainer = L.Trainer(callbacks=[quick()], **alone)
    with double_precision(), pytest.raises(MisconfigurationException, match="Go on with the strategy"):
        trainer.fit(Linears(), *loaders(), ckpt_path=path)
    assert "load_checkpoint" not in vars(trainer.strategy)


def test_saving_after_an_exception(tmp_path: Path, alone: dict[str, Any]) -> None:
    callbacks = [quick(), OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(MisconfigurationException, match=r"OnExceptionCheckpoint cannot save.*ModelCheckpoint"):
        L.Trainer(callbacks=callbacks, **(alone | {"enable_checkpointing": True})).fit(Linears(), *loaders())


def test_the_best_network_on_the_disk(tmp_path: Path, alone: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"best_on='disk' cannot work with .*Leave it out"):
        L.Trainer(callbacks=[quick(dirpath=tmp_path, best_on="disk")], **alone).fit(Linears(), *loaders())


def test_every_stack_of_dendrites_comes_back() -> None:
    """Sets of another activation, from an earlier fit, are a stack of their own; sharding itself plays no part here."""
    one, other = (nn.Sequential(nn.Linear(3, 2)) for _ in range(2))
    network = attach(one)
    network.grow(["0"])
    network.set_next("relu")
    network.grow(["0"])
    attach(other)
    scatter_weights(other, one.state_dict())
    assert other[0].dendrites.forms == one[0].dendrites.forms == [Form(1, "tanh"), Form(1, "relu")]
    assert same_bits(other.state_dict(), one.state_dict())
