"""Where a set of dendrites is worth its parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pl_dendrites.core import Form, attach
from pl_dendrites.core.rule.moments import batch_moments
from pl_dendrites.core.rule.worth import Offer, choose_neurons, worth_of


def test_worth_is_the_squared_gradient_of_the_output_weight_of_a_dendrite_with_unit_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 500, 3, generator=generator, dtype=torch.float64)
    outputs = (outputs - outputs.mean(1, keepdim=True)) / outputs.std(1, keepdim=True, correction=0)
    error = torch.randn(500, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 1.0, 10.0])
    weight = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss = ((weight[:, None] * outputs) * (error - error.mean(0))).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(worth_of(batch_moments(outputs, error, -1)[0], inputs=0), gradient.square().amax(0))


def test_weights_that_fit_noise_are_worth_nothing_in_the_mean() -> None:
    """Ordinary least squares of 20 inputs on 100 samples of noise explains a fifth of its variance."""
    generator, plain, adjusted = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        x, error = torch.randn(100, 20, generator=generator), torch.randn(100, 1, generator=generator)
        inputs = torch.cat([x, torch.ones(100, 1)], 1)
        fitted = inputs @ torch.linalg.lstsq(inputs, error).solution
        moments, _ = batch_moments(fitted[None], error, -1)
        plain.append(float(worth_of(moments, 0)) / 100**2)
        adjusted.append(float(worth_of(moments, 20)) / 100**2)
    assert sum(plain) / 200 == pytest.approx(0.2, abs=0.02)
    assert sum(adjusted) / 200 < 0.05  # not nothing, for what is below counts as nothing


def test_the_worthiest_neurons_for_their_parameters_are_chosen_within_the_budget() -> None:
    offers = {
        "cheap": Offer(torch.tensor([0.3, 0.0, 0.2]), 2, together=False),
        "dear": Offer(torch.tensor([3.0, 0.5]), 10, together=False),
        "whole": Offer(torch.tensor([0.5, 0.5]), 4, together=True),
    }
    full = 3 * 2 + 2 * 10 + 2 * 4
    order = [("dear", 0), ("cheap", 0), ("whole", None), ("cheap", 2)]  # 0.3, 0.15, 0.125 and 0.1 for a parameter
    spent = [10, 12, 20, 22]
    for number in range(1, 5):
        chosen = choose_neurons(offers, spent[number - 1])
        found = {(name, n) for name, neurons in chosen.items() for n in neurons.tolist()}
        expected = {(name, n) for name, n in order[:number] if n is not None}
        expected |= {("whole", n) for n in (0, 1) if ("whole", None) in order[:number]}
        assert found == expected
    assert {name: neurons.tolist() for name, neurons in choose_neurons(offers, 1e-6).items()} == {"dear": [0]}
    assert all(1 not in neurons for name, neurons in choose_neurons(offers, 0.999 * full).items() if name == "cheap")


def test_one_that_does_not_fit_makes_way_for_what_is_worth_less_and_does() -> None:
    offers = {
        "large": Offer(torch.tensor([9.0, 9.0]), 50, together=True),
        "small": Offer(torch.tensor([1.0, 0.5, 0.0]), 10, together=False),
    }
    chosen = choose_neurons({**offers, "first": Offer(torch.tensor([5.0]), 10, together=False)}, 30)
    assert {name: neurons.tolist() for name, neurons in chosen.items()} == {"first": [0], "small": [0, 1]}


def test_with_fewer_samples_than_inputs_what_correlates_most_is_chosen() -> None:
    """None can be told from noise then; it is not the first neuron each time."""
    random = torch.Generator().manual_seed(0)
    outputs, error = torch.randn(1, 6, 3, generator=random), torch.randn(6, 3, generator=random)
    error /= error.std(0)
    outputs[0, :, 2] = error[:, 2] + 0.01 * outputs[0, :, 2]
    moments = batch_moments(outputs, error, -1)[0]
    offer = Offer(worth_of(moments, 20).clamp(max=0), 5, together=False, seen=worth_of(moments, 0))
    assert choose_neurons({"a": offer}, 0.15)["a"].tolist() == [2]


@pytest.mark.parametrize("positions", [4, 16])
def test_a_feature_map_is_worth_what_its_one_weight_does_at_all_positions(positions: int) -> None:
    """A convolution of one pixel beside a Linear that sees the same: each loss is a mean over its batch."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 5, positions, generator=random), torch.randn(32, 3, positions, generator=random)
    line, point = nn.Linear(5, 3), nn.Conv1d(5, 3, 1)
    with torch.no_grad():
        point.weight.copy_(line.weight[..., None])
        point.bias.copy_(line.bias)
    worths = []
    for layer, inputs, wanted in (
        (line, x[..., 0], y[..., 0]),
        (point, x[..., :1].expand_as(x), y[..., :1].expand_as(y)),
    ):
        network = attach(layer)
        network.start_candidates(2, torch.Generator().manual_seed(1))
        (layer(inputs) - wanted).square().flatten(1).sum(1).mean().backward()
        worths.append(worth_of(network.candidates[""].moments, 0))
    torch.testing.assert_close(worths[1], worths[0] * positions**2, rtol=1e-3, atol=0)


def test_a_set_on_some_neurons_takes_its_share_of_parameters_and_those_with_most_to_gain() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(8, 6), "two": nn.Linear(8, 6), "rnn": nn.GRU(8, 2)}).double()
    network = attach(model)
    network.set_next(fan_in=3, share=0.3)
    x = torch.randn(64, 8, dtype=torch.float64)
    network.start_candidates(2)
    network.keep_strongest()

    def outputs() -> torch.Tensor:
        return torch.cat([model["one"](x), model["two"](x), model["rnn"](x)[0]], 1)

    scale = torch.tensor([1, 0.01, 0.01, 0.01, 1, 0.01, *[0.01] * 5, 1, 0.001, 0.001])
    before = outputs()
    (before.square() * scale).sum().backward()
    sizes = {name: sum(p.numel() for p in model[name].parameters()) for name in model}
    taken = network.integrate()
    assert sorted(taken) == ["one", "two"]
    assert torch.equal(outputs(), before)
    one, two = (model[name].dendrites for name in ("one", "two"))
    assert {0, 4} <= set(one[0].neurons.tolist())
    assert 5 in two[0].neurons.tolist()
    full = 12 * (3 + 1 + 1) + sum(p.numel() for p in nn.GRU(8, 2).parameters()) + 2
    grown = sum(sum(p.numel() for p in model[name].parameters()) - size for name, size in sizes.items())
    assert 0.2 * full < grown <= 0.3 * full
    assert "rnn" not in network.skipped
    assert one.forms == [Form(1, fan_in=3, neurons=len(one[0].neurons))]


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    network = attach(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="`share` must be above 0 and at most 1"):
        network.set_next(share=share)
