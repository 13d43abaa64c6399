"""Modules whose dendrites are copies of them, and recurrent layers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx, nn

from pl_dendrites.core.fusing.cascade import add_cascade, coefficients, scales_of
from pl_dendrites.core.fusing.computation import Computation, NotFusible
from pl_dendrites.core.growth.block import Block
from pl_dendrites.core.kinds import Cell, Recurrent, WholeModule

__all__ = ["fuse_copies", "fuse_recurrent"]


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

    total = _total(graph, kind, blocks, output(returned), node)
    return graph.finish((total, graph.call(operator.getitem, returned, 1)) if pair else total)


def fuse_recurrent(layer: nn.RNNBase, kind: Recurrent, blocks: list[Block]) -> fx.GraphModule:
    """One computation that does what a recurrent layer with dendrites does with a whole sequence.

    It is called with the sequence alone: the state that it returns has no room for the states of its dendrites, and so
    it cannot be called with one.

    Args:
        layer: without its dendrites.
        kind: the view that they have of it.
        blocks: the dendrites.
    """
    graph = Computation()
    (sequence,) = graph.arguments_of(layer, most=1)
    returned = graph.run("body", layer, sequence)
    own = graph.call(operator.getitem, returned, 0)
    total = _total(
        graph, kind, blocks, own, lambda name, copy: graph.call(operator.getitem, graph.run(name, copy, sequence), 0)
    )
    state = graph.call(operator.getitem, returned, 1)
    hidden = graph.call(operator.getitem, state, 0) if isinstance(layer, nn.LSTM) else state
    directions, size, time = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size, -2 - (not layer.batch_first)
    ends = [
        graph.method("narrow", graph.method("select", total, time, -1 if d == 0 else 0), -1, d * size, size)
        for d in range(directions)
    ]
    last = graph.call(torch.stack, ends)
    if layer.num_layers > 1:
        last = graph.call(torch.cat, [graph.method("narrow", hidden, 0, 0, (layer.num_layers - 1) * directions), last])
    if isinstance(layer, nn.LSTM):
        return graph.finish((total, (last, graph.call(operator.getitem, state, 1))))
    return graph.finish((total, last))


def _total(
    graph: Computation,
    kind: WholeModule,
    blocks: list[Block],
    own: fx.Node,
    node: Callable[[str, nn.Module], fx.Node],
) -> fx.Node:
    assert kind.neurons is not None
    copies = [copy for block in blocks for copy in block.nodes.children()]
    potentials = [node(f"dendrite_{number}", copy) for number, copy in enumerate(copies)]
    before = [scale for block in blocks for scale in [scales_of(block.form.activation).before] * block.count]
    potentials = [p if b == 1 else graph.call(torch.mul, p, b) for p, b in zip(potentials, before, strict=True)]
    rows = graph.call(torch.stack, [*potentials, own], kind.dim - 1)
    return add_cascade(graph, rows, blocks, coefficients(blocks, kind.neurons), kind.dim)
