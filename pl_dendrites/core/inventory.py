"""What each layer of a grown network has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pl_dendrites.core.cost import next_parameters, parameter_count
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.markup import Name, Table

__all__ = ["inventory", "inventory_table"]


def inventory(model: nn.Module, layers: Mapping[str, Dendrites], shared: bool) -> dict[str, dict[str, Any]]:
    """What each layer has, as plain values.

    Args:
        model: the model.
        layers: the dendrites of each layer by the layer's name.
        shared: whether neurons share them.

    Returns:
        By the layer's name its ``type``, ``neurons``, ``dendrites`` (per neuron, or all that are shared), the
        ``parameters`` of these, and unless they are shared ``next``, the parameters of one more on each neuron.

    Example:
        >>> from pl_dendrites.core import attach
        >>> network = attach(nn.Linear(4, 2))
        >>> inventory(network.model, network.layers, shared=False)
        {'': {'type': 'Linear', 'neurons': 2, 'dendrites': 0, 'parameters': 0, 'next': 12}}
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    return {
        name: {
            "type": type(modules[name]).__name__,
            "neurons": dendrites.kind.neurons,
            "dendrites": dendrites.size,
            "parameters": parameter_count(dendrites),
            **({} if shared else {"next": next_parameters(dendrites, modules[name])}),
        }
        for name, dendrites in layers.items()
    }


def inventory_table(model: nn.Module, layers: Mapping[str, Dendrites], shared: bool) -> Table:
    """The same as a table, with the parameters of the whole model in its title.

    Args:
        model: the model.
        layers: the dendrites of each layer by the layer's name.
        shared: whether neurons share them.
    """
    found = inventory(model, layers, shared)
    rows = [
        (Name(name or "model"), layer["type"], *(_count(layer[key]) for key in ("neurons", "dendrites", "parameters")))
        for name, layer in found.items()
    ]
    kind = "shared" if shared else "private"
    columns = ("layer", "type", "neurons", f"{kind} dendrites", "parameters of dendrites")
    return Table(f"{parameter_count(model):,} parameters", columns, rows, words=("type",))


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"  # of a user's own module a forward pass tells
