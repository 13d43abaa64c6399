"""What the companions share: the digits, a classifier, one fit, and a table over seeds."""

from __future__ import annotations

import logging
import statistics
import warnings
from argparse import ArgumentParser
from typing import Any, NamedTuple

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback, detach


class Row(NamedTuple):
    """A network of a table: its size (parameters that are not zero, or bytes), epochs and test accuracy."""

    size: int
    epochs: int
    accuracy: float


class Settings(NamedTuple):
    """How long all phases of an example are."""

    epochs: int
    correlation_epochs: int = 10
    dendrites: int = 2


class Classifier(L.LightningModule):
    """An ordinary LightningModule; it knows nothing of dendrites."""

    def __init__(self, net: nn.Module, rate: float = 0.01) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def predict(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.predict(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("accuracy", 100 * (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.rate)


def mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def loaders() -> tuple[DataLoader, DataLoader, DataLoader]:
    """1,797 images of 8 x 8 pixels: 60 % for training, 20 % decide, 20 % are read once."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    rest, test = train_test_split(range(len(y)), test_size=0.2, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=0.25, stratify=y[rest], random_state=0)
    parts = [TensorDataset(x[rows], y[rows]) for rows in (train, val, test)]
    return DataLoader(parts[0], 64, shuffle=True), DataLoader(parts[1], 512), DataLoader(parts[2], 512)


def growing(settings: Settings, **arguments: Any) -> DendriteCallback:
    """The callback that grows a network, each of its phases as long as the settings say."""
    lengths = {"base_epochs": settings.epochs, "max_correlation_epochs": settings.correlation_epochs}
    arguments = {"form": "private", "max_dendrites": settings.dendrites, **lengths, **arguments}
    return DendriteCallback("val_loss", verbose=False, **arguments)


def fit(model: L.LightningModule, grow: DendriteCallback | None = None, epochs: int = -1, callbacks: Any = ()) -> int:
    """Train a model, leave it with its best weights and return its epochs; without `grow`, that is all that is done."""
    keep_best = grow or DendriteCallback("val_loss", max_dendrites=0, patience=10**6, verbose=False)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks, keep_best])
    trainer.fit(model, *loaders()[:2])
    if grow is None:
        detach(model)  # an empty set of dendrites would hang on it still
    return trainer.current_epoch


def accuracy(model: L.LightningModule) -> float:
    return quiet_trainer().test(model, loaders()[2], verbose=False)[0]["accuracy"]


def quiet_trainer(**arguments: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", **quiet, **arguments)


def main(compare: Any, about: str, size: str = "parameters", epochs: int = 30) -> None:
    """Run a comparison for each seed and print a table."""
    parser = ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=epochs, help="of each base phase")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    runs = [compare(seed, Settings(options.epochs)) for seed in range(options.seeds)]
    for name in runs[0]:
        rows = [run[name] for run in runs]
        right = [row.accuracy for row in rows]
        spread = f" ± {statistics.stdev(right):.1f}" if len(right) > 1 else ""
        large, long = (round(statistics.mean(row[i] for row in rows)) for i in (0, 1))
        print(f"{name:44} {large:7,} {size} {long:4} epochs  {statistics.mean(right):.1f}{spread} %")
