"""Ways to run a Trainer, each of which must resume exactly and must not notice a callback that never grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from tests.models import Classifier, classifier, half, loaders, toggled

EPOCHS = 13


def sgd_momentum(model: Classifier) -> Any:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def plateau(model: Classifier) -> Any:
    """Stepped in the last batch of the epoch: Lightning forgets an epoch-wise plateau step on a resume by itself."""
    optimizer = Adam(model.parameters(), lr=0.02)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    config = {"scheduler": scheduler, "monitor": "val_loss", "interval": "step", "frequency": 4}
    return {"optimizer": optimizer, "lr_scheduler": config}


def cosine(model: nn.Module) -> Any:
    optimizer = AdamW(model.parameters(), lr=0.02)
    return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)]


def warmed_up(model: nn.Module) -> Any:
    optimizer = Adam(model.parameters(), lr=0.02)
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return [optimizer], [lr_scheduler.SequentialLR(optimizer, parts, [2])]


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


class Manual(Classifier):
    """One optimizer that the model steps itself, in every other batch; clipped, with a scheduler per step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class GAN(L.LightningModule):
    """Two optimizers that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 1))

    def critic_loss(self, x: Tensor, fake: Tensor) -> Tensor:
        softplus = nn.functional.softplus
        return (softplus(-self.critic(x)) + softplus(self.critic(fake))).mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x = batch[0]
        noise = x[:, 2:].flip(0)  # from the data: Lightning does not save random numbers' state
        of_generator, of_critic = self.optimizers()
        with toggled(self, of_critic):
            of_critic.zero_grad()
            self.manual_backward(self.critic_loss(x, self.generator(noise).detach()))
            of_critic.step()
        with toggled(self, of_generator):
            of_generator.zero_grad()
            self.manual_backward(nn.functional.softplus(-self.critic(self.generator(noise))).mean())
            of_generator.step()

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x = batch[0]
        fake = self.generator(x[:, 2:].flip(0))
        self.log("val_loss", (fake.T.cov() - x.T.cov()).square().sum())

    def configure_optimizers(self) -> Any:
        made = [warmed_up(self.generator), cosine(self.critic)]
        return [optimizers[0] for optimizers, _ in made], [schedulers[0] for _, schedulers in made]


class OwnBlock(nn.Module):
    """A module that no one but its author knows, with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.norm = nn.Linear(4, 5), nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.norm(self.value(x) * self.gate(x).sigmoid())}


class Recurrent(Classifier):
    """The classifier's input as a sequence of four, of which the last state alone is used, and a block of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.block = nn.GRU(1, 4, batch_first=True), OwnBlock()
        self.net = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x[..., None])
        return self.net(self.block(state[-1])["hidden"])


def seeded(kind: Callable[[], L.LightningModule]) -> L.LightningModule:
    torch.manual_seed(0)
    return kind()


def double() -> L.LightningModule:
    """Lightning alone loads a checkpoint before it converts the model, so that a float32 one would round it."""
    return Classifier().double()


class Stream(IterableDataset):
    """The usual data, with no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loaders()[0].dataset)


def streamed() -> tuple[DataLoader, DataLoader]:
    return DataLoader(Stream(), 32), loaders()[1]


def two_validations() -> tuple[DataLoader, list[DataLoader]]:
    train, val = loaders()
    return train, [val, train]


def half_precision() -> dict[str, Any]:
    return {"plugins": [half(init_scale=2.0**17, growth_interval=7)]}


@dataclass
class Combination:
    """How to make everything of a run anew.

    Attributes:
        optimizers_of: what the classifier's ``configure_optimizers`` returns.
        trainer: settings of the Trainer, or what makes them.
        callback: settings of the DendriteCallback.
        model: in place of the classifier.
        data: loaders for training and validation.
    """

    optimizers_of: Callable[[Any], Any] = cosine
    trainer: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], L.LightningModule] | None = None
    data: Callable[[], tuple[Any, Any]] = loaders

    def make_model(self) -> L.LightningModule:
        if self.model is None:
            return classifier(self.optimizers_of)
        model = seeded(self.model)
        model.optimizers_of = self.optimizers_of
        return model

    def trainer_settings(self) -> dict[str, Any]:
        return self.trainer() if callable(self.trainer) else self.trainer


