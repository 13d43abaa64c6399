"""Sparse dendrites of a Linear, and of a convolution of one point: sums of a few rows, and all their derivatives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from pl_dendrites.core import attach
from pl_dendrites.core.kinds.bags import weighted_sums
from pl_dendrites.core.kinds.sparse import SparseConv
from tests.core.helpers import randomise


def made(
    n: int = 5, samples: int = 4, bags: int = 3, size: int = 2, dtype: torch.dtype = torch.int32
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.stack([torch.randperm(n)[:size] for _ in range(bags)]).to(dtype)
    table = torch.randn(samples, n, dtype=torch.float64).T.requires_grad_()
    return table, torch.randn(bags, size, dtype=torch.float64, requires_grad=True), rows


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (1, 1, 1, 1), (6, 3, 2, 6), (5, 0, 3, 2), (5, 4, 3, 2, torch.int64)])
def test_they_are_the_sums_and_so_are_all_derivatives(shape: tuple[Any, ...]) -> None:
    table, weight, rows = made(*shape)
    torch.testing.assert_close(
        weighted_sums(table, weight, rows), (table[rows] * weight.unsqueeze(-1)).sum(1), check_stride=False
    )
    if table.numel():
        assert torch.autograd.gradcheck(weighted_sums, (table, weight, rows))
        assert torch.autograd.gradgradcheck(weighted_sums, (table, weight, rows))


CONVOLUTIONS = {
    "1d": nn.Conv1d(6, 5, 1),
    "2d": nn.Conv2d(6, 5, 1, padding="same"),
    "3d": nn.Conv3d(6, 5, 1, dilation=2),
    "transposed": nn.ConvTranspose2d(6, 5, 1),
    "a stride": nn.Conv2d(6, 5, 1, stride=2),
    "padding": nn.Conv2d(6, 5, 1, padding=1),
}


@pytest.mark.parametrize("which", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
def test_those_of_a_convolution_are_what_groups_of_channels_are(which: str, batch: tuple[int, ...]) -> None:
    layer = CONVOLUTIONS[which].double()
    nodes, dim = SparseConv(layer, 4, 2, torch.device("cpu")), -1 - len(layer.kernel_size)
    nodes.inputs.copy_(torch.stack([torch.randperm(6)[:2] for _ in nodes.inputs]))
    for parameter in nodes.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(*batch, 6, *[3] * (-1 - dim), dtype=torch.float64, requires_grad=True)
    sums, grouped = nodes(x, layer(x)), nodes.layer(x.index_select(dim, nodes.inputs.flatten()))
    torch.testing.assert_close(sums, grouped, check_stride=False)
    learned = (x, *nodes.parameters())
    slopes = (torch.autograd.grad(out.sin().sum(), learned) for out in (sums, grouped))
    for own, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(own, expected, check_stride=False)


def third(table: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    out = weighted_sums(table, weight, rows).sin().sum()
    for _ in range(2):
        out = sum(g.square().sum() for g in torch.autograd.grad(out, (table, weight), create_graph=True))
    return out


def test_a_third_derivative() -> None:
    assert torch.autograd.gradcheck(third, made())


def grown(fan_in: int | None) -> nn.Module:
    """Live dendrites that see two inputs each, or the same ones with zeros for all others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    network = attach(model, live=True, fan_in=2)
    network.grow(network.targets)
    randomise(model)
    if fan_in is None:
        sparse, plain = model, copy.deepcopy(model)
        network = attach(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double(), live=True)
        network.grow(network.targets)
        model = network.model
        own = {name: value for name, value in plain.state_dict().items() if ".nodes." not in name}
        for name in ("0", "2"):
            nodes = sparse.get_submodule(f"{name}.dendrites.0.nodes")
            dense = torch.zeros(len(nodes.bias), model.get_submodule(name).in_features, dtype=torch.float64)
            own[f"{name}.dendrites.0.nodes.weight"] = dense.scatter(1, nodes.inputs.long(), nodes.weight.detach())
            own[f"{name}.dendrites.0.nodes.bias"] = nodes.bias.detach()
        model.load_state_dict(own)
    return model


def test_a_physics_informed_loss_with_sparse_live_dendrites() -> None:
    """A loss on second derivatives is that of the dense dendrites that they are a part of; so are its gradients."""
    x = torch.randn(7, 4, dtype=torch.float64)
    found = []
    for fan_in in (2, None):
        model, points = grown(fan_in), x.clone().requires_grad_()
        first = torch.autograd.grad(model(points).sum(), points, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), points, create_graph=True)[0]
        loss = second.square().mean() + first.mean()
        loss.backward()
        found.append((loss.detach(), model[0].weight.grad, model[2].dendrites[0].nodes.bias.grad))
    for sparse, dense in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_transforms_differentiate_them_too() -> None:
    sparse, dense, x = grown(2), grown(None), torch.randn(7, 4, dtype=torch.float64)
    one, other = (vmap(grad(lambda sample, net=net: net(sample).sum()))(x) for net in (sparse, dense))
    torch.testing.assert_close(one, other)
