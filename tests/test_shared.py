"""Shared dendrites through the callback: a budget, sets, fields that move, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_dendrites import DendriteCallback, fuse, load_from_checkpoint
from pl_dendrites.core import Soma
from pl_dendrites.core.cost import parameter_count
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick, same_bits


class OfBodies(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = Soma(4, 2)


def fit(model: L.LightningModule, epochs: int = 30, **given: Any) -> tuple[DendriteCallback, L.Trainer]:
    dendrites = quick(**{"around": ["net"], "fan_in": 2, "base_epochs": 6, **given})
    trainer = L.Trainer(callbacks=[dendrites], max_epochs=epochs, **QUIET)
    trainer.fit(model, *loaders())
    return dendrites, trainer


def phases(dendrites: DendriteCallback) -> list[tuple[str, int]]:
    return [(record["phase"], record["epochs"]) for record in dendrites.history]


@pytest.mark.parametrize("sets", [1, 3])
def test_a_network_grows_up_to_its_budget_in_short_phases_and_a_long_one(sets: int) -> None:
    model = classifier()
    own = parameter_count(model)
    dendrites, _ = fit(model, max_parameters=own + 105, sets=sets, growth_epochs=1)
    assert phases(dendrites) == [*[("base", 1), ("correlation", 1)] * sets, ("base", 6)]
    assert own + 90 < dendrites.history[-1]["parameters"] <= own + 105
    assert dendrites.num_dendrites == sets
    assert "growth is over" in dendrites.stop_reason


def test_the_report_counts_units(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dendrites, _ = fit(OfBodies(), max_parameters=82, growth_epochs=1, base_epochs=20)
    dendrites.report(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "16 shared dendrites" in text
    assert f"| multiplications, inference | 0 | {16 * (2 + 2)} |" in text  # two inputs seen, two outputs fed
    assert "per neuron" not in text


@pytest.mark.parametrize("make", [classifier, OfBodies])
def test_what_was_grown_is_fused_and_goes_on_as_a_lightning_module(make: Callable[[], Classifier]) -> None:
    model = make()
    _, trainer = fit(model, max_parameters=120, growth_epochs=1, base_epochs=20)
    fused = fuse(model, compact=True)
    assert isinstance(fused, Classifier)
    assert not any(type(part).__module__.startswith("pl_dendrites") for part in fused.net.modules())
    (expected,), (found,) = (trainer.validate(one, loaders()[1], verbose=False) for one in (model, fused))
    assert found == pytest.approx(expected)


def test_a_budget_may_be_a_factor_of_the_model() -> None:
    model = classifier()
    own = parameter_count(model)
    dendrites, _ = fit(model, max_parameters=3.0)
    assert 2.8 * own < dendrites.history[-1]["parameters"] <= 3 * own


def test_without_a_budget_sets_double_until_one_does_not_help() -> None:
    dendrites, _ = fit(classifier(), max_tries=0, base_epochs=3, min_delta=0.02, max_dendrites=9)
    assert "did not help" in dendrites.stop_reason
    added = [record["parameters"] for record in dendrites.history if record["phase"] == "base"]
    assert [b - a for a, b in pairwise(added)][:2] == [16 * 5, 16 * 5]


def test_neuron_bodies_learn_from_their_dendrites_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OfBodies()
    dendrites, trainer = fit(model, max_parameters=82, base_epochs=20, growth_epochs=1)
    assert parameter_count(model) == 82
    assert dendrites.best_model_score is not None
    assert dendrites.best_model_score < 0.97 * dendrites.history[0]["best_score"]
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = load_from_checkpoint(OfBodies, tmp_path / "model.ckpt")
    assert same_bits(bits(again), bits(model))
    assert isinstance(again.net, Soma)


def test_fields_move_while_a_base_phase_trains() -> None:
    moved: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if "dendrites" in pl_module.net._modules:
                moved.extend(block.field.clone() for block in pl_module.net.dendrites)

    torch.manual_seed(0)
    dendrites = quick(around=["net"], fan_in=2, base_epochs=8, max_parameters=150, sets=1, growth_epochs=1)
    L.Trainer(callbacks=[dendrites, Watch()], max_epochs=20, **QUIET).fit(OfBodies(), *loaders())
    changes = [int((a != b).sum()) for a, b in pairwise(moved)]
    assert any(changes[:5])
    assert not any(changes[-2:])  # the last quarter of the phase


@pytest.mark.parametrize("around", [["net"], None])
def test_a_fit_resumes_with_a_network_that_never_ran_there(around: list[str] | None, tmp_path: Path) -> None:
    """Without a sanity check the first batch may be one in which it stands still, or has a set taken in."""

    def run(path: Path | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        torch.manual_seed(0)
        model = classifier()
        dendrites = quick(around=around, fan_in=2, max_parameters=2.0, sets=1, growth_epochs=2)
        saver = ModelCheckpoint(tmp_path / ("whole" if path is None else "resumed"), "{epoch}", save_top_k=-1)
        settings = QUIET | {"enable_checkpointing": True, "num_sanity_val_steps": 0}
        L.Trainer(callbacks=[dendrites, saver], max_epochs=-1, **settings).fit(model, *loaders(), ckpt_path=path)
        return bits(model), dendrites.history

    weights, history = run()
    assert [record["phase"] for record in history] == ["base", "correlation", "base"]
    for epoch in (1, 2):
        resumed, its_history = run(tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert same_bits(resumed, weights)
        assert its_history == history


def test_under_correlation_fields_and_their_weights_stay_as_they_are() -> None:
    model = classifier()
    dendrites, _ = fit(model, max_parameters=150, sets=1, learning="correlation")
    (block,) = model.net.dendrites
    assert not block.weight.requires_grad
    assert block.out.requires_grad
    assert dendrites.history[-1]["learning"] == "correlation"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"around": "net"}, "a list of names"),
        ({"around": []}, "a list of names"),
        ({"max_parameters": 100, "form": "private"}, "None with form='private'"),
        ({"around": ["net"], "form": "private"}, "None with form='private'"),
        ({"form": "round"}, "'shared', 'private'"),
        ({"form": "shared", "targets": ["net.0"]}, "where dendrites are shared"),
        ({"max_parameters": 100, "exclude": lambda name, module: True}, "where dendrites are shared"),
        ({"around": ["net"], "max_parameters": True}, "a number of parameters"),
        ({"around": ["net"], "max_parameters": 0.5}, "above 1"),
        ({"around": ["net"], "learning": "gradient"}, "where dendrites are shared"),
        ({"around": ["net"], "targets": ["net.0"]}, "where dendrites are shared"),
        ({"around": ["net"], "share": 0.5}, "where dendrites are shared"),
        ({"around": ["net"], "sets": 0}, "at least 1"),
        ({"around": ["net"], "growth_epochs": 0}, "at least 1"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DendriteCallback("val_loss", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"around": ["nett"]}, "names of modules"),
        ({"max_parameters": 10}, "more than the 56 parameters"),
    ],
)
def test_a_model_that_cannot_grow_so_is_refused_before_training(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        fit(classifier(), **given)


def test_a_module_that_is_never_called_grows_nothing_and_that_is_said() -> None:
    class Bypassed(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.Sequential.forward(self.net, x)

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="no dendrites"):
        dendrites, _ = fit(Bypassed(), max_parameters=150)
    assert dendrites.stop_reason == "no target layer was ever used"