COMBINATIONS = {
    "sgd": Combination(sgd_momentum),
    "plateau": Combination(plateau),
    "cosine, clipped by norm": Combination(cosine, {"gradient_clip_val": 0.1}),
    "clipped by value": Combination(sgd_momentum, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "one cycle": Combination(one_cycle_per_step),
    "warm-up": Combination(warmed_up),
    "groups": Combination(groups),
    "no restart": Combination(groups, callback={"restart": False}),
    "accumulation": Combination(plateau, {"accumulate_grad_batches": 3}),
    "training metric": Combination(callback={"monitor": "train_loss"}),
    "no validation": Combination(sgd_momentum, {"limit_val_batches": 0}, {"monitor": "train_loss"}),
    "accuracy with ties": Combination(
        callback={"monitor": "val_acc", "mode": "max", "base_epochs": None, "patience": 2}
    ),
    "two validations an epoch": Combination(plateau, {"val_check_interval": 0.5}),
    "validation beyond an epoch": Combination(
        trainer={"val_check_interval": 6, "check_val_every_n_epoch": None}, callback={"base_epochs": 4}
    ),
    "sparse validation": Combination(trainer={"check_val_every_n_epoch": 2}, callback={"base_epochs": 4}),
    "no validation in correlation phases": Combination(
        plateau, {"val_check_interval": 0.5}, {"skip_validation": True, "base_epochs": 3}
    ),
    "several validation loaders": Combination(data=two_validations, callback={"monitor": "val_loss/dataloader_idx_1"}),
    "no sanity check": Combination(trainer={"num_sanity_val_steps": 0}),
    "limited batches": Combination(trainer={"limit_train_batches": 3, "limit_val_batches": 1}),
    "overfit_batches": Combination(trainer={"overfit_batches": 2}),
    "max_steps": Combination(trainer={"max_steps": 50}),
    "stream": Combination(data=streamed),
    "rejected sets": Combination(sgd_momentum, callback={"min_delta": 10.0}),
    "best in a file": Combination(plateau, callback={"dirpath": "best"}),
    "candidates by SGD": Combination(callback={"optimizer": lambda p: SGD(p, lr=0.5, momentum=0.5)}),
    "manual": Combination(warmed_up, model=Manual),
    "manual, no restart": Combination(model=Manual, callback={"restart": False}),
    "manual in fp16": Combination(warmed_up, half_precision, model=Manual),
    "recurrent, own block": Combination(model=Recurrent, callback={"targets": ["rnn", "block"]}),
    "gradient": Combination(cosine, callback={"learning": "gradient", "base_epochs": 3}),
    "gradient, rejected sets": Combination(
        groups, callback={"learning": "gradient", "base_epochs": 3, "min_delta": 10.0}
    ),
    "gradient, no restart": Combination(groups, callback={"learning": "gradient", "base_epochs": 3, "restart": False}),
    "hybrid": Combination(plateau, callback={"learning": "hybrid"}),
    "hybrid, recurrent": Combination(
        model=Recurrent, callback={"learning": "hybrid", "targets": ["rnn", "block"], "restart": False}
    ),
    "sparse": Combination(cosine, callback={"fan_in": 2, "max_correlation_epochs": 3}),
    "sparse, hybrid, rejected sets": Combination(
        groups, callback={"fan_in": 0.5, "learning": "hybrid", "max_correlation_epochs": 3, "min_delta": 10.0}
    ),
    "shared": Combination(
        cosine,
        trainer={"accumulate_grad_batches": 2},
        callback={"fan_in": 2, "max_parameters": 130, "sets": 2, "base_epochs": 5, "growth_epochs": 2},
    ),
    "shared, rejected sets": Combination(
        groups, callback={"around": ["net.0", "net"], "fan_in": 3, "base_epochs": 2, "min_delta": 10.0}
    ),
    "sparse, some neurons": Combination(plateau, callback={"fan_in": 2, "share": 0.4, "max_correlation_epochs": 3}),
    "some neurons, hybrid": Combination(callback={"share": 0.5, "learning": "hybrid", "restart": False}),
    "sparse, recurrent too": Combination(
        model=Recurrent, callback={"fan_in": 3, "learning": "hybrid", "max_correlation_epochs": 3, "restart": False}
    ),
    "GAN": Combination(model=GAN),
    "GAN, no restart": Combination(model=GAN, callback={"restart": False}),
    "fp16": Combination(cosine, half_precision),
    "bf16-mixed": Combination(cosine, {"precision": "bf16-mixed"}),
    "bf16-true": Combination(sgd_momentum, {"precision": "bf16-true"}),
    "64-true": Combination(cosine, {"precision": "64-true"}, model=double),
}
