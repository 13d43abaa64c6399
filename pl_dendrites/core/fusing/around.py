"""A module and the shared dendrites around it: two paths from the input to the outputs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pl_dendrites.core.fields.product import spread_out
from pl_dendrites.core.fusing.cascade import activated, scales_of
from pl_dendrites.core.fusing.computation import Computation
from pl_dendrites.core.fusing.fetch import Few, Nodes, fetch, fetches, spread
from pl_dendrites.core.growth.shared_block import SharedBlock

__all__ = ["fuse_around"]


@torch.no_grad()
def fuse_around(
    module: nn.Module | None, blocks: Sequence[SharedBlock], bias: Tensor | None = None, few: Few = Few.ZEROS
) -> fx.GraphModule:
    """One computation that does what a module with shared dendrites around it does.

    Args:
        module: without them; ``None``: there is no more of it than a bias.
        blocks: the dendrites.
        bias: shape ``(C,)``, what stands for the module.
        few: how units see a few of many inputs.

    Returns:
        A module that is called as that one is.

    Example:
        >>> from pl_dendrites.core.fusing.private import fuse_private
        >>> from pl_dendrites.core.growth.shared_block import SharedForm
        >>> from pl_dendrites.core.kinds import kind_of
        >>> layer, x = nn.Linear(4, 3), torch.randn(5, 4)
        >>> block = SharedBlock(layer, kind_of(layer), SharedForm(units=2, inputs=4, outputs=3, field=1))
        >>> block.fill(torch.tensor([[2], [0]]), torch.ones(2, 1), torch.zeros(2))
        >>> _ = nn.init.ones_(block.out)
        >>> more = nn.functional.gelu(x[:, [2, 0]]).sum(1, keepdim=True)
        >>> torch.testing.assert_close(fuse_around(layer, [block])(x), layer(x) + more)
    """
    graph = Computation()
    arguments = graph.arguments_of(nn.Identity() if module is None else module)
    x, out = arguments[0], None
    if module is not None:
        out = graph.run("body", module, *arguments)
        # Where the module makes one vector of each example, all of an example is one vector.
        positions = graph.call(operator.getitem, graph.method("size", out), slice(None, -1))
        x = graph.method("reshape", x, graph.call(operator.add, positions, (blocks[0].form.inputs,)))
    alike = [list(group) for _, group in groupby(blocks, key=lambda block: (block.form.field, block.form.activation))]
    units = [_units(graph, f"units_{number}", x, group, few) for number, group in enumerate(alike)]
    hidden = units[0] if len(units) == 1 else graph.call(torch.cat, units, -1)
    fed = _fed(graph, hidden, blocks, bias)
    return graph.finish(fed if out is None else graph.call(torch.add, out, fed))


def _units(graph: Computation, name: str, x: fx.Node, blocks: Sequence[SharedBlock], few: Few) -> fx.Node:
    form = blocks[0].form
    before = scales_of(form.activation).before
    field, weight, bias = (torch.cat([getattr(b, part) for b in blocks]) for part in ("field", "weight", "bias"))
    weight, bias = weight * before, bias * before
    apart = fetches(form.inputs, form.field, few)
    if apart and (few is Few.FETCHED or fetches(form.inputs, form.field)):
        potentials = fetch(graph, name, x, Nodes(field, weight, bias))
    elif apart:
        matrix = spread(graph, name, (weight, field), form.inputs, few)
        potentials = graph.call(F.linear, x, matrix, graph.value(f"{name}_bias", bias))
    else:
        potentials = graph.run(name, _linear(spread_out(weight, field, form.inputs), bias), x)
    return activated(graph, form.activation, potentials)


def _fed(graph: Computation, hidden: fx.Node, blocks: Sequence[SharedBlock], bias: Tensor | None) -> fx.Node:
    # What the units say to the outputs.
    outputs = blocks[0].form.outputs
    weights = [block.out * scales_of(block.form.activation).after for block in blocks]
    feeds = {block.form.feeds for block in blocks}
    if len(feeds) == 1 and fetches(outputs, next(iter(feeds)) or outputs, Few.SPREAD):
        places = torch.cat([block.feeds for block in blocks if block.feeds is not None])
        fed = graph.call(torch.matmul, hidden, spread(graph, "out", (torch.cat(weights), places), outputs))
        return fed if bias is None else graph.call(torch.add, fed, graph.value("bias", bias))
    whole = [w if b.feeds is None else spread_out(w, b.feeds, outputs) for w, b in zip(weights, blocks, strict=True)]
    return graph.run("out", _linear(torch.cat(whole).T, bias), hidden)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made
