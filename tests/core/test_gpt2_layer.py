"""Hugging Face's ``Conv1D`` grows as the Linear that it is, whether its package is there or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import DendriticNetwork, attach
from pl_dendrites.core.kinds import OwnLayer, Transposed, WholeModule, kind_of
from tests.core.helpers import grow


class Conv1D(nn.Module):
    """As ``transformers.pytorch_utils`` has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Scaled(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Bent(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def two(fan_in: int | None = None, live: bool = False) -> tuple[DendriticNetwork, DendriticNetwork]:
    layer, plain = Conv1D(6, 5).double(), nn.Linear(5, 6).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight.T)
        plain.bias.copy_(layer.bias)
    return attach(layer, fan_in=fan_in, live=live), attach(plain, fan_in=fan_in, live=live)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("fan_in", [None, 2])
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_it_grows_as_the_linear_that_it_is(
    shape: tuple[int, ...], fan_in: int | None, live: bool, share: float
) -> None:
    networks = two(fan_in, live)
    x = torch.randn(shape, dtype=torch.float64)
    outputs, weights = [], []
    for network in networks:
        assert list(network.layers) == [""]
        network.set_next(live=live, fan_in=fan_in, share=share)
        for seed in range(2):
            network.start_candidates(pool=3, generator=torch.Generator().manual_seed(seed))
            network.model(x).sin().sum().backward()
            assert network.keep_strongest() == [""] * (fan_in is not None)
            network.model(x).sin().sum().backward()
            network.integrate()
        with torch.no_grad():
            for weight, _ in network.trained_parameters():
                weight.add_(0.1)
        outputs.append(network.model(x))
        weights.append({k: v for k, v in network.model.state_dict().items() if "dendrites" in k})
    torch.testing.assert_close(*outputs)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name])
    fresh = Conv1D(6, 5).double()
    attach(fresh).model.load_state_dict(networks[0].model.state_dict())
    assert torch.equal(fresh(x), outputs[0])


def test_it_is_known_by_name_and_shape_and_by_what_it_computes() -> None:
    assert type(kind_of(Conv1D(4, 3))) is Transposed
    assert type(kind_of(Bent(4, 3))) is OwnLayer
    other = type("Conv1D", (nn.Sequential,), {})
    assert type(kind_of(other(nn.Linear(2, 2)))) is WholeModule
    assert type(kind_of(other())) is WholeModule


@pytest.mark.parametrize(("make", "there"), [(Bent, ["layer"]), (Scaled, [])])
def test_a_subclass_that_computes_in_a_way_of_its_own(make: type[Conv1D], there: list[str]) -> None:
    model = nn.ModuleDict({"layer": make(4, 3)})
    network = attach(model)
    model["layer"](torch.randn(5, 3))
    assert network.can_grow() == there


def test_a_block_that_ends_with_one_has_its_neurons_there() -> None:
    block = nn.Sequential(nn.Linear(3, 3), Conv1D(4, 3))
    attach(nn.Sequential(block), targets=["0"])
    block(torch.randn(2, 5, 3))
    assert block.dendrites.kind.neurons == 4


def test_the_one_of_the_package_itself() -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 3)
    assert type(kind_of(layer)) is Transposed
    attach(layer)
    grow(layer, 1)
    assert layer(torch.randn(2, 5, 3)).shape == (2, 5, 4)
