"""Modules whose dendrites are copies of them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn

from pl_dendrites.core.fusing.cascade import add_cascade, coefficients, scales_of
from pl_dendrites.core.fusing.computation import Computation, NotFusible
from pl_dendrites.core.growth.block import Block
from pl_dendrites.core.kinds import Cell, WholeModule

__all__ = ["add_copies", "fuse_copies"]


def fuse_copies(layer: nn.Module, kind: WholeModule, blocks: list[Block]) -> fx.GraphModule:
    """One computation that does what a module does whose dendrites are copies of it.

    Args:
        layer: without its dendrites.
        kind: the view that they have of it.
        blocks: the dendrites.

    Raises:
        NotFusible: if it is not known what the module returns, or that is neither a tensor nor what an ``nn.LSTMCell``
            returns.
    """
    graph = Computation()
    arguments = graph.arguments_of(layer)
    pair = isinstance(layer, nn.LSTMCell)
    if not pair and not isinstance(layer, nn.RNNCellBase) and kind.returns_tensor is not True:
        unknown = kind.returns_tensor is None
        raise NotFusible(
            "it is not known what it returns: call the model once" if unknown else "it returns more than a tensor"
        )
    returned = graph.run("body", layer, *arguments)

    def output(returned: fx.Node) -> fx.Node:
        return graph.call(operator.getitem, returned, 0) if pair else returned

    def node(name: str, copy: nn.Module) -> fx.Node:
        if isinstance(kind, Cell):
            return output(graph.run(name, copy, *arguments))
        first, *others = arguments  # a module may begin with something that works in place
        return graph.run(name, copy, graph.method("clone", first), *others)

    total = add_copies(graph, kind, blocks, output(returned), node)
    return graph.finish((total, graph.call(operator.getitem, returned, 1)) if pair else total)


def add_copies(
    graph: Computation,
    kind: WholeModule,
    blocks: list[Block],
    own: fx.Node,
    node: Callable[[str, nn.Module], fx.Node],
) -> fx.Node:
    """Add what dendrites say that are copies of a module.

    Args:
        graph: the computation.
        kind: the view that they have of the module.
        blocks: the dendrites.
        own: what the module itself puts out.
        node: calls a copy, under a name, and returns its potential; asked for each in turn.

    Returns:
        The sum.
    """
    assert kind.neurons is not None
    copies = [copy for block in blocks for copy in block.nodes.children()]
    potentials = [node(f"dendrite_{number}", copy) for number, copy in enumerate(copies)]
    before = [scale for block in blocks for scale in [scales_of(block.form.activation).before] * block.count]
    potentials = [p if b == 1 else graph.call(torch.mul, p, b) for p, b in zip(potentials, before, strict=True)]
    rows = graph.call(torch.stack, [*potentials, own], kind.dim - 1)
    return add_cascade(graph, rows, blocks, coefficients(blocks, kind.neurons), kind.dim)
