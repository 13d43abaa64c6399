"""Recurrent layers, with a whole sequence, or step by step with the states of all their parts."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from pl_dendrites.core.fusing.computation import Computation, NotFusible
from pl_dendrites.core.fusing.copies import add_copies
from pl_dendrites.core.growth.block import Block
from pl_dendrites.core.kinds import Recurrent

__all__ = ["fuse_recurrent"]

_NO_STATE = "a layer with dendrites that is called with a state must be fused with `streaming`, see pl_dendrites.fuse"

# A state's tensors: of an nn.LSTM two, of others one.
_Tensors = tuple[fx.Node, ...]


def fuse_recurrent(layer: nn.RNNBase, kind: Recurrent, blocks: list[Block], streaming: bool = False) -> fx.GraphModule:
    """One computation that does what a recurrent layer with dendrites does.

    Args:
        layer: without its dendrites.
        kind: the view that they have of it.
        blocks: the dendrites, ``k`` per neuron.
        streaming: whether it takes and returns the states of all parts, ``(k + 2) * num_layers`` rows: the layer's own,
            those of each dendrite, and last what the layer with its dendrites returns. A state of ``num_layers`` rows
            is one that all parts start from. If not, it is called without a state, and returns the last alone.

    Raises:
        NotFusible: if it is to stream and runs in both directions, one of which begins at the sequence's end.

    Example:
        >>> from pl_dendrites.core.growth.hooks import dendrites_of, hang, take_off
        >>> layer, x = nn.GRU(3, 4), torch.randn(6, 2, 3)
        >>> hang(layer)
        >>> dendrites = dendrites_of(layer)
        >>> dendrites.grow(layer)
        >>> _ = dendrites[0].weights[0].data.fill_(1.0)
        >>> out, _ = layer(x)
        >>> take_off(layer)
        >>> step = fuse_recurrent(layer, dendrites.kind, dendrites.private, streaming=True)
        >>> _, state = step(x[:4])
        >>> torch.testing.assert_close(step(x[4:], state)[0], out[4:])
        >>> state.shape
        torch.Size([3, 2, 4])
    """
    if streaming and layer.bidirectional:
        raise NotFusible("it runs in both directions, and one of them begins at the end: `streaming` is not for it")
    graph, parts = Computation(), 2 + sum(block.count for block in blocks)
    sequence, given = graph.arguments_of(layer, most=2)
    if not streaming:
        graph.call(torch._assert, graph.call(operator.is_, given, None), _NO_STATE)
    starts = _starts(graph, layer, sequence, given, parts) if streaming else [()] * parts
    ends: list[_Tensors] = []

    def run(name: str, part: nn.Module) -> fx.Node:
        returned = graph.run(name, part, sequence, *starts[len(ends)])
        ends.append(_tensors(graph, layer, graph.call(operator.getitem, returned, 1)))
        return graph.call(operator.getitem, returned, 0)

    total = add_copies(graph, kind, blocks, run("body", layer), run)
    visible = (_last(graph, layer, total, ends[0][0]), *ends[0][1:])
    if streaming:
        visible = tuple(graph.call(torch.cat, list(rows)) for rows in zip(*ends, visible, strict=True))
    return graph.finish((total, _state(visible)))


def _starts(graph: Computation, layer: nn.RNNBase, sequence: fx.Node, given: fx.Node, parts: int) -> list[Any]:
    # For each part what it is called with beside the sequence: the state that it begins with.
    examples = _sizes(graph, graph.method("select", sequence, _time(layer), 0), slice(None, -1))
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 1 + isinstance(layer, nn.LSTM)]
    shapes = [graph.call(operator.add, (layer.num_layers,), graph.call(operator.add, examples, (w,))) for w in widths]
    zeros = _state(tuple(graph.method("new_zeros", sequence, shape) for shape in shapes))
    state = graph.call(operator.getitem, [given, zeros], graph.call(operator.is_, given, None))
    # By part: as many as there are, or one that all of them begin with.
    rows = [graph.method("unflatten", tensor, 0, (-1, layer.num_layers)) for tensor in _tensors(graph, layer, state)]
    every = [
        graph.method("expand", r, graph.call(operator.add, (parts,), _sizes(graph, r, slice(1, None)))) for r in rows
    ]
    begin = [tuple(graph.method("select", tensor, 0, part) for tensor in every) for part in range(parts - 1)]
    return [(_state(tensors),) for tensors in begin]


def _last(graph: Computation, layer: nn.RNNBase, total: fx.Node, hidden: fx.Node) -> fx.Node:
    # The final hidden state: of the last layer the end of the sequence, dendrites included.
    directions, size = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
    ends = [
        graph.method("narrow", graph.method("select", total, _time(layer), -1 if d == 0 else 0), -1, d * size, size)
        for d in range(directions)
    ]
    last = graph.call(torch.stack, ends)
    if layer.num_layers == 1:
        return last
    return graph.call(torch.cat, [graph.method("narrow", hidden, 0, 0, (layer.num_layers - 1) * directions), last])


def _time(layer: nn.RNNBase) -> int:
    # Of a batch, and of a sequence by itself.
    return -2 if layer.batch_first else 0


def _sizes(graph: Computation, tensor: fx.Node, dims: slice) -> fx.Node:
    return graph.call(operator.getitem, graph.method("size", tensor), dims)


def _tensors(graph: Computation, layer: nn.RNNBase, state: fx.Node) -> _Tensors:
    return tuple(graph.call(operator.getitem, state, i) for i in (0, 1)) if isinstance(layer, nn.LSTM) else (state,)


def _state(tensors: _Tensors) -> _Tensors | fx.Node:
    return tensors if len(tensors) > 1 else tensors[0]
