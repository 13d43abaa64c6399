"""A frozen layer does not keep its input: a model may change it in place, and dendrites that learn must not mind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import attach
from pl_dendrites.core.rule.processes import JointLearning
from tests.core.helpers import grow, output_of

LAYERS = [
    pytest.param(lambda: nn.Linear(3, 4), (5, 3), id="linear"),
    pytest.param(lambda: nn.Conv1d(3, 4, 2), (2, 3, 6), id="convolution"),
    pytest.param(lambda: nn.GRU(3, 4), (6, 2, 3), id="gru"),
    pytest.param(lambda: nn.LSTMCell(3, 4), (5, 3), id="cell"),
]


class Net(nn.Module):
    """A frozen backbone, an input that is changed behind it, and a head."""

    def __init__(self, layer: nn.Module, changes: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3).requires_grad_(False)  # else a convolution keeps its input all the same
        self.layer, self.changes = layer.requires_grad_(False), changes
        if isinstance(layer, nn.Linear):
            layer.bias.requires_grad_(True)  # of which the input is not needed either

    def forward(self, x: Tensor, channels_last: bool) -> Tensor:
        x = self.first(x)
        x = x.transpose(1, 2).contiguous() if channels_last else x * 1
        out: Tensor = output_of(self.layer(x))
        if self.changes:
            x.mul_(2).add_(3)
        return out.sin().sum() + (x.sum() if self.changes else (x * 2 + 3).sum())


def run(model: Net, x: Tensor) -> None:
    convolution = isinstance(model.layer, nn.Conv1d)
    model(x.transpose(1, 2) if convolution else x, convolution).backward()


def learned(make: Callable[[], nn.Module], x: Tensor, changes: bool, **settings: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = Net(make(), changes)
    network = attach(model, targets=["layer"], live=settings.get("live", False))
    grow(model.layer, 1)
    if settings.get("live"):
        run(model, x)
        return [p.grad for p, _ in network.trained_parameters() if p.grad is not None]
    network.start_candidates(pool=2, generator=torch.Generator().manual_seed(0))
    joint = JointLearning(network.candidates.values(), lambda tensor: None, 2) if settings.get("joint") else None
    run(model, x)
    if joint is not None:
        joint.learn()
    return [p.grad for p in network.candidate_parameters() if p.grad is not None]


@pytest.mark.parametrize("settings", [{}, {"live": True}, {"joint": True}], ids=["candidates", "live", "processes"])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_what_learns_on_a_frozen_layer_sees_the_input_as_the_layer_saw_it(
    make: Callable[[], nn.Module], shape: tuple[int, ...], settings: dict[str, bool]
) -> None:
    x = torch.randn(shape)
    expected, found = (learned(make, x, changes, **settings) for changes in (False, True))
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
