"""In a correlation phase nobody can tell that training goes on: the network, its buffers and its optimizer rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from pl_dendrites import DendriteCallback
from tests.models import QUIET, Classifier, bits, classifier, loaders, optimizer_bits, quick, same_bits


class Watch(Callback):
    """Looks at the model after every training batch and at every hook around validation."""

    def __init__(self, dendrites: DendriteCallback, look: Callable[[L.Trainer, Classifier], Any]) -> None:
        self.dendrites, self.look = dendrites, look
        self.seen: dict[int, list[Any]] = {}

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.dendrites.phase == "correlation" and not trainer.sanity_checking:
            assert isinstance(module, Classifier)
            self.seen.setdefault(self.dendrites.cycle, []).append(self.look(trainer, module))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._look(trainer, module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._look(trainer, module)


def watched(
    look: Callable[[L.Trainer, Classifier], Any], model: Classifier, **trainer_settings: Any
) -> list[list[Any]]:
    """What ``look`` saw in each correlation phase of a run."""
    dendrites = quick(max_correlation_epochs=4)
    watch = Watch(dendrites, look)
    trainer = L.Trainer(max_epochs=13, callbacks=[dendrites, watch], **(QUIET | trainer_settings))
    trainer.fit(model, *loaders())
    assert len(watch.seen) == 2
    assert all(len(looks) >= 4 * 6 for looks in watch.seen.values())
    return list(watch.seen.values())


def outputs(trainer: L.Trainer, model: Classifier) -> Tensor:
    was_training = [module.training for module in model.modules()]
    x = torch.linspace(-2, 2, 20).reshape(5, 4)
    with torch.no_grad():
        out = model.eval()(x)
    for module, training in zip(model.modules(), was_training, strict=True):
        module.training = training
    return out


@pytest.mark.parametrize("accumulate", [1, 3])
def test_outputs_are_bit_identical_with_batchnorm_and_dropout(accumulate: int) -> None:
    for phase in watched(outputs, classifier(dropout=0.3), accumulate_grad_batches=accumulate):
        assert all(torch.equal(out, phase[0]) for out in phase)


def test_everything_a_checkpoint_holds_of_the_model_is_bit_identical() -> None:
    for phase in watched(lambda _, model: bits(model), classifier(dropout=0.3)):
        assert all(same_bits(seen, phase[0]) for seen in phase)


def momentum(model: Classifier) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def one_cycle(model: Classifier) -> Any:
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=20)  # shorter than the run: one step too many raises
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("optimizers_of", [momentum, one_cycle])
def test_optimizers_and_schedulers_rest(optimizers_of: Callable[[Classifier], Any]) -> None:
    looks = watched(lambda trainer, _: optimizer_bits(trainer.optimizers[0]), classifier(optimizers_of))
    for phase in looks:
        assert all(seen == phase[0] for seen in phase)


def test_parameters_that_the_user_froze_are_frozen_afterwards_and_no_others() -> None:
    model = classifier()
    model.net[0].weight.requires_grad_(False)
    model.net[1].bias.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    in_steps: list[bool] = []
    model.net[0].register_forward_hook(
        lambda *_: in_steps.append(any(p.requires_grad for p in model.parameters())) if model.training else None
    )
    between = watched(lambda _, model: {n: p.requires_grad for n, p in model.named_parameters()}, model)
    assert in_steps.count(False) == 2 * 4 * 4
    assert all(flags.items() <= seen.items() for phase in between for seen in phase)
    after = {name: p.requires_grad for name, p in model.named_parameters() if ".dendrites." not in name}
    assert after == flags


def test_counters_go_on() -> None:
    steps = watched(lambda trainer, _: trainer.global_step, classifier())
    for phase in steps:
        assert phase[-1] - phase[0] == 4 * 4 - 1


def test_the_users_random_numbers_are_those_of_a_run_without_dendrites() -> None:
    class Draw(Callback):
        def __init__(self) -> None:
            self.drawn: list[float] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.drawn.append(torch.rand(()).item())

    runs = []
    for dendrites in ([quick()], []):
        draw = Draw()
        trainer = L.Trainer(max_epochs=9, callbacks=[*dendrites, draw], **QUIET)
        trainer.fit(classifier(dropout=0.5), *loaders())
        runs.append(draw.drawn)
    assert runs[0] == runs[1]


def test_a_buffer_that_moves_with_every_forward_comes_back() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1  # a new tensor each time
            return x

    model = classifier()
    model.net.append(Counter())
    for phase in watched(lambda _, model: bits(model), model, limit_val_batches=1):
        calls = [seen["net.5.calls"].item() for seen in phase]
        assert max(calls) - min(calls) == 4  # as many as validations, whose calls are the user's


class Validations(Callback):
    """The phase of each epoch, and of each validation."""

    def __init__(self, dendrites: DendriteCallback) -> None:
        self.dendrites = dendrites
        self.epochs, self.validations = list[str](), list[str]()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *batch: Any) -> None:
        if batch[-1] == 0:
            self.epochs.append(self.dendrites.phase)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validations.append(self.dendrites.phase)


@pytest.mark.parametrize(
    "settings",
    [{}, {"val_check_interval": 0.5}, {"val_check_interval": 4, "check_val_every_n_epoch": None}],
    ids=["each epoch", "twice an epoch", "by batches"],
)
@pytest.mark.parametrize("monitor", ["val_loss", "train_loss"])
def test_nothing_but_time_is_lost_without_validations_of_a_network_that_stands_still(
    settings: dict[str, Any], monitor: str
) -> None:
    seen, runs = {}, {}
    for skip in (False, True):
        dendrites, model = quick(monitor, skip_validation=skip), classifier()
        seen[skip] = watch = Validations(dendrites)
        trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites, watch], **(QUIET | settings))
        trainer.fit(model, *loaders())
        runs[skip] = dendrites.history, bits(model), trainer.validate(model, loaders()[1], verbose=False)
    often = 2 if settings.get("val_check_interval") == 0.5 else 1
    assert seen[True].epochs == seen[False].epochs == ["base"] * 2 + (["correlation"] * 2 + ["base"] * 2) * 2
    assert len(seen[False].validations) == often * len(seen[False].epochs)
    assert seen[True].validations == ["base"] * often * 6
    assert runs[True][0] == runs[False][0]
    assert same_bits(runs[True][1], runs[False][1])
    assert runs[True][2] == runs[False][2]
