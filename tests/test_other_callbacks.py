"""Every callback that Lightning ships works beside DendriteCallback, before or after it in the list, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as shipped
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from pl_dendrites import DendriteCallback, load_from_checkpoint
from tests.models import AVERAGING, QUIET, Classifier, bits, classifier, loaders, quick, same_bits, train

# Of finders, which Lightning moves to the start of the list, and of what saves, to its end, one place will do.
BEFORE_AND_AFTER = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])


def fit(other: L.Callback, before: bool, dendrites: DendriteCallback, model: Any = None, **settings: Any) -> L.Trainer:
    callbacks = [other, dendrites] if before else [dendrites, other]
    return train(classifier() if model is None else model, *callbacks, **settings)


def validated(model: L.LightningModule) -> float:
    return L.Trainer(**QUIET).validate(model, loaders()[1], verbose=False)[0]["val_loss"]


# -- those that work ----------------------------------------------------------------------------------------------


class Writer(BasePredictionWriter):
    """Has nothing to do in a fit."""


WORKS: dict[str, tuple[Callable[[], L.Callback], dict[str, Any]]] = {
    "BasePredictionWriter": (lambda: Writer("batch"), {}),
    "Callback": (L.Callback, {}),
    "DeviceStatsMonitor": (lambda: DeviceStatsMonitor(cpu_stats=True), {"logger": True}),
    "EarlyStopping": (lambda: EarlyStopping("val_acc", mode="max", patience=100), {}),
    "LambdaCallback": (lambda: LambdaCallback(on_train_epoch_end=lambda *_: None), {}),
    "LearningRateMonitor": (LearningRateMonitor, {"logger": True}),
    "ModelCheckpoint": (ModelCheckpoint, {"enable_checkpointing": True}),
    "ModelSummary": (ModelSummary, {"enable_model_summary": True}),
    "OnExceptionCheckpoint": (lambda: OnExceptionCheckpoint("."), {"enable_checkpointing": True}),
    "RichModelSummary": (RichModelSummary, {"enable_model_summary": True}),
    "RichProgressBar": (RichProgressBar, {"enable_progress_bar": True}),
    "SpikeDetection": (lambda: SpikeDetection(warmup=2), {}),
    "ThroughputMonitor": (lambda: ThroughputMonitor(lambda batch: len(batch[0]), window_size=2), {"logger": True}),
    "Timer": (lambda: Timer({"hours": 1}), {}),
    "TQDMProgressBar": (TQDMProgressBar, {"enable_progress_bar": True}),
}
IN_TESTS_OF_THEIR_OWN = {"GradientAccumulationScheduler", "LearningRateFinder", "BatchSizeFinder"}
BASES = {"Checkpoint", "ProgressBar"}


@cache
def alone() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """History and weights of the run that nothing stands beside."""
    dendrites, model = quick(), classifier()
    train(model, dendrites)
    return dendrites.history, bits(model)


@BEFORE_AND_AFTER
@pytest.mark.parametrize("name", WORKS)
def test_it_changes_nothing(name: str, before: bool, tmp_path: Path) -> None:
    make, settings = WORKS[name]
    beside, same = quick(), classifier()
    if settings.get("logger"):
        settings = settings | {"logger": CSVLogger(tmp_path), "log_every_n_steps": 2}
    fit(make(), before, beside, same, **settings)
    assert beside.num_dendrites > 0
    history, weights = alone()
    assert beside.history == history
    assert same_bits(bits(same), weights)


def test_the_best_of_modelcheckpoint_is_a_real_model_under_its_true_score(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min", save_last=True, save_top_k=3)
    dendrites = quick()
    train(classifier(), keep, dendrites, enable_checkpointing=True)
    assert keep.best_model_score.item() == dendrites.best_model_score
    for path, score in keep.best_k_models.items():
        assert validated(load_from_checkpoint(Classifier, path)) == score.item()
    load_from_checkpoint(Classifier, keep.last_model_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_train_steps": 3},
        {"save_on_train_epoch_end": True},
        {"save_on_train_epoch_end": False},
        {"save_weights_only": True, "every_n_epochs": 1},
    ],
    ids=lambda settings: next(iter(settings)) + str(next(iter(settings.values()))),
)
def test_every_file_of_modelcheckpoint_loads(settings: dict[str, Any], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **settings)
    trainer = train(classifier(), saver, quick(), enable_checkpointing=True)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) >= min(trainer.current_epoch, trainer.global_step // 3)
    counts = {load_from_checkpoint(Classifier, file).net[0] for file in files}
    assert {layer.dendrites.count if hasattr(layer, "dendrites") else 0 for layer in counts} == {0, 1, 2}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("phase", ["base", "correlation"])
def test_timer_stops_in_time_and_the_best_comes_back(phase: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    dendrites, model = quick(), classifier()

    def late(trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (dendrites.phase, dendrites.cycle, batch_idx) == (phase, 1, 1):
            clock.now += 3600.0
            module.net[4].weight.data.zero_()  # so that the last network is not the best

    callbacks = [Timer({"minutes": 30}), dendrites]
    trainer = train(model, LambdaCallback(on_train_batch_end=late), *(callbacks if before else reversed(callbacks)))
    assert trainer.global_step == 4 * (2 if phase == "correlation" else 4) + 2
    assert dendrites.history[-1]["reason"] == "training ended"
    assert dendrites.history[-1]["phase"] == phase
    assert validated(model) == dendrites.best_model_score


@BEFORE_AND_AFTER
def test_learning_rates_are_logged_in_every_epoch(before: bool, tmp_path: Path) -> None:
    def decaying(model: Classifier) -> Any:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("epoch")
    fit(monitor, before, quick(max_dendrites=1), classifier(decaying), logger=logger)
    logger.save()
    rates = [row["lr-Adam"] for row in logger.experiment.metrics if "lr-Adam" in row] or monitor.lrs["lr-Adam"]
    # Read before an epoch's first batch, in which a phase changes: the restart at 0.02 shows one epoch later, stepped.
    assert rates == [0.02, 0.01, 0.005, 0.005, 0.005, 0.01]


@BEFORE_AND_AFTER
def test_candidates_step_as_often_as_the_accumulation_of_the_epoch_says(before: bool) -> None:
    steps: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(1)
            return super().step(closure)

    dendrites = quick(max_dendrites=1, max_correlation_epochs=3, optimizer=lambda p: Counting(p, lr=0.1))
    fit(GradientAccumulationScheduler({0: 1, 3: 2, 4: 3}), before, dendrites)
    assert len(steps) == 4 + 2 + 2
    assert dendrites.num_dendrites == 1


class Tunable(Classifier):
    learning_rate = 0.02

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


def tunable() -> Tunable:
    torch.manual_seed(0)
    return Tunable()


def test_growth_works_with_the_learning_rate_that_a_finder_found() -> None:
    """Before version 2.5.4 Lightning does not tell the optimizer of it; nor does it then beside us."""

    def rates(model: Tunable, trainer: L.Trainer) -> tuple[float, float]:
        return model.learning_rate, trainer.optimizers[0].param_groups[0]["lr"]

    dendrites, model, plain = quick(), tunable(), tunable()
    trainer = train(model, dendrites, LearningRateFinder(num_training_steps=20))
    without = train(plain, LearningRateFinder(num_training_steps=20), max_epochs=6)
    assert model.learning_rate != 0.02
    assert rates(model, trainer) == rates(plain, without)
    assert [record["epochs"] for record in dendrites.history[:3]] == [2, 2, 2]
    assert dendrites.num_dendrites > 0
    assert validated(model) == dendrites.best_model_score


def test_a_finder_leaves_the_state_of_a_model_that_has_grown_before() -> None:
    """It saves before our fit starts, and loads that again."""
    torch.manual_seed(7)
    model = Tunable()
    train(model, quick(max_dendrites=1))
    dendrites = quick(max_dendrites=1)
    train(model, dendrites, LearningRateFinder(num_training_steps=20))
    assert [(record["phase"], record["dendrites"]) for record in dendrites.history] == [("base", 1)]
    assert dendrites.state_dict()["seed"] == 7


def test_a_search_by_the_tuner_leaves_the_model_as_it_was() -> None:
    dendrites, model = quick(), tunable()
    before = bits(model)
    trainer = L.Trainer(callbacks=[dendrites], **(QUIET | {"max_epochs": -1}))
    found = Tuner(trainer).lr_find(model, *loaders(), num_training=20)
    assert model.learning_rate == found.suggestion()
    assert same_bits(bits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    trainer.fit(model, *loaders())
    assert trainer.optimizers[0].param_groups[0]["lr"] == found.suggestion()
    assert dendrites.num_dendrites > 0


class Data(L.LightningDataModule):
    batch_size = 4

    def train_dataloader(self) -> DataLoader:
        return DataLoader(loaders()[0].dataset, self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(loaders()[1].dataset, self.batch_size)


def test_growth_works_with_the_batch_size_that_a_finder_found() -> None:
    without = Data()
    plain = L.Trainer(callbacks=[BatchSizeFinder(max_trials=3)], **(QUIET | {"max_epochs": 1}))
    plain.fit(classifier(), datamodule=without)
    dendrites, model, data = quick(max_dendrites=1), classifier(), Data()
    trainer = L.Trainer(callbacks=[dendrites, BatchSizeFinder(max_trials=3)], **(QUIET | {"max_epochs": -1}))
    trainer.fit(model, datamodule=data)
    assert data.batch_size == without.batch_size > 4
    assert [record["epochs"] for record in dendrites.history] == [2, 2, 2]
    score = trainer.validate(model, datamodule=data, verbose=False)[0]["val_loss"]
    assert score == dendrites.best_model_score


@pytest.mark.parametrize("cycle", [0, 1])
def test_on_exception_checkpoint_goes_on(cycle: int, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        if dendrites.cycle == cycle:
            raise OSError("the disk")

    whole, dendrites, again = quick(), quick(), quick()
    train(classifier(), whole)
    callbacks = [OnExceptionCheckpoint(tmp_path), dendrites, LambdaCallback(on_train_epoch_end=fail)]
    with pytest.raises(OSError, match="the disk"):
        train(classifier(), *callbacks, enable_checkpointing=True)
    load_from_checkpoint(Classifier, tmp_path / "on_exception.ckpt")
    train(classifier(), again, ckpt_path=tmp_path / "on_exception.ckpt")
    assert again.num_dendrites == whole.num_dendrites > 0


# -- those that are refused ---------------------------------------------------------------------------------------


class MyFinetuning(BaseFinetuning):
    """Of a user."""


class MyPruning(ModelPruning):
    """Of a user."""


REFUSED: dict[str, tuple[Callable[[], L.Callback], str]] = {
    "BackboneFinetuning": (BackboneFinetuning, "thaws layers .* Finetune in a first fit"),
    "BaseFinetuning": (MyFinetuning, "thaws layers .* Finetune in a first fit"),
    "ModelPruning": (lambda: MyPruning("l1_unstructured", amount=0.5), "renames weights .* Remove it"),
    "StochasticWeightAveraging": (lambda: StochasticWeightAveraging(0.1), "averages the weights .* Remove it"),
    **{kind.__name__: (kind, "averages the weights .* Remove it") for kind in AVERAGING},
}


@BEFORE_AND_AFTER
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_any_training(name: str, before: bool) -> None:
    make, says = REFUSED[name]
    other, model = make(), classifier()
    weights = bits(model)
    # Lightning sets up callbacks in their order: one before ours may have begun by then.
    dendrites = quick()
    trainer = L.Trainer(callbacks=[other, dendrites] if before else [dendrites, other], **QUIET)
    with pytest.raises(MisconfigurationException, match=rf"{type(other).__name__} {says}"):
        dendrites.setup(trainer, model, "fit")
    assert same_bits(bits(model), weights)
    if not before:
        with pytest.raises(MisconfigurationException, match=says):
            trainer.fit(model, *loaders())


def test_every_callback_that_lightning_ships_is_tried_or_refused() -> None:
    known = WORKS.keys() | REFUSED.keys() | IN_TESTS_OF_THEIR_OWN | BASES
    assert set(shipped.__all__) <= known
