"""The callback is configured in YAML as in code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI

from pl_dendrites import DendriteCallback
from tests.models import Classifier, loaders

CONFIG = """
trainer:
  max_epochs: 6
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: pl_dendrites.DendriteCallback
      init_args:
        monitor: val_loss
        base_epochs: 2
        max_correlation_epochs: 2
        max_dendrites: 1
        exclude: ["net.4"]
        optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
"""


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders()[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]


def test_a_fit_from_yaml_beside_a_learning_rate_monitor(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    made: list[torch.optim.Optimizer] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            phase = dendrites_of(trainer)._correlation
            if phase is not None:
                made.append(phase._optimizer)

    cli = LightningCLI(
        Classifier, Data, args=["fit", "--config", "config.yaml"], trainer_defaults={"callbacks": [Watch()]}
    )
    dendrites = dendrites_of(cli.trainer)
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    assert list(dendrites.network.layers) == ["net.0"]
    assert isinstance(made[0], torch.optim.SGD)
    assert made[0].param_groups[0]["lr"] == 0.1


def dendrites_of(trainer: L.Trainer) -> DendriteCallback:
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, DendriteCallback))
    return callback
