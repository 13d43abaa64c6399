"""The best network takes as much memory as it must, in files too, and on the disk none."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pl_dendrites import DendriteCallback, load_from_checkpoint
from pl_dendrites.saved import copies, frozen
from pl_dendrites.saved.best import BestModel
from pl_dendrites.training.trainer import save_straight
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick, same_bits, since_2_6, train
from tests.test_loading import Configured, Mode

EPOCHS = 12


def held(*states: dict[str, Any]) -> int:
    """Bytes of all storages of the tensors in some dicts."""
    storages = (v.untyped_storage() for state in states for v in state.values() if isinstance(v, Tensor))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def allocated(act: Callable[[], object]) -> int:
    """The bytes that PyTorch takes on the CPU while something is done, all in all, given back or not."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        act()
    events = profiler.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def keep_all(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


class Tied(Classifier):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.net[2].weight = self.net[0].weight


class Big(L.LightningModule):
    """4 MB of weights."""

    place = ""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 2))


def best() -> BestModel:
    return BestModel(None, on_disk=False, save=save_straight)


TRAINER = L.Trainer(**QUIET)

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc where memory comes from")


def state_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    (state,) = (state for key, state in checkpoint["callbacks"].items() if "Dendrite" in key)
    return state["best"]


# -- in memory ---------------------------------------------------------------------------------------------------------


def test_a_new_best_is_copied_into_the_memory_of_the_last() -> None:
    model, kept = Big(), best()
    size = held(model.state_dict())
    assert size <= allocated(lambda: kept.keep(TRAINER, model)) < 1.1 * size
    nn.init.ones_(model.net[0].weight)
    assert allocated(lambda: kept.keep(TRAINER, model)) < 0.1 * size
    assert same_bits(dict(kept.weights), bits(model))


@pytest.mark.parametrize("hold", [lambda state: state["weights"], lambda state: state["weights"]["net.0.weight"]])
def test_what_was_handed_out_does_not_change(hold: Callable[[dict[str, Any]], Any]) -> None:
    model, kept = Big(), best()
    kept.keep(TRAINER, model)
    before = bits(model)["net.0.weight"]
    handed = hold(kept.state_dict())
    again = best()
    again.load_state_dict(kept.state_dict())
    for one in (kept, again):
        nn.init.ones_(model.net[0].weight)
        one.keep(TRAINER, model)
        assert same_bits(dict(one.weights), bits(model))
    assert torch.equal(handed["net.0.weight"] if isinstance(handed, dict) else handed, before)


def test_a_callback_that_has_lent_its_best_network_can_be_pickled() -> None:
    dendrites = quick()
    train(classifier(), dendrites, max_epochs=1)
    lent = dendrites.state_dict()["best"]["weights"]
    assert same_bits(pickle.loads(pickle.dumps(dendrites)).state_dict()["best"]["weights"], lent)


def test_tied_weights_stay_tied_in_the_copy_and_in_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dendrites, model = quick(max_dendrites=1), Tied()
    trainer = train(model, dendrites, keep_all(tmp_path), max_epochs=6, enable_checkpointing=True)
    assert len(dendrites.history) > 2
    for path in tmp_path.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        weights = state_in(checkpoint)["weights"]
        assert weights["net.0.weight"].data_ptr() == weights["net.2.weight"].data_ptr()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    more, fresh = quick(max_dendrites=1), Tied()
    train(fresh, more, max_epochs=9, ckpt_path=tmp_path / "end.ckpt")
    assert fresh.net[0].weight is fresh.net[2].weight


def test_weights_that_are_no_longer_tied_are_copies_of_their_own() -> None:
    model, kept = Tied(), best()
    kept.keep(TRAINER, model)
    model.net[2].weight = nn.Parameter(torch.ones(4, 4))
    kept.keep(TRAINER, model)
    assert same_bits(dict(kept.weights), bits(model))


def test_a_checkpoint_holds_the_best_network_once_where_the_model_is_it(tmp_path: Path) -> None:
    dendrites, model = quick(base_epochs=3, max_dendrites=1), classifier()
    train(model, dendrites, keep_all(tmp_path), enable_checkpointing=True)
    shared = []
    for path in sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns):
        checkpoint = torch.load(path, weights_only=True)
        present, weights = checkpoint["state_dict"], state_in(checkpoint)["weights"]
        same = same_bits(present, weights)
        assert same == (held(present, weights) == held(present))
        shared.append(same)
    assert shared.count(True) > 4, "new bests, and correlation phases, where the network stands still"


