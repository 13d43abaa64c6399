"""Models that step their optimizers themselves, and loss scales: whose backward pass is it, and at what scale?"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import Adam

from tests.combinations import GAN, Manual, cosine, seeded, sgd_momentum, warmed_up
from tests.models import Classifier, Rates, classifier, half, loaders, quick, train


class Watch(L.Callback):
    """Which layers see the error of each backward pass of a correlation phase."""

    def __init__(self, dendrites: Any) -> None:
        self.dendrites = dendrites
        self.seen: list[list[str]] = []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        pools = self.dendrites.network.candidates
        if pools:
            self.seen.append([name for name, pool in pools.items() if pool.watching])


def test_a_loss_teaches_only_the_layers_whose_optimizer_has_its_turn() -> None:
    dendrites = quick(max_dendrites=1)
    watch = Watch(dendrites)
    model = seeded(GAN)
    train(model, dendrites, watch)
    turns = [["critic.0", "critic.2"], ["generator.0", "generator.2"]]
    assert watch.seen == turns * (2 * 4)
    assert dendrites.history[1]["correlation"].keys() == {"critic.0", "critic.2", "generator.0", "generator.2"}
    assert "toggle_optimizer" not in vars(model)


def test_a_loss_that_reaches_no_candidate_is_no_error() -> None:
    dendrites = quick(max_dendrites=1, targets=["generator.*"])
    train(seeded(GAN), dendrites)
    assert [record["dendrites"] for record in dendrites.history] == [0, 0, 1]


class PastTheStrategy(Manual):
    """Takes PyTorch's own optimizer, so that Lightning counts no step."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(Classifier.training_step(self, batch, batch_idx))
        optimizer.step()


def test_steps_that_lightning_does_not_count() -> None:
    model = seeded(PastTheStrategy)
    model.optimizers_of = sgd_momentum
    made: list[Adam] = []
    dendrites = quick(max_dendrites=1, optimizer=lambda parameters: made.append(Adam(parameters)) or made[-1])
    trainer = train(model, dendrites)
    assert trainer.global_step == 0
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    assert {int(state["step"]) for state in made[0].state.values()} == {2 * 4}
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("restart", [True, False])
def test_schedulers_that_the_model_steps_stand_still_in_a_correlation_phase(restart: bool) -> None:
    model = seeded(Manual)
    model.optimizers_of = warmed_up
    dendrites = quick(restart=restart)
    rates = Rates(dendrites)
    train(model, dendrites, rates)
    assert len({*rates.seen["correlation", 1]}) == 1
    assert len({*rates.seen["base", 1]}) > 1
    before, after = rates.seen["base", 0], rates.seen["base", 1]
    assert after == before if restart else after[0] == rates.seen["correlation", 1][0]


class Scales(L.Callback):
    """Puts a loss scale that overflows into a correlation phase, and keeps those that follow."""

    def __init__(self, dendrites: Any) -> None:
        self.dendrites = dendrites
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.dendrites.phase == "correlation":
            scaler = trainer.precision_plugin.scaler
            if not self.seen:
                scaler.update(2.0**30)
            self.seen.append(scaler.get_scale())


def test_a_loss_scale_that_overflows_comes_down_in_a_correlation_phase() -> None:
    dendrites = quick(max_dendrites=1, max_correlation_epochs=6)
    scales = Scales(dendrites)
    trainer = train(classifier(cosine), dendrites, scales, data=loaders(), plugins=[half(init_scale=256.0)])
    assert scales.seen[0] == 2.0**30
    assert scales.seen[-1] < 2.0**22
    assert all(layer["max"] > 0.05 for layer in dendrites.history[1]["correlation"].values())
    assert all(bool(torch.isfinite(p).all()) for p in trainer.lightning_module.parameters())
