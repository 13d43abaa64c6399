"""A run that is interrupted at the end of any epoch and resumed ends as if nothing had happened."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from tests.combinations import COMBINATIONS, EPOCHS, Combination
from tests.models import QUIET, bits, classifier, loaders, optimizer_bits, quick, same_bits


def fit(
    combination: Combination, saver: ModelCheckpoint, ckpt_path: Path | None = None, train: Any = None
) -> tuple[dict[str, Tensor], list[Any], list[dict[str, Any]], str]:
    """Weights, optimizer state, history and stop reason of a run."""
    dendrites, model = quick(**combination.callback), combination.make_model()
    settings = {"enable_checkpointing": True, "max_epochs": EPOCHS} | combination.trainer_settings()
    trainer = L.Trainer(callbacks=[dendrites, saver], **(QUIET | settings))
    usual, val = combination.data()
    trainer.fit(model, usual if train is None else train(usual.dataset), val, ckpt_path=ckpt_path)
    optimizers = [optimizer_bits(optimizer) for optimizer in trainer.optimizers]
    return bits(model), optimizers, dendrites.history, dendrites.stop_reason


def assert_same(run: tuple[Any, ...], other: tuple[Any, ...], where: Path) -> None:
    assert run[2:] == other[2:], where
    assert same_bits(run[0], other[0]), where
    assert run[1] == other[1], where


def without_scores(run: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*run[:2], [{**record, "scores": None} for record in run[2]], *run[3:])


def phases(history: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["phase"], record["epochs"]) for record in history]


@pytest.mark.parametrize(
    "every", [EPOCHS, pytest.param(4, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("number", "combination"), enumerate(COMBINATIONS.values()), ids=COMBINATIONS.keys())
def test_resumed_from_any_epoch_ends_with_the_same_bits(
    number: int, combination: Combination, every: int, tmp_path: Path
) -> None:
    """For time's sake from one epoch, and from every fourth (long): from another one in the next combination."""

    def saver(name: str) -> ModelCheckpoint:
        folder = tmp_path / name
        return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)

    whole = fit(combination, saver("whole"))
    gradient = combination.callback.get("learning") == "gradient"
    assert {record["phase"] for record in whole[2]} == {"base"} | ({"correlation"} if not gradient else set())
    assert sum(record["accepted"] is not None for record in whole[2]) >= 1  # sets were tried
    paths = sorted((tmp_path / "whole").iterdir())
    assert len(paths) == sum(record["epochs"] for record in whole[2]) >= 8
    for path in paths[number % min(every, len(paths)) :: every]:
        torch.load(path, weights_only=True)
        assert_same(fit(combination, saver(f"from {path.stem}"), path), whole, path)


AFTER_VALIDATION = ["sgd", "groups", "accuracy with ties", "sparse validation", "GAN", "fp16"]


