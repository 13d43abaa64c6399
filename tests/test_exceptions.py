"""An exception leaves the best model and an untouched Trainer, and a checkpoint that it wrote goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.optim import Adam, lr_scheduler
from torch.utils.data import DataLoader, Dataset

from pl_dendrites.core.growth.hooks import add_dendrites
from tests.models import QUIET, Classifier, bits, classifier, loaders, optimizer_bits, quick, same_bits, train

EPOCHS = 9
# With phases of two epochs each: base, correlation, base, correlation, ...
PHASES = {"first base": 1, "correlation": 3, "base on trial": 5, "second correlation": 7}
PLACES = ["train data", "training_step", "backward", "val data", "validation_step"]


class Boom(Exception):
    pass


class Fuse:
    """Blows at one place of one epoch, once."""

    def __init__(self, place: str = "", epoch: int = -1, batch: int = 0) -> None:
        self.at, self.epoch = (place, epoch, batch), 0

    def __call__(self, place: str, batch: int = 0) -> None:
        if (place, self.epoch, batch) == self.at:
            raise Boom


class Failing(Classifier):
    fuse: Fuse

    def on_train_start(self) -> None:
        self.fuse.epoch = self.current_epoch

    def on_train_epoch_end(self) -> None:
        self.fuse.epoch = self.current_epoch + 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.fuse("training_step", batch_idx)
        return super().training_step(batch, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        self.fuse("backward")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.fuse("validation_step", batch_idx)
        super().validation_step(batch, batch_idx)


class FailingData(Dataset):
    def __init__(self, data: Dataset, fuse: Fuse, place: str) -> None:
        self.data, self.fuse, self.place = data, fuse, place

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        self.fuse(self.place, i)
        return self.data[i]


def failing(fuse: Fuse) -> tuple[Failing, list[DataLoader]]:
    """A model, one of whose parameters the user froze, and its data."""
    torch.manual_seed(0)
    model = Failing()
    model.fuse = fuse
    model.net[1].bias.requires_grad_(False)
    model.optimizers_of = step_lr
    data = [
        DataLoader(FailingData(loader.dataset, fuse, place), loader.batch_size)
        for loader, place in zip(loaders(), ("train data", "val data"), strict=True)
    ]
    return model, data


def step_lr(model: nn.Module) -> Any:
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return [optimizer], [lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]


class Best(L.Callback):
    """Holds the best model so far, found by other means, and the schedulers."""

    score, weights, schedulers = float("inf"), None, None

    def on_train_start(self, trainer, pl_module) -> None:
        self.schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]

    def on_validation_end(self, trainer, pl_module) -> None:
        score = float(trainer.callback_metrics["val_loss"])
        if not trainer.sanity_checking and score < self.score:
            self.score, self.weights = score, bits(pl_module)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_leaves_the_best_model_and_the_trainer_as_it_was(place: str, phase: str) -> None:
    model, data = failing(Fuse(place, PHASES[phase], 1 if place.endswith("step") else 0))
    keys = dict(model.named_parameters()).keys()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    stopper, best, dendrites = EarlyStopping("train_loss", patience=100), Best(), quick()
    trainer = L.Trainer(callbacks=[dendrites, stopper, best], max_epochs=EPOCHS, **QUIET)
    strategy = dict.fromkeys(vars(trainer.strategy))
    with pytest.raises(Boom):
        trainer.fit(model, *data)

    assert {name: p.requires_grad for name, p in model.named_parameters() if name in keys} == flags
    assert same_bits(bits(model), best.weights)
    assert vars(trainer.strategy).keys() == strategy.keys()
    assert [config.scheduler for config in trainer.lr_scheduler_configs] == best.schedulers
    assert "_run_early_stopping_check" not in vars(stopper)
    for layer in (model.net[0], model.net[4]):
        assert layer.dendrites.candidates is None
        assert list(layer._forward_hooks.values()) == [add_dendrites]
    assert not any("candidates" in name for name, _ in model.named_modules())

    last = dendrites.history[-1]
    assert last["reason"] == "interrupted by Boom"
    assert last["phase"] == ("correlation" if "correlation" in phase else "base")
    assert dendrites.phase == "base"
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == sum(p.requires_grad for p in model.parameters())

    # Nothing is in the way of a new fit with the same objects.
    model.fuse.at = ("", -1, 0)
    again = L.Trainer(callbacks=[dendrites], max_epochs=3, **QUIET)
    again.fit(model, *data)
    assert dendrites.history[0]["best_score"] is not None
    assert "interrupted" not in dendrites.summary()


class SaveFirst(L.Callback):
    """Saves on an exception before the DendriteCallback hears of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer, pl_module, exception) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("every", [EPOCHS, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("number", "saved_by", "settings"),
    [
        (0, "ModelCheckpoint", {}),
        (1, "a callback before", {}),
        (2, "ModelCheckpoint", {"min_delta": 10.0, "restart": False}),
        (3, "a callback before", {"min_delta": 10.0, "restart": False}),
    ],
    ids=["helps-ModelCheckpoint", "helps-before", "does not help-ModelCheckpoint", "does not help-before"],
)
def test_resumed_after_an_exception_ends_with_the_same_bits(
    number: int, saved_by: str, settings: dict[str, Any], every: int, tmp_path: Path
) -> None:
    """For time's sake in one epoch of each place, in another one in the next case; and in all of them (long).

    ModelCheckpoint always comes after: Lightning moves it to the end of the list, wherever the user put it.
    """

    def fit(fuse: Fuse, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        saver: L.Callback
        if saved_by == "ModelCheckpoint":
            saver = ModelCheckpoint(tmp_path, "crash", save_on_exception=True, every_n_epochs=1000)
            saver._enable_version_counter = False
        else:
            saver = SaveFirst(tmp_path / "crash.ckpt")
        dendrites = quick(**settings)
        trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[saver, dendrites], **(QUIET | {"enable_checkpointing": True}))
        model, data = failing(fuse)
        trainer.fit(model, *data, ckpt_path=ckpt_path)
        return bits(model), optimizer_bits(trainer.optimizers[0]), dendrites.history, dendrites.stop_reason

    weights, optimizer, history, reason = fit(Fuse())
    assert {record["phase"] for record in history} == {"base", "correlation"}
    path = tmp_path / "crash.ckpt"
    for place, epochs in {
        "training_step": (1, 4, 7, 2, 3, 5, 6, 8),
        "backward": (2, 3, 7),  # correlation phases: in a base phase a forward pass has moved BatchNorm's buffers
        "validation_step": (1, 3, 4),
    }.items():
        for epoch in epochs[number % every :: every]:
            with pytest.raises(Boom):
                fit(Fuse(place, epoch))
            torch.load(path, weights_only=True)
            again = fit(Fuse(), path)
            assert again[2:] == (history, reason), (place, epoch)
            assert same_bits(again[0], weights), (place, epoch)
            assert again[1] == optimizer, (place, epoch)
            path.unlink()


@pytest.mark.parametrize("epoch", [2, 4])
def test_resumed_after_an_exception_in_a_resume(epoch: int, tmp_path: Path) -> None:
    """A sanity check, or another callback's hook, comes before a resumed correlation phase is back in place."""
    path = tmp_path / "crash.ckpt"

    class Starting(L.Callback):
        def __init__(self, fuse: Fuse) -> None:
            self.fuse = fuse

        def on_train_start(self, trainer, pl_module) -> None:
            self.fuse("on_train_start")

    def fit(fuse: Fuse, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        dendrites, (model, data) = quick(), failing(fuse)
        trainer = L.Trainer(
            max_epochs=EPOCHS,
            callbacks=[Starting(fuse), dendrites, OnExceptionCheckpoint(tmp_path, "crash")],
            **(QUIET | {"enable_checkpointing": True}),
        )
        trainer.fit(model, *data, ckpt_path=ckpt_path)
        return bits(model), optimizer_bits(trainer.optimizers[0]), dendrites.history

    weights, optimizer, history = fit(Fuse())
    with pytest.raises(Boom):
        fit(Fuse("training_step", epoch))
    with pytest.raises(Boom):
        fit(Fuse("on_train_start", 0), path)
    again = fit(Fuse(), path)
    assert again[1:] == (optimizer, history)
    assert same_bits(again[0], weights)


def test_candidates_that_get_no_optimizer_leave_nothing_frozen_and_a_resume_starts_them(tmp_path: Path) -> None:
    def refuse(parameters: Any) -> Any:
        raise Boom

    whole = quick()
    train(classifier(), whole)
    model = classifier()
    with pytest.raises(Boom):
        train(
            model,
            quick(optimizer=refuse),
            ModelCheckpoint(tmp_path, "interrupted", save_on_exception=True),
            enable_checkpointing=True,
        )
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(layer.dendrites.candidates for layer in (model.net[0], model.net[4]))
    (path,) = tmp_path.iterdir()
    again, resumed = quick(), classifier()
    train(resumed, again, ckpt_path=path)
    assert [(r["phase"], r["epochs"]) for r in again.history] == [(r["phase"], r["epochs"]) for r in whole.history]


# -- the state of the exception lapses ----------------------------------------------------------------------------


def by_hand(model: Failing) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = loaders()[0].dataset.tensors
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def set_a_weight(model: Failing) -> None:
    nn.init.zeros_(model.net[0].weight)


def set_a_buffer(model: Failing) -> None:
    model.net[1].running_mean += 1


@pytest.mark.parametrize("change", [by_hand, set_a_weight, set_a_buffer])
@pytest.mark.parametrize("epoch", [0, 3, 5], ids=["before any score", "correlation", "base on trial"])
def test_what_is_saved_after_the_model_went_on_is_the_model(epoch: int, change: Any, tmp_path: Path) -> None:
    model, data = failing(Fuse("training_step", epoch, 1))
    dendrites = quick()
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[dendrites], **QUIET)
    with pytest.raises(Boom):
        trainer.fit(model, *data)
    trainer.validate(model, data[1], verbose=False)
    trainer.save_checkpoint(tmp_path / "exception.ckpt")
    at_exception = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    assert at_exception["callbacks"][dendrites.state_key]["machine"]["phase"] == PHASE_AT[epoch]
    change(model)
    trainer.save_checkpoint(tmp_path / "changed.ckpt")
    changed = torch.load(tmp_path / "changed.ckpt", weights_only=True)
    assert same_bits(changed["state_dict"], bits(model))
    assert changed["callbacks"][dendrites.state_key]["machine"]["phase"] == "base"
    again = quick()
    train(failing(Fuse())[0], again, ckpt_path=tmp_path / "changed.ckpt")
    assert again.stop_reason


PHASE_AT = {0: "base", 3: "correlation", 5: "base"}
