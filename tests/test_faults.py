"""Signals, full disks, bad files and numbers that are not finite: nothing is lost and nothing left behind.

Exceptions are in test_exceptions.py; kills at random moments, in number, in faults/kill.py (``make test-faults``).
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.local as local_files
import lightning as L
import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils.data import ConcatDataset, DataLoader

from pl_dendrites import DendriteCallback, load_from_checkpoint
from pl_dendrites.core.growth.hooks import add_dendrites
from tests.faults import kill
from tests.models import QUIET, Classifier, bits, classifier, half, loaders, optimizer_bits, quick, same_bits, train
from tests.processes import process

EPOCHS = 9
# With phases of two epochs each.
PHASES = {"base": 1, "correlation": 3, "base on trial": 5, "second correlation": 7}


def process_wide() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomalies": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "compiler": eval_frame._stance,
        "SIGTERM": signal.getsignal(signal.SIGTERM),
    }


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """The process is afterwards as it was. SIGINT alone is Lightning's: it ignores it from the first one on.

    A process in a shell's background ignores it from the start.
    """
    before, handler = process_wide(), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    assert process_wide() == before


class Best(L.Callback):
    """Holds the best model so far, found by other means."""

    def __init__(self) -> None:
        self.score, self.weights = float("inf"), {}

    def on_validation_end(self, trainer, pl_module) -> None:
        score = float(trainer.callback_metrics["val_loss"])
        if not trainer.sanity_checking and score < self.score:
            self.score, self.weights = score, bits(pl_module)


class At(L.Callback):
    """Does something once, in a batch of an epoch."""

    def __init__(self, epoch: int, batch: int, act: Callable[[L.Trainer], None]) -> None:
        self.at, self.act = (epoch, batch), act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            self.act(trainer)


def user_model() -> Classifier:
    """One of its parameters is frozen by the user."""
    model = classifier()
    model.net[1].bias.requires_grad_(False)
    return model


def assert_left_well(trainer: L.Trainer, model: Classifier, best: Best | None = None) -> None:
    """Nothing stays in the way, and the model is the best one and finite."""
    state = bits(model)
    assert all(value.isfinite().all() for value in state.values())
    if best is not None:
        assert same_bits(state, best.weights)
    assert_untouched(model)
    assert "optimizer_step" not in vars(trainer.strategy)
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= trained


def assert_untouched(model: Classifier) -> None:
    plain = [(name, p) for name, p in model.named_parameters() if "dendrites" not in name]
    assert [name for name, p in plain if not p.requires_grad] == ["net.1.bias"]
    assert len(plain) == 6
    for module in model.modules():
        hooks = [add_dendrites] if hasattr(module, "dendrites") else []
        assert list(module._forward_hooks.values()) == hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    for layer in (model.net[0], model.net[4]):
        assert not hasattr(layer, "dendrites") or layer.dendrites.candidates is None


# -- signals ------------------------------------------------------------------------------------------------------


def send(number: int) -> Callable[[L.Trainer], None]:
    def act(trainer: L.Trainer) -> None:
        assert signal.getsignal(number) != signal.SIG_DFL  # else it would end the tests
        os.kill(os.getpid(), number)

    return act


def repeating() -> list[DataLoader]:
    """All batches are alike, for Lightning resumes in the middle of an epoch with its first batch."""
    train_set, val_set = (loader.dataset for loader in loaders())
    return [DataLoader(ConcatDataset([train_set] * 4), len(train_set)), DataLoader(val_set, 32)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_best_model_and_a_checkpoint_that_goes_on(number: int, tmp_path: Path) -> None:
    def fit(path: Path | None = None, *more: L.Callback) -> tuple[L.Trainer, Classifier, DendriteCallback]:
        dendrites, model = quick(), user_model()
        saver = ModelCheckpoint(tmp_path, "signal", save_on_exception=True, every_n_epochs=1000)
        saver._enable_version_counter = False
        trainer = L.Trainer(
            max_epochs=EPOCHS, callbacks=[dendrites, saver, *more], **(QUIET | {"enable_checkpointing": True})
        )
        if any(isinstance(callback, At) for callback in more):
            with pytest.raises(SystemExit):
                trainer.fit(model, *repeating())
        else:
            trainer.fit(model, *repeating(), ckpt_path=path)
        return trainer, model, dendrites

    whole, expected, all_of_it = fit()
    for phase, epoch in PHASES.items():
        # In the middle of an epoch and in its last batch.
        for batch in (1, 3) if phase == "correlation" else (1,):
            best = Best()
            trainer, model, dendrites = fit(None, At(epoch, batch, send(number)), best)
            assert_left_well(trainer, model, best)
            assert dendrites.history[-1]["phase"] in phase
            assert dendrites.history[-1]["reason"].startswith("interrupted by ")
            trainer, model, dendrites = fit(tmp_path / "signal.ckpt")
            assert dendrites.history == all_of_it.history, (phase, batch)
            assert same_bits(bits(model), bits(expected)), (phase, batch)
            assert optimizer_bits(trainer.optimizers[0]) == optimizer_bits(whole.optimizers[0]), (phase, batch)
            (tmp_path / "signal.ckpt").unlink()


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.long)])
def test_killed_runs_go_on_as_if_nothing_had_happened(kills: int, tmp_path: Path) -> None:
    """A few kills; `make test-faults` has fifty. In a process of its own, which forks: this one may have threads."""
    killing = process(tmp_path / "told", kill.main, "--kills", str(kills))
    killing.start()
    killing.join()
    told = (tmp_path / "told").read_text()
    assert told.endswith(f"{kills} of {kills} ended with the uninterrupted run's result.\n"), told


# -- a full disk --------------------------------------------------------------------------------------------------


class Disk:
    """Is full when a certain file is written for the n-th time: half of it is there, then comes the error.

    Args:
        name: of the file.
        count: n.
        moving: while Lightning's temporary file moves to another disk; else while it is written. Our own files do
            not move.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, count: int, moving: bool) -> None:
        self.name, self.left, self.full = name, count, False
        write, move, save = LocalFileOpener.write, shutil.move, torch.save

        def half_save(checkpoint: Any, file: Any) -> None:
            if not isinstance(file, io.BufferedWriter) or not self._is_now(file.name):
                return save(checkpoint, file)
            save(checkpoint, whole := io.BytesIO())
            file.write(whole.getvalue()[: whole.tell() // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def half_write(opener: LocalFileOpener, data: bytes) -> int:
            if moving or not self._is_now(opener.path):
                return write(opener, data)
            write(opener, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def half_move(source: str, target: str) -> Any:
            if not moving or not self._is_now(target):
                return move(source, target)
            data = Path(source).read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch, "save", half_save)
        monkeypatch.setattr(LocalFileOpener, "write", half_write)
        monkeypatch.setattr(local_files.shutil, "move", half_move)

    def _is_now(self, path: str) -> bool:
        self.left -= Path(path).name.startswith(self.name)
        now = self.left == 0 and not self.full
        self.full |= now
        return now


def keep_all(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)


@pytest.mark.parametrize("moving", [False, True], ids=["here", "on another disk"])
@pytest.mark.parametrize(("name", "count"), [("best.ckpt", 1), ("best.ckpt", 2), ("best.ckpt", 4), ("epoch=3", 1)])
def test_a_full_disk(name: str, count: int, moving: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = quick(dirpath=tmp_path / "whole best"), user_model()
    train(expected, whole, keep_all(tmp_path / "whole"), max_epochs=EPOCHS, enable_checkpointing=True)

    dendrites, model, best = quick(dirpath=tmp_path / "best"), user_model(), Best()
    trainer = L.Trainer(
        max_epochs=EPOCHS, callbacks=[best, dendrites, keep_all(tmp_path)], **(QUIET | {"enable_checkpointing": True})
    )
    with monkeypatch.context() as patches:
        disk = Disk(patches, name, count, moving)
        with pytest.raises(OSError, match="No space left"):
            trainer.fit(model, *loaders())
    assert disk.full
    assert_left_well(trainer, model, best)
    assert dendrites.history[-1]["reason"] == "interrupted by OSError"

    # best.ckpt is whole, or there is none and none is claimed; no other file holds on to the room there is.
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["best.ckpt"] * (
        dendrites.best_model_path != ""
    )
    assert (dendrites.best_model_path == "") == ((name, count) == ("best.ckpt", 1))
    if dendrites.best_model_path:
        load_from_checkpoint(Classifier, dendrites.best_model_path)

    # The run goes on from the last whole checkpoint, with room again.
    path, cut = kill.newest_whole(tmp_path)
    assert cut == (moving and name != "best.ckpt")  # Lightning's own
    dendrites, model = quick(dirpath=tmp_path / "best"), user_model()
    train(model, dendrites, max_epochs=EPOCHS, ckpt_path=path)
    assert dendrites.history == whole.history
    assert same_bits(bits(model), bits(expected))


def test_goes_on_from_a_checkpoint_that_a_full_disk_for_best_ckpt_caused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score that made a new best is not counted twice."""
    whole, expected = quick(dirpath=tmp_path / "whole"), user_model()
    train(expected, whole, max_epochs=EPOCHS)
    for count in (1, 2, 4):
        dendrites = quick(dirpath=tmp_path / "best")
        crash = ModelCheckpoint(tmp_path, f"crash {count}", save_on_exception=True, every_n_epochs=1000)
        with monkeypatch.context() as patches:
            Disk(patches, "best.ckpt", count, moving=False)
            with pytest.raises(OSError, match="No space left"):
                train(user_model(), dendrites, crash, max_epochs=EPOCHS, enable_checkpointing=True)
        dendrites, model = quick(dirpath=tmp_path / "best"), user_model()
        train(model, dendrites, max_epochs=EPOCHS, ckpt_path=tmp_path / f"crash {count}.ckpt")
        assert dendrites.history == whole.history
        assert same_bits(bits(model), bits(expected))


@pytest.mark.parametrize("place", ["{}/here", "file://{}/url", "memory://best"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_best_ckpt_is_written_wherever_and_however(place: str, later: bool, tmp_path: Path) -> None:
    dendrites, model = quick(dirpath=place.format(tmp_path)), user_model()
    train(model, dendrites, max_epochs=5, plugins=[AsyncCheckpointIO()] if later else None)
    assert same_bits(bits(load_from_checkpoint(Classifier, dendrites.best_model_path)), bits(model))


# -- files that are not what they should be -----------------------------------------------------------------------


class Other(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx) -> Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def truncated(path: Path) -> None:
    train(user_model(), quick(), keep_all(path.parent), max_epochs=5, enable_checkpointing=True)
    data = (path.parent / "epoch=4.ckpt").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def arbitrary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def of_another_model(path: Path) -> None:
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(Other(), loaders()[0])
    trainer.save_checkpoint(path)


def weights_alone(path: Path) -> None:
    torch.save(classifier().state_dict(), path)


def code(path: Path) -> None:
    torch.save({"state_dict": classifier().state_dict(), "callbacks": Code(path.parent / "ran")}, path)


def code_in_a_plain_pickle(path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump({"state_dict": Code(path.parent / "ran")}, file)


BAD_FILES = [truncated, empty, arbitrary, of_another_model, weights_alone, code, code_in_a_plain_pickle]
REFUSED = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError)


@pytest.mark.parametrize("write", BAD_FILES)
def test_a_resume_from_a_bad_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "bad.ckpt")
    dendrites, model = quick(), user_model()
    trainer = L.Trainer(max_epochs=3, callbacks=[dendrites], **QUIET)
    with pytest.raises(REFUSED):
        trainer.fit(model, *loaders(), ckpt_path=tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()
    assert_untouched(model)
    assert not any("dendrites" in key for key in bits(model))
    assert dendrites.history == []
    # The same objects still train.
    train(model, dendrites, max_epochs=5)
    assert dendrites.num_dendrites == 1


@pytest.mark.parametrize("write", BAD_FILES)
def test_load_from_a_bad_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "bad.ckpt")
    kind, says = (RuntimeError, "size mismatch|Missing key") if write is of_another_model else (ValueError, "bad.ckpt")
    with pytest.raises(kind, match=says):
        load_from_checkpoint(Classifier, tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_plain_run_with_other_callbacks_goes_on_and_grows(tmp_path: Path) -> None:
    """State of callbacks that are gone is left alone, as Lightning does; epochs count on."""
    saver = keep_all(tmp_path)
    train(user_model(), EarlyStopping("val_loss"), saver, max_epochs=2, enable_checkpointing=True)
    dendrites, model, best = quick(), user_model(), Best()
    trainer = train(model, dendrites, best, max_epochs=8, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert trainer.current_epoch == 8
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    assert dendrites.num_dendrites == 1
    assert_left_well(trainer, model, best)


# -- numbers that are not -----------------------------------------------------------------------------------------


class Spoilt(Classifier):
    """The loss, or the metric, is NaN from a batch of an epoch on: once or for good."""

    what, epoch, for_good = "", 0, False

    def spoils(self, what: str, batch_idx: int) -> bool:
        now, first = (self.current_epoch, batch_idx), (self.epoch, 1)
        return what == self.what and (now >= first if self.for_good else now == first)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.spoils("loss", batch_idx) else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.spoils("metric", batch_idx):
            self.log("val_loss", float("nan"))


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("what", ["loss", "metric"])
def test_a_loss_or_a_metric_that_turns_nan(what: str, phase: str, for_good: bool) -> None:
    torch.manual_seed(0)
    model = Spoilt()
    model.net[1].bias.requires_grad_(False)
    model.what, model.epoch, model.for_good = what, PHASES[phase], for_good
    dendrites, best = quick(restart=False), Best()
    trainer = train(model, dendrites, best, max_epochs=15)
    assert_left_well(trainer, model, best)
    assert len(dendrites.history) > 1
    if not for_good:
        assert dendrites.num_dendrites > 0


@pytest.mark.parametrize("phase", PHASES)
def test_a_loss_scale_that_overflows(phase: str) -> None:
    """Gradients are infinite until the scale has come down: candidates take no harm, and training goes on."""
    precision, high = half(init_scale=2.0**8), 2.0**25
    scaler = precision.scaler
    dendrites, model, best = quick(), user_model(), Best()
    act = At(PHASES[phase] - 1, 1, lambda trainer: scaler.update(high))
    trainer = train(model, dendrites, best, act, max_epochs=40, plugins=[precision])
    assert scaler.get_scale() < high
    assert_left_well(trainer, model, best)
    assert dendrites.stop_reason
    assert dendrites.num_dendrites > 0
    correlations = [record["correlation"] for record in dendrites.history if record["phase"] == "correlation"]
    assert all(0 < figures["mean"] <= 1 for record in correlations for figures in record.values())
