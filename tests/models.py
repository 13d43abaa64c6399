"""Small models and data for the tests of the Lightning side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback

# Where models are trained here: "cpu", or "gpu", which few tests need (test_gpu.py) and most can do with.
ACCELERATOR = os.environ.get("ACCELERATOR", "cpu")

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": ACCELERATOR,
}


# What Lightning has since version 2.6. The lowest that is tried is in constraints-lowest.txt.
AVERAGING: list[type[L.Callback]] = [
    getattr(callbacks, name) for name in ("WeightAveraging", "EMAWeightAveraging") if hasattr(callbacks, name)
]
since_2_6 = pytest.mark.skipif(not AVERAGING, reason="Lightning has it since version 2.6")


@contextmanager
def toggled(module: L.LightningModule, optimizer: Any) -> Iterator[None]:
    """Lightning's ``toggled_optimizer``, which it has since version 2.5.2."""
    module.toggle_optimizer(optimizer)
    try:
        yield
    finally:
        module.untoggle_optimizer(optimizer)


def half(**scale: Any) -> MixedPrecision:
    """Real fp16 with a loss scale of these settings, which on a CPU has to be asked for like this."""
    device = "cuda" if ACCELERATOR == "gpu" else "cpu"
    return MixedPrecision("16-mixed", device, scaler=torch.amp.GradScaler(device, **scale))


def quick(monitor: str = "val_loss", **settings: Any) -> DendriteCallback:
    """A callback whose phases last a few epochs, whatever the score does."""
    defaults: dict[str, Any] = {
        "base_epochs": 2,
        "correlation_patience": 10,
        "max_correlation_epochs": 2,
        "max_dendrites": 2,
        "candidates": 2,
        "max_tries": 3,
        "verbose": False,
    }
    if not settings.keys() & {"around", "max_parameters"}:
        defaults["form"] = "private"
    return DendriteCallback(monitor, **(defaults | settings))


def loaders(batch_size: int = 32) -> tuple[DataLoader, DataLoader]:
    """A small problem that no linear network solves, in a fixed order: four batches an epoch, two for validation."""
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, :2].prod(1) > 0).long()
    train, val = TensorDataset(x[:128], y[:128]), TensorDataset(x[128:], y[128:])
    return DataLoader(train, batch_size), DataLoader(val, 2 * batch_size)


class Classifier(L.LightningModule):
    """BatchNorm, an in-place activation and dropout between two target layers."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(4, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, 2),
        )
        self.optimizers_of: Callable[[Classifier], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizers_of is not None:
            return self.optimizers_of(self)
        return torch.optim.Adam(self.parameters(), lr=0.02)


def classifier(optimizers_of: Callable[[Classifier], Any] | None = None, seed: int = 0, **kwargs: Any) -> Classifier:
    """A classifier with fixed initial weights."""
    torch.manual_seed(seed)
    model = Classifier(**kwargs)
    model.optimizers_of = optimizers_of
    return model


def train(
    model: L.LightningModule, *callbacks: L.Callback, data: Any = None, ckpt_path: Any = None, **settings: Any
) -> L.Trainer:
    """A fit until growth ends; returns the Trainer."""
    trainer = L.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": -1} | settings))
    trainer.fit(model, *(loaders() if data is None else data), ckpt_path=ckpt_path)
    return trainer


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a state_dict holds."""
    return {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one)


def optimizer_bits(optimizer: Optimizer) -> list[Any]:
    """Per group its settings and, in order, the state of its parameters."""
    return [
        (
            {key: value for key, value in group.items() if key != "params"},
            [
                {k: v.tolist() if isinstance(v, Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
                for p in group["params"]
            ],
        )
        for group in optimizer.param_groups
    ]


class Rates(L.Callback):
    """The learning rate with which each batch of a phase trains."""

    def __init__(self, dendrites: Any) -> None:
        self.dendrites = dendrites
        self.seen: dict[tuple[str, int], list[float]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        key = (self.dendrites.phase, self.dendrites.cycle)
        self.seen.setdefault(key, []).append(trainer.optimizers[0].param_groups[0]["lr"])
