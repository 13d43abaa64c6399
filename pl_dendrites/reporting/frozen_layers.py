"""What grows on frozen layers and what it costs, before anything does: all that a fit of an adapter trains."""

from __future__ import annotations

from pl_dendrites.core.cost import next_parameters, parameter_count
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.targets import is_frozen

__all__ = ["frozen_table"]


def frozen_table(network: DendriticNetwork) -> str:
    """A row for each frozen layer that private dendrites are to grow on, with the parameters of one on each neuron.

    Args:
        network: the network.

    Returns:
        The table, with the sum of all and its share of the model; empty where there are no such layers.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> model = nn.Sequential(nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
        >>> print(frozen_table(attach(model, "frozen", fan_in=4)))
        layer    type  neurons  parameters
            0  Linear        8          48
            2  Linear        3          18
          all                           66, 15.2% of the model
    """
    modules = {plain_name(name): module for name, module in network.model.named_modules()}
    frozen = [] if network.units is not None else [name for name in network.targets if is_frozen(modules[name])]
    if not frozen:
        return ""
    layers, rows, total = network.layers, [("layer", "type", "neurons", "parameters")], 0
    for name in frozen:
        neurons, cost = layers[name].kind.neurons, next_parameters(layers[name], modules[name])
        known = "?" if neurons is None else f"{neurons:,}"  # of a user's own module a forward pass tells
        rows.append((name or "model", type(modules[name]).__name__, known, f"{cost:,}"))
        total += cost
    rows.append(("all", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines) + f", {total / parameter_count(network.model):.1%} of the model"
