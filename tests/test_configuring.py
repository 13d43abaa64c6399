"""What `configure_optimizers` sees: the model without dendrites, and a training that has a length."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Adam, AdamW, Optimizer, lr_scheduler

from pl_dendrites.training.configuring import hidden_dendrites
from tests.models import Classifier, Rates, bits, classifier, quick, same_bits, train

# -- the model as its author knows it -----------------------------------------------------------------------------


def sorted_by_type(model: Classifier) -> Optimizer:
    """As minGPT: every parameter is in one of two groups, and an assertion sees to it."""
    decay, rest = {}, {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            if name == "weight" and isinstance(module, nn.Linear):
                decay[full] = parameter
            elif name == "bias" or isinstance(module, nn.BatchNorm1d):
                rest[full] = parameter
    left = dict(model.named_parameters()).keys() - (decay | rest).keys()
    assert not left, f"parameters {sorted(left)} are in no group"
    return groups_of(decay, rest)


def sorted_by_name(model: Classifier) -> Optimizer:
    known = {"net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.4.weight", "net.4.bias"}
    named = dict(model.named_parameters())
    assert named.keys() == known
    return groups_of({n: p for n, p in named.items() if "0" in n}, {n: p for n, p in named.items() if "0" not in n})


def sorted_by_layers(model: Classifier) -> Optimizer:
    """A learning rate for each module that has parameters of its own."""
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert len(layers) == 3
    return Adam([{"params": list(layer.parameters()), "lr": 0.01 * (i + 1)} for i, layer in enumerate(layers)])


def groups_of(decay: dict[str, Any], rest: dict[str, Any]) -> Optimizer:
    values = [{"params": list(decay.values()), "weight_decay": 0.1}, {"params": list(rest.values())}]
    return AdamW(values, lr=0.02, weight_decay=0.0)


@pytest.mark.parametrize("learning", ["correlation", "gradient"])
@pytest.mark.parametrize("make", [sorted_by_type, sorted_by_name, sorted_by_layers])
def test_a_grown_model_is_sorted_as_the_plain_one(
    make: Callable[[Classifier], Optimizer], learning: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, dendrites = classifier(make), quick(learning=learning)
    trainer = train(whole, dendrites, saver, enable_checkpointing=True)
    names = list(whole.state_dict())
    path = sorted(tmp_path.iterdir(), key=lambda p: int(p.stem.split("=")[1]))[-2]
    resumed, again = classifier(make), quick(learning=learning)
    other = train(resumed, again, ckpt_path=path)
    assert same_bits(bits(resumed), bits(whole))
    assert list(resumed.state_dict()) == names
    assert again.history == dendrites.history
    sizes = [[len(g["params"]) for g in t.optimizers[0].param_groups] for t in (trainer, other)]
    assert sizes[0] == sizes[1]
    second, before = quick(learning=learning, max_dendrites=3), dendrites.num_dendrites
    train(whole, second)
    assert second.history[0]["dendrites"] == before


def test_hidden_dendrites_are_at_work() -> None:
    model, dendrites = classifier(), quick(max_tries=9)
    train(model, dendrites, max_epochs=6)
    assert dendrites.num_dendrites
    model.eval()
    x, names = torch.randn(5, 4), [name for name, _ in model.named_modules()]
    expected = model(x)
    with hidden_dendrites(model):
        assert not any("dendrites" in name for name in [*model.state_dict(), *(n for n, _ in model.named_modules())])
        assert torch.equal(model(x), expected)
    with pytest.raises(KeyError), hidden_dendrites(model):
        _ = {}["an error within"]
    assert [name for name, _ in model.named_modules()] == names
    assert "dendrites" not in vars(model.net[0])


# -- a training that has a length ---------------------------------------------------------------------------------


def steps_in(model: Classifier) -> Any:
    return model.trainer.estimated_stepping_batches


def one_cycle(model: Classifier, optimizer: Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps_in(model))


def linear(step: int, *, warm_up: int, total: float) -> float:
    return step / warm_up if step < warm_up else max(0.0, (total - step) / (total - warm_up))


def warmed_up(model: Classifier, optimizer: Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, partial(linear, warm_up=2, total=steps_in(model)))


def noam(model: Classifier, optimizer: Optimizer) -> Any:
    warm_up = 0.1 * steps_in(model)
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))


def cosine(model: Classifier, optimizer: Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps_in(model))


def cosine_of_epochs(model: Classifier, optimizer: Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=model.trainer.max_epochs)


def in_two_parts(model: Classifier, optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2), cosine(model, optimizer)]
    return lr_scheduler.SequentialLR(optimizer, parts, [2])


SCHEDULES = [one_cycle, warmed_up, noam, cosine, cosine_of_epochs, in_two_parts]


def scheduled(make: Callable[[Classifier, Optimizer], Any]) -> Classifier:
    def optimizers_of(model: Classifier) -> Any:
        optimizer = Adam(model.parameters(), lr=0.02)
        interval = "epoch" if make is cosine_of_epochs else "step"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(model, optimizer), "interval": interval}}

    return classifier(optimizers_of)


@pytest.mark.parametrize("make", SCHEDULES)
def test_a_schedule_goes_over_one_base_phase(make: Callable[[Classifier, Optimizer], Any]) -> None:
    dendrites = quick(base_epochs=3)
    growing = Rates(dendrites)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no end.*")
        trainer = train(scheduled(make), dendrites, growing)
    assert trainer.max_epochs == -1
    plain = Rates(quick())
    train(scheduled(make), plain, max_epochs=3)
    expected = plain.seen["base", 0]
    assert len(set(expected)) > 1
    for cycle in range(3):
        assert growing.seen["base", cycle] == pytest.approx(expected)


@pytest.mark.parametrize("settings", [{"base_epochs": None, "patience": 2}, {"restart": False}], ids=str)
@pytest.mark.parametrize("make", SCHEDULES)
def test_one_whose_length_nobody_knows_is_warned_of(
    make: Callable[[Classifier, Optimizer], Any], settings: dict[str, Any]
) -> None:
    says = r"no end.*`base_epochs`.*`restart=True`.*`max_epochs`"
    if make is one_cycle:
        with pytest.raises(MisconfigurationException, match=says):
            train(scheduled(make), quick(**settings), max_epochs=-1)
        return
    with pytest.warns(UserWarning, match=says):
        train(scheduled(make), quick(**settings, min_delta=9.0, max_tries=0), limit_train_batches=1)


PLAIN: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 60),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_others_are_not(name: str) -> None:
    def optimizers_of(model: Classifier) -> Any:
        optimizer = Adam(model.parameters(), lr=0.02)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": PLAIN[name](optimizer), "monitor": "val_loss"}}

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no end.*")
        train(classifier(optimizers_of), quick(base_epochs=None, patience=1, min_delta=9.0, max_tries=0))


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_steps": 10}])
def test_a_trainer_with_an_end_answers_for_itself(limit: dict[str, int]) -> None:
    answers = []

    def optimizers_of(model: Classifier) -> Any:
        answers.append(steps_in(model))
        return Adam(model.parameters(), lr=0.02)

    train(classifier(optimizers_of), quick(base_epochs=3), **limit)
    assert answers == [16 if "max_epochs" in limit else 10]


def test_an_error_of_the_model_is_its_own() -> None:
    def optimizers_of(model: Classifier) -> Any:
        assert math.isfinite(steps_in(model))
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        train(classifier(optimizers_of), quick(base_epochs=3))
