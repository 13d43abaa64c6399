"""Live dendrites learn with the network: gradient flows into all of them and through them into the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import attach, restore_structure
from tests.core import test_recurrent
from tests.core.helpers import (
    LAYERS,
    arguments,
    assert_gradients,
    grow,
    neuron_dim,
    output_of,
    randomise,
    reference_dendrites,
    reference_forward,
    reference_gradients,
)
from tests.core.test_copies import NormBlock
from tests.core.test_correlation_rule import random_input, wavy

ALL = [
    *LAYERS,
    *test_recurrent.LAYERS,
    pytest.param(lambda: nn.LSTMCell(3, 4), (5, 3), id="lstm-cell"),
    pytest.param(NormBlock, (2, 5, 3), id="linear-with-norm"),
]


def live_layer(make: Callable[[], nn.Module], x: Tensor, dendrites: int) -> nn.Module:
    layer = make().double()
    randomise(layer, 1)
    holder = nn.ModuleDict({"layer": layer})
    attach(holder, targets=["layer"], live=True)
    layer(x)
    grow(layer, dendrites, 2)
    return layer


def live_reference(layer: nn.Module, x: Tensor) -> Tensor:
    out = output_of(layer.forward(*arguments(x)))
    for weight, output in zip(layer.dendrites[0].weights, reference_dendrites(layer, x, live=True), strict=True):
        out = out + weight.reshape(-1, *[1] * (-neuron_dim(layer) - 1)) * output
    return out


def gradients(loss: Tensor, wanted: list[Any]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("dendrites", [1, 3])
@pytest.mark.parametrize(("make", "shape"), ALL)
def test_every_gradient_is_that_of_the_formula(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dendrites: int
) -> None:
    x = random_input(shape).requires_grad_()
    layer = live_layer(make, x, dendrites)
    wanted = [x, *(p for p in layer.parameters() if p.numel())]
    out, expected = output_of(layer(x)), live_reference(layer, x)
    torch.testing.assert_close(out, expected)
    found, references = gradients(wavy(out), wanted), gradients(wavy(expected), wanted)
    for one, other in zip(found, references, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    through = gradients(wavy(reference_forward(layer, x)), [x])[0]
    assert (found[0] - through).abs().max() > 1e-3  # of which frozen dendrites would hide a share
    names = [name for name, p in layer.dendrites.named_parameters() if p.requires_grad]
    assert any(name.startswith("0.nodes.") for name in names)
    assert ("0.links" in names) == (dendrites > 1)


def test_gradients_flow_through_the_pieces_of_a_sequence() -> None:
    x = random_input((6, 2, 3)).requires_grad_()
    layer = live_layer(lambda: nn.LSTM(3, 4), x, 2)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = gradients(wavy(layer(x)[0]), wanted)
    outputs, state = [], None
    for piece in x.split(2):
        out, state = layer(piece, state)
        outputs.append(out)
    for one, other in zip(gradients(wavy(torch.cat(outputs)), wanted), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("live", [True, False])
def test_the_error_of_a_layer_comes_through_live_dendrites_and_not_through_candidates(live: bool) -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    model = nn.Sequential(first, nn.Tanh(), second).double()
    randomise(model, 1)
    network = attach(model, live=live)
    grow(second, 2, 2)
    x = random_input((9, 4))
    hidden = first(x).tanh().detach().requires_grad_()
    out = live_reference(second, hidden) if live else reference_forward(second, hidden)
    error = gradients(wavy(out), [hidden])[0] * (1 - hidden.detach().square())

    network.start_candidates(pool=2)
    for pool in network.candidates.values():
        randomise(pool, 3)
    wavy(model(x)).backward()
    assert_gradients(first, reference_gradients(first, [(x, error)]))
    assert all(p.grad is None for p in model.parameters())


def test_a_set_that_grows_without_candidates_changes_no_output_and_learns() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(16, 4)
    network = attach(layer, live=True)
    before = layer(x)
    network.grow([""], torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), before)
    users = torch.get_rng_state()
    network.grow([""], torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), users)
    torch.testing.assert_close(layer(x), before)
    assert network.num_dendrites == 2
    first, second = layer.dendrites[0].nodes.weight.unflatten(0, (2, 3))
    assert not torch.equal(first, second)
    assert 0 < second.abs().max() <= 0.5
    trained = {id(parameter) for parameter, _ in network.trained_parameters()}
    assert trained == {id(parameter) for parameter in layer.dendrites.parameters()}
    assert list(network.frozen_parameters()) == []

    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    target = x[:, :3] * x[:, 1:]
    losses = []
    for _ in range(200):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    plain = torch.linalg.lstsq(torch.cat([x, torch.ones(16, 1)], 1), target).solution
    best_plain = (torch.cat([x, torch.ones(16, 1)], 1) @ plain - target).square().mean().item()
    assert losses[-1] < 0.5 * best_plain


def test_sets_are_live_after_a_correlation_phase_and_frozen_within_it() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(16, 4)
    network = attach(layer, live=True)
    for count in (1, 2):
        network.start_candidates(pool=2)
        assert not any(p.requires_grad for p in layer.parameters())
        layer(x).sin().sum().backward()
        network.integrate()
        assert network.num_dendrites == count
        frozen = [name for name, p in layer.named_parameters() if not p.requires_grad]
        assert frozen == (["dendrites.0.links"] if count == 1 else [])  # one dendrite has no links


def test_weights_say_which_dendrites_are_live() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    network = attach(layer, live=True)
    network.grow([""])
    network.set_next(live=False)
    network.grow([""])
    network.grow([""])
    assert [(form.count, form.live) for form in layer.dendrites.forms] == [(1, True), (2, False)]
    randomise(layer.dendrites, 1)
    weights = layer.state_dict()
    fresh = nn.Linear(4, 3)
    network = restore_structure(fresh, weights)
    fresh.load_state_dict(weights)
    assert torch.equal(fresh(x), layer(x))
    assert fresh.dendrites.forms == layer.dendrites.forms
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    frozen = {"1.links", "1.nodes.weight", "1.nodes.bias", "0.links"}  # one dendrite alone has no links
    assert trained == fresh.state_dict().keys() - {f"dendrites.{name}" for name in {*frozen, "0.code", "1.code"}}
