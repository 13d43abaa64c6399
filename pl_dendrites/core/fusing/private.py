"""A Linear or convolution and its private dendrites: one product for all that sees the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from pl_dendrites.core.fusing.cascade import add_cascade, coefficients, scales_of, spread_neurons
from pl_dendrites.core.fusing.computation import Computation
from pl_dendrites.core.fusing.fetch import Few, Nodes, fetch, fetches
from pl_dendrites.core.growth.block import Block
from pl_dendrites.core.growth.placed_block import PlacedBlock
from pl_dendrites.core.kinds import LinearConv, Sparse, Transposed, inputs_of, weight_of
from pl_dendrites.core.kinds.linear_conv import like

__all__ = ["Affine", "fuse_private"]


class Affine(NamedTuple):
    """What a normalisation in evaluation mode does with each neuron.

    Attributes:
        scale: shape ``(C,)``.
        shift: shape ``(C,)``.
    """

    scale: Tensor
    shift: Tensor


@torch.no_grad()
def fuse_private(
    layer: nn.Module,
    kind: LinearConv,
    blocks: list[Block],
    affine: Affine | None = None,
    few: Few = Few.ZEROS,
    *,
    placed: Sequence[PlacedBlock] = (),
) -> fx.GraphModule:
    """One computation that does what a layer with private dendrites does.

    Args:
        layer: without its dendrites.
        kind: the view that they have of it.
        blocks: the dendrites.
        affine: what follows on the layer, to be folded in.
        few: how dendrites see a few of many inputs. Convolutions have zeros whatever this says.
        placed: dendrites that change the layer's weight.

    Returns:
        A module that is called as the layer is.

    Example:
        >>> from pl_dendrites.core.growth.hooks import dendrites_of, hang, take_off
        >>> layer, x = nn.Linear(4, 3), torch.randn(5, 4)
        >>> hang(layer)
        >>> dendrites = dendrites_of(layer)
        >>> dendrites.grow(layer)
        >>> _ = dendrites[0].weights[0].data.fill_(1.0)
        >>> out = layer(x)
        >>> take_off(layer)
        >>> torch.testing.assert_close(fuse_private(layer, dendrites.kind, dendrites.private)(x), out)
    """
    graph = Computation()
    x, *others = graph.arguments_of(layer)
    apart = [_fetches(kind, block, few) for block in blocks]
    own = _folded(_own(layer, kind, placed), affine, kind)
    parts = [*(_rows(block, kind) for block, alone in zip(blocks, apart, strict=True) if not alone), own]
    made = like(layer, inputs_of(layer), sum(part.bias.numel() for part in parts), kind.groups, own.bias.device)
    for name, values in zip(("weight", "bias"), zip(*parts, strict=True), strict=True):
        kind.by_group(made, name).copy_(torch.cat(values, 1))
    product = graph.run("product", made, x, *others)
    if not blocks:
        return graph.finish(product)
    groups = () if kind.groups == 1 else (kind.groups,)
    rows = graph.method("unflatten", product, kind.dim, (*groups, -1, kind.neurons // kind.groups))
    if any(apart):
        rows = _in_order(graph, x, rows, list(zip(blocks, apart, strict=True)), kind)
    factors = coefficients(blocks, kind.neurons, None if affine is None else affine.scale)
    if groups:
        factors = [factor.unflatten(1, (kind.groups, -1)).transpose(0, 1) for factor in factors]
    return graph.finish(add_cascade(graph, rows, blocks, factors, kind.dim))


class _Rows(NamedTuple):
    weight: Tensor  # (groups, rows, C / groups, inputs of a group, *kernel)
    bias: Tensor  # (groups, rows, C / groups)


def _fetches(kind: LinearConv, block: Block, few: Few) -> bool:
    sparse = block.kind if isinstance(block.kind, Sparse) and kind.dim == -1 else None
    return sparse is not None and fetches(kind.inputs, sparse.fan_in, few)


def _own(layer: nn.Module, kind: LinearConv, placed: Sequence[PlacedBlock]) -> _Rows:
    # What the layer itself is; a weight that is parametrized is computed.
    twin = like(layer, inputs_of(layer), kind.neurons, kind.groups, weight_of(layer).device)
    there, bias = weight_of(layer), getattr(layer, "bias", None)
    twin.get_parameter("weight").copy_(there.T if isinstance(kind, Transposed) else there)
    twin.get_parameter("bias").copy_(torch.zeros(()) if bias is None else bias)
    weight = kind.by_group(twin, "weight").detach()
    for block in placed:
        weight += block.difference
    return _Rows(weight, kind.by_group(twin, "bias").detach())


def _folded(own: _Rows, affine: Affine | None, kind: LinearConv) -> _Rows:
    if affine is None:
        return own
    scale, shift = (part.unflatten(0, (kind.groups, 1, -1)) for part in affine)
    return _Rows(own.weight * _shaped(scale, own.weight), own.bias * scale + shift)


def _rows(block: Block, kind: LinearConv) -> _Rows:
    # Nodes of a block as rows of the product.
    weight, bias = _values(block, kind)
    before = scales_of(block.form.activation).before
    every = (spread_neurons(value, block, kind.neurons) * before for value in (weight, bias))
    return _Rows(*(value.unflatten(1, (kind.groups, -1)).transpose(0, 1) for value in every))


def _values(block: Block, kind: LinearConv) -> tuple[Tensor, Tensor]:
    # (count, C', inputs of a group, *kernel) and (count, C')
    if not isinstance(block.kind, Sparse):
        assert isinstance(block.kind, LinearConv)
        return block.kind.by_neuron(block.nodes, "weight"), block.kind.by_neuron(block.nodes, "bias")
    values = block.kind.by_neuron(block.nodes)
    weight, places = values["weight"], values["inputs"].long() % kind.inputs
    shape = (*places.shape[:2], kind.inputs, *weight.shape[3:])
    dense = weight.new_zeros(shape).scatter_add(2, _shaped(places, weight).expand_as(weight), weight)
    return dense, values["bias"]


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def _in_order(
    graph: Computation, x: fx.Node, rows: fx.Node, blocks: list[tuple[Block, bool]], kind: LinearConv
) -> fx.Node:
    # Rows of the product, and those of blocks that fetch their inputs, as the dendrites follow each other.
    parts, at = [], 0
    for number, (block, alone) in enumerate(blocks):
        if alone:
            parts.append(fetch(graph, f"block_{number}", x, _nodes(block, kind)))
        else:
            parts.append(graph.method("narrow", rows, kind.dim - 1, at, block.count))
            at += block.count
    return graph.call(torch.cat, [*parts, graph.method("narrow", rows, kind.dim - 1, at, 1)], kind.dim - 1)


def _nodes(block: Block, kind: LinearConv) -> Nodes:
    assert isinstance(block.kind, Sparse)
    values, before = block.kind.by_neuron(block.nodes), scales_of(block.form.activation).before
    places, weight, bias = (spread_neurons(values[name], block, kind.neurons) for name in ("inputs", "weight", "bias"))
    return Nodes(places, weight * before, bias * before)
