"""Counters of parameters and operations, beside counts by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pl_dendrites.core import Form, Soma, UnitSet, fuse
from pl_dendrites.core.cost import product_weights
from tests.core.test_fuse import shared
from tests.core.test_stacks import make_layer, random_input


def counted(model: nn.Module, *inputs: Any) -> int:
    """Multiplications of a forward pass, as PyTorch counts two operations for each."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def linear() -> nn.Module:
    return nn.Linear(100, 6)


def convolution() -> nn.Module:
    return nn.Conv2d(4, 6, 3, padding=1)


ROWS, PLACES = (4, 100), (4, 4, 5, 5)  # four samples, and a hundred
CASES = {
    "dense": (linear, ROWS, Form(2), 4 * 6 * (100 + 2 * 100)),
    "of some neurons": (linear, ROWS, Form(1, neurons=2), 4 * (6 * 100 + 2 * 100)),
    "sparse": (linear, ROWS, Form(2, fan_in=7), 4 * 6 * (100 + 2 * 7)),
    "sparse and live": (linear, ROWS, Form(2, fan_in=7, live=True), 4 * 6 * (100 + 2 * 7)),
    "of a convolution": (convolution, PLACES, Form(2), 100 * 6 * 9 * (4 + 2 * 4)),
    "sparse, of a convolution": (convolution, PLACES, Form(2, fan_in=3), 100 * 6 * 9 * (4 + 2 * 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_private_dendrites(case: str) -> None:
    make, shape, form, expected = CASES[case]
    layer, x = make_layer(make, [form]), random_input(shape)
    assert counted(layer, x) == expected
    assert measure_flops(layer, lambda: layer(x)) == 2 * expected
    samples = x.numel() // x.shape[1]
    grown = sum(product_weights(block.nodes) for block in layer.dendrites)  # as the report has it
    assert samples * (product_weights(layer) + grown) == expected
    if form.fan_in is None and form.neurons is None:
        assert counted(fuse(layer), x) == expected


@pytest.mark.parametrize("live", [False, True])
def test_a_backward_pass(live: bool) -> None:
    layer, x = make_layer(linear, [Form(2, fan_in=7, live=live)]), random_input(ROWS).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    passes = 3 if live else 1  # the gradients of inputs and weights, and the output; of frozen ones the output alone
    assert counter.get_total_flops() == 2 * 4 * 6 * (3 * 100 + passes * 2 * 7)


def test_bags_of_others_count_as_before() -> None:
    bag = nn.EmbeddingBag(5, 3)
    with FlopCounterMode(display=False) as counter:
        bag(torch.zeros(2, 2, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == 0


def test_shared_dendrites_count_as_they_are_computed() -> None:
    """With zeros for what they do not see, where there are up to 48 inputs for each that they do."""
    for inputs, computed in ((20, 20), (200, 2)):
        x = torch.randn(32, inputs)
        soma = shared(Soma(inputs, 3), "", x, UnitSet(units=5, field=2))
        assert counted(soma, x) == 32 * (5 * computed + 5 * 3)
        assert product_weights(soma.dendrites[0]) == 5 * 2 + 5 * 3


def test_lightnings_summary() -> None:
    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make_layer(linear, [Form(2, fan_in=7)])
            self.example_input_array = random_input(ROWS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    model = Model()
    summary = ModelSummary(model)
    assert summary.total_flops == 2 * CASES["sparse"][-1]
    assert summary.total_parameters == sum(parameter.numel() for parameter in model.parameters())