@pytest.mark.versions
@pytest.mark.parametrize("every", [5, pytest.param(2, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("combination", AFTER_VALIDATION)
def test_resumed_from_any_validation_ends_with_the_same_bits(combination: str, every: int, tmp_path: Path) -> None:
    """Lightning ends such an epoch again, with nothing trained in between."""

    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, save_on_train_epoch_end=False)

    chosen = COMBINATIONS[combination]
    whole = fit(chosen, saver("whole"))
    paths = sorted((tmp_path / "whole").iterdir())
    assert len(paths) >= 6
    for path in paths[every // 2 :: every]:
        place = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if place["ready"] == 4:  # others go on inside an epoch, with its first batch
            assert_same(fit(chosen, saver(f"from {path.stem}"), path), whole, path)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_a_metric_of_training_that_a_resume_lost_is_no_error(every: int, tmp_path: Path) -> None:
    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, save_on_train_epoch_end=False)

    chosen = COMBINATIONS["training metric"]
    whole = fit(chosen, saver("whole"))
    for path in sorted((tmp_path / "whole").iterdir())[::every]:
        assert phases(fit(chosen, saver(f"from {path.stem}"), path)[2]) == phases(whole[2])


class Places(DataLoader):
    """A loader that Lightning can put back to where it was: the usual data, in order."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, 32)
        self.place = self.start = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.start, self.place = self.start, 0, 0
        for i, batch in enumerate(super().__iter__()):
            self.place = i + 1
            if i >= start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"]


@pytest.mark.versions
@pytest.mark.parametrize(
    "every", [13, pytest.param(5, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("combination", ["sgd", "manual", "fp16", "two validations an epoch"])
def test_resumed_inside_any_epoch(combination: str, every: int, tmp_path: Path) -> None:
    """From a checkpoint of the batch before a validation Lightning goes on without that: perhaps one epoch more.

    From every 13th or every fifth batch: of four in an epoch each has its turn.
    """

    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=1)

    chosen = COMBINATIONS[combination]
    endless = replace(chosen, trainer=lambda: {**chosen.trainer_settings(), "max_epochs": -1})
    whole, exact = fit(endless, saver("whole"), train=Places), 0
    for path in sorted((tmp_path / "whole").iterdir())[::every]:
        again = fit(endless, saver(f"from {path.stem}"), path, train=Places)
        place = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if place["ready"] < 4:
            lost = combination == "two validations an epoch" and place["ready"] == 2
            assert_same(without_scores(again) if lost else again, without_scores(whole) if lost else whole, path)
            exact += 1
        else:
            assert phases(again[2]) == phases(whole[2]), path
            assert again[3] == whole[3], path
    assert exact >= 9 / every


class EveryBatch(L.Callback):
    """Weights and optimizer state after each batch, and the scores of each validation."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((bits(pl_module), [optimizer_bits(optimizer) for optimizer in trainer.optimizers]))

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seen.append((dict(trainer.callback_metrics), None))


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_a_callback_that_never_grows_changes_no_bit(combination: Combination) -> None:
    def watched(*callbacks: L.Callback) -> tuple[EveryBatch, Any]:
        watch = EveryBatch()
        settings = QUIET | {"max_epochs": 3} | combination.trainer_settings()
        model = combination.make_model()
        L.Trainer(callbacks=[*callbacks, watch], **settings).fit(model, *combination.data())
        return watch, torch.get_rng_state()

    plain, random = watched()
    endless = {"max_dendrites": 0, "base_epochs": 100, "patience": 100}
    ours, random_with_ours = watched(quick(**(combination.callback | endless)))
    assert len(plain.seen) == len(ours.seen)
    for (one, optimizers), (other, others) in zip(plain.seen, ours.seen, strict=True):
        assert same_bits(one, other)
        assert optimizers == others
    assert torch.equal(random, random_with_ours)


def test_resumed_from_the_best_network_of_a_training_metric_every_phase_is_as_long(tmp_path: Path) -> None:
    """It is written when the score is known, and that epoch is over then."""

    class KeepAll(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch:
                shutil.copy(tmp_path / "best.ckpt", tmp_path / f"{trainer.current_epoch - 1}.ckpt")

    def run(ckpt_path: Path | None) -> list[tuple[str, int, int]]:
        own = tmp_path if ckpt_path is None else tmp_path / "again"
        dendrites = quick("train_loss", base_epochs=3, max_dendrites=1, dirpath=own)
        keep = [KeepAll()] if ckpt_path is None else []
        trainer = L.Trainer(callbacks=[dendrites, *keep], max_epochs=20, **QUIET)
        trainer.fit(classifier(), loaders()[0], ckpt_path=ckpt_path)
        return [(record["phase"], record["epochs"], len(record["scores"])) for record in dendrites.history]

    whole = run(None)
    assert whole == [("base", 3, 3), ("correlation", 2, 0), ("base", 3, 3)]
    assert run(tmp_path / "2.ckpt") == whole
