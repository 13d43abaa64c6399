"""What grows on frozen layers and what it costs, before anything does: all that a fit of an adapter trains."""

from __future__ import annotations

from torch import nn

from pl_dendrites.core.cost import next_parameters, parameter_count
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.placed import PlacedNetwork
from pl_dendrites.core.shared import SharedNetwork
from pl_dendrites.core.targets import is_frozen

__all__ = ["frozen_table"]


def frozen_table(network: DendriticNetwork) -> str:
    """A row for each frozen layer or module that is to grow, with the parameters of what comes next.

    That is one private dendrite on each neuron, or a set of shared ones as large as it can be.

    Args:
        network: the network.

    Returns:
        The table, with the sum of all and its share of the model; empty where there are no such layers.

    Example:
        >>> from pl_dendrites.core import attach, attach_shared
        >>> model = nn.Sequential(nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
        >>> print(frozen_table(attach(model, "frozen", fan_in=4)))
        layer    type  neurons  parameters
            0  Linear        8          48
            2  Linear        3          18
          all                           66, 15.2% of the model
        >>> print(frozen_table(attach_shared(model, ["0"])))
        layer    type  units  parameters
            0  Linear     16         656
          all                        656, 150.8% of the model
    """
    modules = {plain_name(name): module for name, module in network.model.named_modules()}
    frozen = [name for name in network.targets if is_frozen(modules[name])]
    if not frozen:
        return ""
    shared = isinstance(network, SharedNetwork)
    rows, total = [("layer", "type", "units" if shared else "neurons", "parameters")], 0
    for name in frozen:
        count, cost = _next(network, name, modules[name])
        rows.append((name or "model", type(modules[name]).__name__, _known(count), _known(cost)))
        total += cost or 0
    rows.append(("all", "", "", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines) + f", {total / parameter_count(network.model):.1%} of the model"


def _next(network: DendriticNetwork, name: str, module: nn.Module) -> tuple[int | None, int | None]:
    if isinstance(network, PlacedNetwork):
        one = network.one_more(name)
        return one.neurons, one.parameters
    if isinstance(network, SharedNetwork):
        form = network.next_at_most(name)
        return (None, None) if form is None else (form.units, form.parameters)
    dendrites = network.layers[name]
    return dendrites.kind.neurons, next_parameters(dendrites, module)


def _known(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"  # of a user's own module a forward pass tells
