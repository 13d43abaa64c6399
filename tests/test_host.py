"""Reaching into the Trainer: its loops run while its optimizers stand still."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler

from pl_dendrites import attach
from pl_dendrites.training.stand_still import StandStill
from pl_dendrites.training.trainer import wrap
from tests.models import Classifier, classifier, quick, train


class Inspect(L.Callback):
    """What stands in the Trainer at every batch."""

    def __init__(self, dendrites: Any) -> None:
        self.dendrites = dendrites
        self.rows: list[tuple[str, set[str], int, int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        shadows = {"optimizer_step", "backward"} & vars(trainer.strategy).keys()
        self.rows.append((self.dendrites.phase, shadows, len(trainer.lr_scheduler_configs), trainer.global_step))


def test_the_strategy_and_the_schedulers_of_a_correlation_phase(tmp_path: Path) -> None:
    def optimizers_of(model: Classifier) -> Any:
        optimizer = Adam(model.parameters(), lr=0.02)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1)]

    dendrites = quick(max_dendrites=1)
    inspect = Inspect(dendrites)
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    by_step = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
    stopper = EarlyStopping("train_loss", patience=100)
    trainer = train(classifier(optimizers_of), dendrites, inspect, keep, by_step, stopper, enable_checkpointing=True)
    assert [row[0] for row in inspect.rows] == ["base"] * 8 + ["correlation"] * 8 + ["base"] * 8
    for phase, shadows, schedulers, _ in inspect.rows:
        assert "optimizer_step" in shadows or phase == "base"
        assert not shadows or phase == "correlation"
        assert schedulers == (0 if phase == "correlation" else 1)
    assert [row[3] for row in inspect.rows] == list(range(1, 25))
    assert trainer.global_step == 24
    assert {path.name for path in tmp_path.iterdir()} == {
        *[f"epoch={epoch}.ckpt" for epoch in range(6)],
        *[f"step={step}.ckpt" for step in range(3, 25, 3)],
    }


def test_stand_still_alone() -> None:
    """Closures run, nothing steps, and one release gives everything back, however often it is called."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = SGD([parameter], lr=0.1)
    stopper = EarlyStopping("x")
    scheduler = SimpleNamespace(scheduler=lr_scheduler.StepLR(optimizer, 1))
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[stopper])
    model = classifier()
    trainer.strategy.connect(model)
    trainer.strategy.optimizers = [optimizer]
    before = vars(trainer.strategy).keys() - {"lr_scheduler_configs"}
    attributes = vars(model).keys()
    configs = trainer.strategy.lr_scheduler_configs = [scheduler]
    loop = trainer.fit_loop.epoch_loop
    of_loop = set(vars(loop))
    still = StandStill(trainer, validate=False)
    assert not loop._should_check_val_fx(None)
    assert trainer.strategy.lr_scheduler_configs == []
    assert still.scheduler_states() == [scheduler.scheduler.state_dict()]
    assert not still.stepped
    assert trainer.strategy.optimizer_step(optimizer, lambda: "loss", model=None) == "loss"
    assert still.stepped
    assert parameter.tolist() == [0.0, 0.0]
    assert stopper._run_early_stopping_check(trainer) is None
    for _ in range(2):
        still.release()
        assert trainer.strategy.lr_scheduler_configs is configs
        assert vars(trainer.strategy).keys() - {"lr_scheduler_configs"} == before
        assert vars(model).keys() == attributes
        assert set(vars(loop)) == of_loop
        assert not optimizer._optimizer_step_pre_hooks
        assert "_run_early_stopping_check" not in vars(stopper)


@pytest.mark.parametrize("own", [None, ["net.0.bias"]])
def test_ddp_spares_itself_the_constants_of_dendrites_and_nothing_else(own: list[str] | None) -> None:
    """Before each forward pass it copies the first process' buffers, and these never change."""

    class DDPStrategy:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.left_out = model, list[str]()

        def configure_ddp(self) -> None:
            self.left_out = list(self.model._ddp_params_and_buffers_to_ignore)

    model = classifier()
    network = attach(model, ["net.0"], fan_in=2)
    network.grow(["net.0"])
    if own is not None:
        model._ddp_params_and_buffers_to_ignore = own
    strategy = DDPStrategy(model)
    wrap(SimpleNamespace(strategy=strategy, lightning_module=model))
    constants = ["net.0.dendrites.0.code", "net.0.dendrites.0.nodes.inputs"]
    assert sorted(strategy.left_out) == sorted([*(own or []), *constants])
    assert getattr(model, "_ddp_params_and_buffers_to_ignore", None) == own
