"""A run that is interrupted at the end of any epoch and resumed ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.combinations import COMBINATIONS, EPOCHS, Combination
from tests.models import QUIET, bits, optimizer_bits, quick, same_bits


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_resumed_from_any_epoch_ends_with_the_same_bits(combination: Combination, tmp_path: Path) -> None:
    def fit(name: str, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        dendrites = quick(**combination.callback)
        keep_all = ModelCheckpoint(
            tmp_path / name, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1
        )
        trainer = L.Trainer(
            callbacks=[dendrites, keep_all],
            **(QUIET | {"enable_checkpointing": True, "max_epochs": EPOCHS} | combination.trainer_settings()),
        )
        model = combination.make_model()
        trainer.fit(model, *combination.data(), ckpt_path=ckpt_path)
        optimizers = [optimizer_bits(optimizer) for optimizer in trainer.optimizers]
        return bits(model), optimizers, dendrites.history, dendrites.stop_reason

    weights, optimizers, history, reason = fit("whole")
    assert {record["phase"] for record in history} == {"base", "correlation"}
    paths = sorted((tmp_path / "whole").iterdir())
    assert len(paths) == sum(record["epochs"] for record in history) >= 8
    for path in paths:
        torch.load(path, weights_only=True)
        again = fit(f"from {path.stem}", path)
        assert again[2:] == (history, reason), path
        assert same_bits(again[0], weights), path
        assert again[1] == optimizers, path


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


@pytest.mark.parametrize("combination", ["sgd", "accumulation", "manual", "fp16", "two validations an epoch"])
def test_resumed_inside_any_epoch(combination: str, tmp_path: Path) -> None:
    """From a checkpoint of an epoch's last batch Lightning goes on without that epoch's validation: one epoch more."""
    chosen = COMBINATIONS[combination]

    def fit(name: str, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        dendrites = quick(**chosen.callback)
        by_step = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=1)
        settings = QUIET | {"enable_checkpointing": True, "max_epochs": -1} | chosen.trainer_settings()
        trainer = L.Trainer(callbacks=[dendrites, by_step], **settings)
        model = chosen.make_model()
        train, val = chosen.data()
        trainer.fit(model, Places(train.dataset), val, ckpt_path=ckpt_path)
        return bits(model), dendrites.history, dendrites.stop_reason

    weights, history, reason = fit("whole")
    exact = 0
    for path in sorted((tmp_path / "whole").iterdir()):
        again = fit(f"from {path.stem}", path)
        place = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if place["ready"] < 4:
            assert again[1:] == (history, reason), path
            assert same_bits(again[0], weights), path
            exact += 1
        else:
            assert [(r["phase"], r["epochs"]) for r in again[1]] == [(r["phase"], r["epochs"]) for r in history], path
            assert again[2] == reason, path
    assert exact >= 10


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
    def fit(*callbacks: L.Callback) -> tuple[EveryBatch, Any]:
        watch = EveryBatch()
        settings = QUIET | {"max_epochs": 4} | combination.trainer_settings()
        model = combination.make_model()
        L.Trainer(callbacks=[*callbacks, watch], **settings).fit(model, *combination.data())
        return watch, torch.get_rng_state()

    plain, random = fit()
    endless = {"max_dendrites": 0, "base_epochs": 100, "patience": 100}
    ours, random_with_ours = fit(quick(**(combination.callback | endless)))
    assert len(plain.seen) == len(ours.seen)
    for (one, optimizers), (other, others) in zip(plain.seen, ours.seen, strict=True):
        assert same_bits(one, other)
        assert optimizers == others
    assert torch.equal(random, random_with_ours)
