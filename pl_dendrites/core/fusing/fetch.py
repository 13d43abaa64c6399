"""Products with a few inputs for each node, by size and by what is wanted: of few bytes, or of little time."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, fx

from pl_dendrites.core.fusing.computation import Computation

__all__ = ["Few", "Nodes", "fetch", "fetches", "narrow_index", "spread"]

# Inputs for each that a node sees, from which on it is not worth while to have zeros for all others: for the bytes, and
# for the time. Of 141 units that see 32 of 784 inputs fetching takes 1.5 times the product's time with one sample, and
# 5 times with 128 of them.
_SMALLER, _FASTER = 8, 48


class Few(Enum):
    """How a product is made of which each node sees a few of many inputs.

    Attributes:
        ZEROS: with zeros for all others, which takes least time.
        SPREAD: values and places are kept, and zeros put between them at every call.
        NARROW: the same, and values are kept in eight bits, with a scale for each node.
        FETCHED: values and places are kept, and the inputs looked up, which takes less time with one example.
    """

    ZEROS = "zeros"
    SPREAD = "spread"
    NARROW = "narrow"
    FETCHED = "fetched"


class Nodes(NamedTuple):
    """Nodes that see a few inputs each.

    Attributes:
        places: shape ``(*nodes, m)``, the inputs of each.
        weight: shape ``(*nodes, m)``.
        bias: shape ``nodes``.
    """

    places: Tensor
    weight: Tensor
    bias: Tensor


def fetches(inputs: int, seen: int, few: Few = Few.ZEROS) -> bool:
    """Whether nodes that see a few inputs keep these alone, rather than that a product has zeros for all others.

    Args:
        inputs: that there are.
        seen: by a node.
        few: how it would be.

    Example:
        >>> fetches(784, 32), fetches(784, 32, Few.SPREAD), fetches(20_000, 32)
        (False, True, True)
    """
    return inputs > (_FASTER if few is Few.ZEROS else _SMALLER) * seen


def fetch(graph: Computation, name: str, x: fx.Node, nodes: Nodes) -> fx.Node:
    """Sums of a few inputs each.

    Args:
        graph: the computation.
        name: what its values are called.
        x: shape ``(*, n)``.
        nodes: they.

    Returns:
        Shape ``(*, *nodes)``.
    """
    index = graph.method("int", narrow_index(graph, f"{name}_inputs", nodes.places.flatten()))
    seen = graph.method("unflatten", graph.method("index_select", x, -1, index), -1, tuple(nodes.places.shape))
    sums = graph.method("sum", graph.call(torch.mul, seen, graph.value(f"{name}_weight", nodes.weight)), -1)
    return graph.call(torch.add, sums, graph.value(f"{name}_bias", nodes.bias))


def spread(graph: Computation, name: str, rows: tuple[Tensor, Tensor], size: int, few: Few = Few.SPREAD) -> fx.Node:
    """Rows of values at their places among zeros, made whenever it is called; kept are values and places alone.

    Args:
        graph: the computation.
        name: what they are called.
        rows: values and their places, each of shape ``(M, f)``.
        size: of a row.
        few: whether values are kept in eight bits.

    Returns:
        Shape ``(M, size)``.
    """
    values, places = rows
    given = _narrow_values(graph, name, values) if few is Few.NARROW else graph.value(f"{name}_values", values)
    index = graph.method("long", narrow_index(graph, f"{name}_places", places))
    return graph.method("scatter", graph.method("new_zeros", given, (len(values), size)), 1, index, given)


def _narrow_values(graph: Computation, name: str, values: Tensor) -> fx.Node:
    scale = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) / 127
    kept = graph.value(f"{name}_values", (values / scale).round().to(torch.int8))
    return graph.call(torch.mul, graph.method("to", kept, values.dtype), graph.value(f"{name}_scale", scale))


def narrow_index(graph: Computation, name: str, places: Tensor) -> fx.Node:
    """Places in as few bits as they fit in: 8, 16 or 32."""
    most = int(places.max()) if places.numel() else 0
    types = (torch.uint8, torch.int16, torch.int32)
    return graph.value(name, places.to(next(dtype for dtype in types if most <= torch.iinfo(dtype).max)))
