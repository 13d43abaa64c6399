"""A run that is interrupted at the end of any epoch and resumed ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from tests.models import QUIET, Classifier, bits, classifier, loaders, optimizer_bits, quick, same_bits

EPOCHS = 13


def sgd_momentum(model: Classifier) -> Any:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def plateau(model: Classifier) -> Any:
    """Stepped in the last batch of the epoch: Lightning forgets an epoch-wise plateau step on a resume by itself."""
    optimizer = Adam(model.parameters(), lr=0.02)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    config = {"scheduler": scheduler, "monitor": "val_loss", "interval": "step", "frequency": 4}
    return {"optimizer": optimizer, "lr_scheduler": config}


def cosine(model: Classifier) -> Any:
    optimizer = AdamW(model.parameters(), lr=0.02)
    return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)]


def one_cycle_per_step(model: Classifier) -> Any:
    optimizer = Adam(model.parameters())
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=4 * EPOCHS)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def groups(model: Classifier) -> Any:
    """Groups in another order than the module's, with rates of their own."""
    decay = {"params": [model.net[4].weight, model.net[0].weight], "weight_decay": 0.1}
    rest = {"params": [model.net[4].bias, *model.net[1].parameters(), model.net[0].bias], "lr": 0.01}
    optimizer = AdamW([decay, rest], lr=0.02)
    return [optimizer], [lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.9**epoch, lambda epoch: 0.8**epoch])]


SETTINGS: dict[str, tuple[Callable[[Classifier], Any], dict[str, Any], dict[str, Any]]] = {
    "sgd": (sgd_momentum, {}, {}),
    "plateau": (plateau, {}, {}),
    "cosine": (cosine, {"gradient_clip_val": 0.1}, {}),
    "one cycle": (one_cycle_per_step, {}, {}),
    "groups": (groups, {}, {}),
    "no restart": (groups, {}, {"restart": False}),
    "accumulation": (plateau, {"accumulate_grad_batches": 3}, {}),
    "training metric": (cosine, {}, {"monitor": "train_loss"}),
    "accuracy with ties": (cosine, {}, {"monitor": "val_acc", "mode": "max", "base_epochs": None, "patience": 2}),
    "two validations an epoch": (plateau, {"val_check_interval": 0.5}, {}),
    "rejected sets": (sgd_momentum, {}, {"min_delta": 10.0}),
    "sparse validation": (cosine, {"check_val_every_n_epoch": 2}, {"base_epochs": 4}),
    "best in a file": (plateau, {}, {"dirpath": "best"}),
    "candidates by SGD": (cosine, {}, {"optimizer": lambda p: SGD(p, lr=0.5, momentum=0.5)}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_from_any_epoch_ends_with_the_same_bits(setting: str, tmp_path: Path) -> None:
    optimizers_of, trainer_settings, callback_settings = SETTINGS[setting]

    def fit(name: str, ckpt_path: Path | None = None) -> tuple[Any, ...]:
        settings = dict(callback_settings)
        dendrites = quick(settings.pop("monitor", "val_loss"), **settings)
        keep_all = ModelCheckpoint(
            tmp_path / name, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1
        )
        trainer = L.Trainer(
            max_epochs=EPOCHS,
            callbacks=[dendrites, keep_all],
            **(QUIET | {"enable_checkpointing": True} | trainer_settings),
        )
        model = classifier(optimizers_of)
        trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
        return bits(model), optimizer_bits(trainer.optimizers[0]), dendrites.history, dendrites.stop_reason

    weights, optimizer, history, reason = fit("whole")
    assert {record["phase"] for record in history} == {"base", "correlation"}
    for epoch in range(EPOCHS):
        path = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        if not path.exists():
            assert reason
            continue
        torch.load(path, weights_only=True)
        again = fit(f"from {epoch}", path)
        assert again[2:] == (history, reason), epoch
        assert same_bits(again[0], weights), epoch
        assert again[1] == optimizer, epoch
