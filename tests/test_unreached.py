"""Layers that no gradient passes through, in frozen networks with activation checkpoints above all."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.models import Classifier, quick, train


class Checkpointed(Classifier):
    """A frozen backbone of which one layer is in an activation checkpoint; perhaps with a head that learns."""

    def __init__(self, reentrant: bool, wants_input: bool = False, head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.net = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.reentrant = reentrant
        self.requires_grad_(False)
        self.net.requires_grad_(head)
        self.optimizers_of = lambda model: torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        if wants_input:  # as `enable_input_require_grads` of Hugging Face's models
            self.first.register_forward_hook(lambda layer, args, out: out.requires_grad_(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(checkpoint(self.block, self.first(x).tanh(), use_reentrant=self.reentrant).tanh())


class Gradients(L.Callback):
    """The dendrites' parameters that were to learn, and those that had a gradient."""

    def __init__(self) -> None:
        self.learn: set[str] = set()
        self.had: set[str] = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        learn = {n: p for n, p in pl_module.named_parameters() if ".dendrites." in n and p.requires_grad}
        self.learn |= learn.keys()
        self.had |= {name for name, p in learn.items() if p.grad is not None and p.grad.any()}


WAYS: dict[str, dict[str, Any]] = {
    "use_reentrant=False": {"reentrant": False},
    "an input that requires a gradient": {"reentrant": True, "wants_input": True},
    "nothing but the backbone": {"reentrant": True, "wants_input": True, "head": False},
}


@pytest.mark.parametrize("settings", [{"learning": "hybrid"}, {"learning": "gradient"}, {"around": ["block"]}], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_all_dendrites_learn_in_a_checkpoint_that_lets_gradients_through(
    way: str, settings: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    gradients = Gradients()
    targets = {} if "around" in settings else {"targets": ["block"]}
    train(Checkpointed(**WAYS[way]), quick(**targets, **settings, fan_in=3, max_dendrites=1, max_tries=1), gradients)
    assert gradients.had == gradients.learn != set()
    assert not [w for w in recwarn if "no dendrites for" in str(w.message)]


@pytest.mark.parametrize("settings", [{"learning": "correlation"}, {"learning": "gradient"}, {"around": ["block"]}])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_where_none_passes_that_is_said_and_what_to_do(settings: dict[str, Any]) -> None:
    targets = {} if "around" in settings else {"targets": ["block"]}
    with pytest.warns(UserWarning, match="no dendrites for 'block': no gradient passes through it") as warnings:
        train(Checkpointed(reentrant=True), quick(**targets, **settings, max_dendrites=1), max_epochs=5)
    (said,) = [str(w.message) for w in warnings if "'block'" in str(w.message)]
    assert "use_reentrant=False" in said
    assert "enable_input_require_grads" in said


class WeightAlone(Checkpointed):
    """As attention of BEiT and EVA in timm, and Mamba's mixer: the weight of a layer, and never the layer."""

    def __init__(self, scale: float) -> None:
        super().__init__(reentrant=False)
        self.bypassed, self.silenced = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6).requires_grad_(False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.first(x).tanh(), self.bypassed.weight)
        return self.net((self.block(x) + self.scale * self.silenced(x)).tanh())


@pytest.mark.parametrize("learning", ["hybrid", "gradient"])
def test_frozen_layers_whose_weights_alone_are_used_and_those_without_effect_are_named(learning: str) -> None:
    """As a residual branch that begins with a zero."""
    dendrites = quick(targets="frozen", exclude=["net"], learning=learning, fan_in=3, max_dendrites=1)
    with pytest.warns(UserWarning, match="no dendrites: ") as warnings:
        train(WeightAlone(scale=0.0), dendrites, max_epochs=6)
    said = [str(w.message) for w in warnings if "never had an error" in str(w.message)]
    calls = "'bypassed' never had an error and gets no dendrites: training does not call it, be it that the model uses"
    assert calls in said[-1]
    if learning == "hybrid":
        assert said[0].endswith(
            "'silenced' never had an error and gets no dendrites: nothing of what comes out of it reaches the loss."
        )
        assert "training does not call it" in dendrites.network.skipped["bypassed"]
        assert "nothing of it reaches the loss" in dendrites.network.skipped["silenced"]
    assert not any("'first'" in one or "'block'" in one for one in said)
