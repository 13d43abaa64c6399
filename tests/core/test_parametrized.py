"""Layers whose weight is computed: looking at one leaves it as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pl_dendrites.core import attach, restore_structure


def network() -> nn.Sequential:
    return nn.Sequential(spectral_norm(nn.Conv1d(3, 4, 3)), nn.ReLU(), nn.Flatten(), spectral_norm(nn.Linear(20, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_growing_takes_no_step_of_a_spectral_norm(training: bool) -> None:
    """In training, each look at such a weight moves its buffers, and with them the output."""
    torch.manual_seed(0)
    model = network().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    grown = attach(model)
    grown.start_candidates(pool=2)
    model.eval()(torch.randn(8, 3, 7)).square().sum().backward()
    model.train(training)
    assert sorted(grown.integrate()) == ["0", "3"]
    restore_structure(model, model.state_dict())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert [m.training for name, m in model.named_modules() if "dendrites" not in name] == flags


def test_a_part_that_is_in_inference_alone_stays_so() -> None:
    model = network()
    model[0].parametrizations.weight[0].eval()
    attach(model)
    assert not model[0].parametrizations.weight[0].training
    assert model[3].parametrizations.weight[0].training
