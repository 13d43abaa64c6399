"""Layouts of tensors, against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pl_dendrites.core.tensors import per_neuron, unstack_nodes


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("rest", "dim"), [((), 0), ((4, 3), 0), ((2, 5), -3), ((7,), -1), ((7,), 1)])
def test_unstacking_finds_each_node_where_its_group_has_it(
    rest: tuple[int, ...], dim: int, count: int, groups: int
) -> None:
    neurons, size = 6, 6 // groups
    front = dim in (0, -3)
    stacked = torch.randn(count * neurons, *rest) if front else torch.randn(*rest, count * neurons)
    nodes = unstack_nodes(stacked, count, groups, dim)
    for j in range(count):
        for neuron in range(neurons):
            channel = neuron // size * count * size + j * size + neuron % size
            torch.testing.assert_close(nodes[j].select(dim, neuron), stacked.select(dim, channel), rtol=0, atol=0)


@pytest.mark.parametrize(("dim", "ndim"), [(-1, 1), (-1, 3), (-2, 3), (-3, 3), (-3, 4)])
def test_values_per_neuron_meet_the_neuron_dimension(dim: int, ndim: int) -> None:
    values, sizes = torch.randn(2, 5), [3] * ndim
    sizes[dim] = 5
    view = per_neuron(values, dim, ndim).expand(2, *sizes)
    for row, neuron in np.ndindex(2, 5):
        assert (view[row].select(dim, neuron) == values[row, neuron]).all()
