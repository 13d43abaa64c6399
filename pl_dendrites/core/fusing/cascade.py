"""Private dendrites of a layer in a graph: each adds to those that come later, and to the neuron itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.fusing.computation import Computation
from pl_dendrites.core.growth.block import Block

__all__ = ["Scales", "activated", "add_cascade", "coefficients", "scales_of", "spread_neurons"]


class Scales(NamedTuple):
    """Factors that an activation leaves to the weights before and after it.

    Attributes:
        before: of its potential.
        after: of its output.
    """

    before: float = 1.0
    after: float = 1.0


def scales_of(activation: str) -> Scales:
    r"""Those of an activation: :math:`x\,\Phi(2x)` is a GELU of twice the potential, halved."""
    return Scales(2.0, 0.5) if activation == "sharp_gelu" else Scales()


def activated(graph: Computation, activation: str, potential: fx.Node) -> fx.Node:
    """An activation without the factors that :func:`scales_of` leaves to the weights."""
    return graph.call(F.gelu if activation == "sharp_gelu" else ACTIVATIONS[activation], potential)


def spread_neurons(values: Tensor, block: Block, neurons: int) -> Tensor:
    """Values of a block's neurons as those of all neurons, zero where one has no dendrites here.

    Args:
        values: shape ``(count, C', *)``.
        block: the block.
        neurons: how many the layer has, ``C``.

    Returns:
        Shape ``(count, C, *)``.
    """
    if block.neurons is None:
        return values
    return values.new_zeros(len(values), neurons, *values.shape[2:]).index_copy(1, block.neurons, values)


@torch.no_grad()
def coefficients(blocks: Sequence[Block], neurons: int, scale: Tensor | None = None) -> list[Tensor]:
    r"""What each dendrite is multiplied by on its way to those that come later, and to the neuron.

    Args:
        blocks: of one layer, in order.
        neurons: how many the layer has, ``C``.
        scale: shape ``(C,)``, what the layer's output is multiplied by.

    Returns:
        For each dendrite :math:`i` of ``k`` shape ``(k + 1, C)``: :math:`u_{j,i}` of all, 0 where :math:`j` is not
        later, and last :math:`a_i`.
    """
    each = [(block, j) for block in blocks for j in range(block.count)]
    links = [spread_neurons(block.links[block.links_of(j)], block, neurons) for block, j in each]
    weights = [spread_neurons(block.weights[j][None], block, neurons)[0] for block, j in each]
    scales = [scales_of(block.form.activation) for block, _ in each]
    found = []
    for i, (block, _) in enumerate(each):
        none = torch.zeros_like(weights[i])
        later = [links[j][i] * scales[j].before if j > i else none for j in range(len(each))]
        rows = torch.stack([*later, weights[i] if scale is None else weights[i] * scale]) * scales[i].after
        has_it = spread_neurons(torch.ones_like(block.weights[0])[None], block, neurons)
        found.append(rows * has_it)
    return found


def add_cascade(
    graph: Computation, rows: fx.Node, blocks: Sequence[Block], factors: Sequence[Tensor], dim: int
) -> fx.Node:
    """Add what dendrites say to those that come later, and to the neurons.

    Args:
        graph: the computation.
        rows: potentials of each dendrite, and last the layer's own output, along dimension ``dim - 1``.
        blocks: of the layer, in order.
        factors: from :func:`coefficients`; with a first dimension of groups where neurons fall into such.
        dim: of the neurons, counted from the end.

    Returns:
        What the layer and its dendrites put out: without the dimension of the rows, and with one less of groups.
    """
    activations = [block.form.activation for block in blocks for _ in range(block.count)]
    for i, (activation, factor) in enumerate(zip(activations, factors, strict=True)):
        output = activated(graph, activation, graph.method("narrow", rows, dim - 1, i, 1))
        spread = graph.value(f"factors_{i}", factor.reshape(*factor.shape, *[1] * (-dim - 1)))
        # To all rows at once, and no multiply-add: what compiles for small machines knows these two.
        rows = graph.call(torch.add, rows, graph.call(torch.mul, spread, output))
    whole = graph.method("narrow", rows, dim - 1, len(activations), 1)
    groups = factors[0].ndim - 2  # one dimension, or none
    return graph.method("flatten", whole, dim - 1 - groups, dim)