def test_zeros_of_another_sign_are_others() -> None:
    weights = {"a": torch.zeros(2), "b": torch.full((2,), torch.nan), "c": torch.zeros(2, dtype=torch.complex128)}
    present = {"a": -torch.zeros(2), "b": torch.full((2,), torch.nan), "c": torch.zeros(2, dtype=torch.complex128)}
    kept = dict(weights)
    copies.share_weights({"state_dict": present}, weights)
    assert [weights[key] is kept[key] for key in "abc"] == [True, False, False]


def test_what_is_no_plain_tensor_is_copied_as_it_is() -> None:
    model, kept = Big(), best()
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "empty": torch.zeros(0, 3),
        "repeated": torch.ones(1).expand(3),
    }
    for name, value in odd.items():
        model.register_buffer(name, value)
    for _ in range(2):
        kept.keep(TRAINER, model)
        weights = kept.state_dict()["weights"]
        copies.share_weights({"state_dict": model.state_dict()}, weights)
        assert torch.equal(weights["sparse"].to_dense(), torch.eye(3))
        assert all(torch.equal(weights[name], odd[name]) for name in ("conjugate", "empty", "repeated"))
        assert torch.equal(weights["nested"].unbind()[1], torch.zeros(3))


@pytest.mark.parametrize("second", [False, True])
def test_ctrl_c_while_the_best_network_is_copied(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one network and half of another is none."""
    model, kept = Big(), best()
    if second:
        kept.keep(TRAINER, model)
        nn.init.ones_(model.net[0].weight)
        nn.init.ones_(model.net[1].weight)
    take, calls = copies._Copies.take, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return take(*args)

    monkeypatch.setattr(copies._Copies, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.keep(TRAINER, model)
    assert same_bits(dict(kept.weights or {}), bits(model))


# -- what is frozen ----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where copies of what is frozen are, of 1 MiB and more."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(frozen, "_LEAST", 2**20)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def is_filed(tensor: Tensor) -> bool:
    """Whether the system has a tensor's memory from a file without a name, and keeps for itself what is written."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.split()[1] == "rw-p" and line.endswith(".pt (deleted)")
    return False


def frozen_big() -> Big:
    model = Big()
    model.net[0].requires_grad_(False)
    return model


@linux
def test_what_is_frozen_takes_no_memory_and_leaves_no_file(files: Path) -> None:
    model, kept = frozen_big(), best()
    size = held(model.state_dict())
    kept.keep(TRAINER, model)
    handed = kept.state_dict()["weights"]  # what somebody has is no reason for a copy either
    nn.init.ones_(model.net[1].weight)
    assert allocated(lambda: kept.keep(TRAINER, model)) < 0.1 * size
    assert same_bits(dict(kept.weights), bits(model))
    assert is_filed(handed["net.0.weight"])
    assert is_filed(kept.weights["net.0.weight"])
    assert not is_filed(kept.weights["net.1.weight"])
    assert list(files.iterdir()) == []


CHANGES: dict[str, Callable[[Big], Any]] = {
    "in place": lambda model: nn.init.ones_(model.net[0].weight),
    "past autograd": lambda model: model.net[0].weight.data.mul_(2),  # no version counter tells
    "by NumPy": lambda model: model.net[0].weight.numpy().fill(3),
    "loaded": lambda model: model.load_state_dict(Big().state_dict()),
    "another tensor": lambda model: setattr(model.net[0].weight, "data", torch.ones(1000, 1000)),
    "thawed": lambda model: nn.init.ones_(model.net[0].requires_grad_().weight),
}


@linux
@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_what_is_frozen_changes_no_network_that_was_kept(change: str, files: Path) -> None:
    model, kept = frozen_big(), best()
    kept.keep(TRAINER, model)
    before, handed = bits(model), kept.state_dict()["weights"]
    CHANGES[change](model)
    changed = bits(model)
    assert not same_bits(changed, before)
    for copied in (kept, copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert same_bits(dict(copied.weights), before)
    kept.keep(TRAINER, model)
    assert same_bits(dict(kept.weights), changed)
    assert same_bits(handed, before)
    kept.keep(TRAINER, frozen_big().requires_grad_(False))
    assert same_bits(handed, before)


@linux
@pytest.mark.parametrize("fault", ["short", "full"])
def test_without_room_on_the_disk_what_is_frozen_is_in_memory(
    fault: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    model, kept = frozen_big(), best()
    if fault == "full":
        monkeypatch.setattr(torch, "save", full)
    else:
        usage = shutil.disk_usage(files)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**20))
    kept.keep(TRAINER, model)
    assert not is_filed(kept.weights["net.0.weight"])
    assert same_bits(dict(kept.weights), bits(model))


@linux
def test_what_a_checkpoint_left_out_is_taken_from_the_model_into_a_file(files: Path) -> None:
    model, kept, again = frozen_big(), best(), best()
    kept.keep(TRAINER, model)
    state = kept.state_dict()
    again.load_state_dict(state | {"weights": {k: v for k, v in state["weights"].items() if "net.0" not in k}})
    again.complete(model)
    assert is_filed(again.weights["net.0.weight"])
    before = bits(model)
    nn.init.ones_(model.net[0].weight)
    assert same_bits(dict(again.weights), before)


class Looks(Big):
    """Looks where in memory what it loads is."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        place = checkpoint["state_dict"]["net.0.weight"].data_ptr()
        spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        ends = [(*(int(end, 16) for end in span[0].split("-")), span[-1]) for span in spans]
        type(self).place = next(name for begin, end, name in ends if begin <= place < end)


def test_loading_reads_from_the_file_what_the_model_takes(tmp_path: Path) -> None:
    model, path = Looks(), tmp_path / "file.ckpt"
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}, path)
    assert same_bits(bits(load_from_checkpoint(Looks, path)), bits(model))
    assert Looks.place == str(path)
    assert same_bits(bits(load_from_checkpoint(Looks, path, map_location="cpu", weights_only=False)), bits(model))
    assert Looks.place == str(path)


# -- on the disk -------------------------------------------------------------------------------------------------------


def on_disk(folder: Path, **settings: Any) -> DendriteCallback:
    return quick(dirpath=folder, best_on="disk", **settings)


@pytest.fixture(scope="module")
def in_memory() -> tuple[dict[str, Tensor], list[Any]]:
    dendrites, model = quick(), classifier()
    train(model, dendrites, max_epochs=EPOCHS)
    return bits(model), dendrites.history


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_on_the_disk_training_is_what_it_is_in_memory(in_memory: Any, tmp_path: Path) -> None:
    dendrites, model = on_disk(tmp_path / "best"), classifier()
    saver = keep_all(tmp_path)
    trainer = train(model, dendrites, saver, max_epochs=EPOCHS, enable_checkpointing=True)
    assert same_bits(bits(model), in_memory[0])
    assert dendrites.history == in_memory[1]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        assert state_in(torch.load(path, weights_only=True))["weights"] is None
    assert dendrites.state_dict()["best"]["weights"] is None
    file = Path(dendrites.best_model_path)
    assert file.parent == tmp_path / "best"
    assert len(names(file.parent)) <= 3, "the best, and those of the last two that checkpoints tell of"
    assert same_bits(bits(load_from_checkpoint(Classifier, file)), bits(model))


@pytest.mark.parametrize(("epochs", "then"), [(3, "memory"), (5, "disk"), (7, "moved")])
def test_on_the_disk_a_run_goes_on_to_the_same_bits(epochs: int, then: str, in_memory: Any, tmp_path: Path) -> None:
    """Within a correlation phase, too; in another directory, and with the best network in memory from then on."""
    folder, end = tmp_path / "a", tmp_path / "a" / "end.ckpt"
    saver = ModelCheckpoint(folder, "end", save_on_train_epoch_end=True, enable_version_counter=False)
    train(classifier(), on_disk(folder), saver, max_epochs=epochs, enable_checkpointing=True)
    if then == "moved":
        shutil.move(folder, tmp_path / "b")
        end = tmp_path / "b" / "end.ckpt"
    dendrites = quick() if then == "memory" else on_disk(tmp_path / ("a" if then == "disk" else "c"))
    model = classifier(seed=3)
    train(model, dendrites, max_epochs=EPOCHS, ckpt_path=end)
    assert same_bits(bits(model), in_memory[0])
    assert dendrites.history == in_memory[1]


@pytest.mark.parametrize("renamed", [False, True])
def test_the_file_of_the_best_network_is_a_checkpoint_to_go_on_from(renamed: bool, tmp_path: Path) -> None:
    first = on_disk(tmp_path / "a")
    train(classifier(), first, max_epochs=4)
    path = Path(first.best_model_path)
    if renamed:
        path = path.rename(tmp_path / "other.ckpt")
    ends = []
    for callback in (quick(), on_disk(tmp_path / "b")):
        model = classifier(seed=3)
        train(model, callback, max_epochs=8, ckpt_path=path)
        ends.append((bits(model), callback.history))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_on_the_disk_a_run_goes_on_from_memory(in_memory: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True)
    train(classifier(), quick(), saver, max_epochs=5, enable_checkpointing=True)
    dendrites, model = on_disk(tmp_path / "best"), classifier(seed=3)
    train(model, dendrites, max_epochs=EPOCHS, ckpt_path=tmp_path / "end.ckpt")
    assert same_bits(bits(model), in_memory[0])


@pytest.mark.parametrize(
    ("safe", "told"), [pytest.param([], {"weights_only": False}, marks=since_2_6), ([Mode], {})], ids=["told", "safe"]
)
def test_on_the_disk_a_run_goes_on_with_hyperparameters_that_are_trusted(
    safe: list[Any], told: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    saver = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True)
    train(Configured(Mode.FAST), on_disk(tmp_path), saver, max_epochs=4, enable_checkpointing=True)
    trainer = L.Trainer(callbacks=[dendrites := on_disk(tmp_path)], max_epochs=6, **QUIET)
    with torch.serialization.safe_globals(safe):
        trainer.fit(Configured(Mode.FAST), *loaders(), ckpt_path=tmp_path / "end.ckpt", **told)
    assert len(dendrites.history) > 2
    assert not {"load_checkpoint", "load_model_state_dict"} & vars(trainer.strategy).keys()


def resume(path: Path, folder: Path) -> None:
    train(classifier(), on_disk(folder), max_epochs=EPOCHS, ckpt_path=path)


def test_a_best_network_that_is_gone_or_another_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    saver = keep_all(tmp_path)
    dendrites = on_disk(folder)
    train(classifier(), dendrites, saver, max_epochs=6, enable_checkpointing=True)
    gone = tmp_path / "epoch=0.ckpt"
    with pytest.raises(MisconfigurationException, match=r"in the file 'best-4-.*\.ckpt'.*resume a newer checkpoint"):
        resume(gone, folder)
    newest = Path(dendrites.best_model_path)
    torch.save({"state_dict": {}, "callbacks": {}}, newest)
    with pytest.raises(MisconfigurationException, match=r"is another file than the one that the best network"):
        resume(tmp_path / "epoch=5.ckpt", folder)


def test_a_file_that_goes_during_the_fit_is_told(tmp_path: Path) -> None:
    class Cleans(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            shutil.rmtree(tmp_path / "best")

    with pytest.raises(ValueError, match=r"'.*/best-.*', which is not there any more"):
        train(classifier(), on_disk(tmp_path / "best"), Cleans(), max_epochs=EPOCHS)


def test_files_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    train(classifier(), on_disk(tmp_path), max_epochs=3)
    before = names(tmp_path)
    train(classifier(), on_disk(tmp_path), max_epochs=EPOCHS)
    assert before < names(tmp_path)
    assert len(names(tmp_path) - before) <= 3


def failing_save(count: int, error: BaseException) -> Callable[..., None]:
    save, calls = torch.save, []

    def failing(checkpoint: Any, file: Any) -> None:
        calls.append(file)
        if len(calls) == count:
            file.write(b"half")
            raise error
        save(checkpoint, file)

    return failing


@pytest.mark.parametrize("count", [1, 2])
def test_a_best_network_that_could_not_be_written(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is the best one all the same, and no half file is left."""
    dendrites, model = on_disk(tmp_path), classifier()
    monkeypatch.setattr(torch, "save", failing_save(count, OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        train(model, dendrites, max_epochs=EPOCHS)
    monkeypatch.undo()
    reference = classifier()
    train(reference, quick(), max_epochs=count)
    assert same_bits(bits(model), bits(reference))
    assert all(name.endswith(".ckpt") for name in names(tmp_path))
    assert (dendrites.best_model_path == "") == (count == 1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"best_on": "gpu"}, r"`best_on` must be one of \['memory', 'disk'\], got 'gpu'"),
        ({"best_on": "disk"}, r"`dirpath` must be a local directory with best_on='disk', got None"),
        (
            {"best_on": "disk", "dirpath": "memory://a"},
            "must be a local directory with best_on='disk', got 'memory://a'",
        ),
    ],
)
def test_arguments_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quick(**settings)
