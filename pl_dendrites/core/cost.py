"""What dendrites cost: in parameters, and in the time of a step. Selection, ``share`` and the report all ask here."""

from __future__ import annotations

from torch import nn

from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.kinds import LayerKind, narrowed

__all__ = [
    "base_step_cost",
    "correlation_step_cost",
    "inference_cost",
    "next_parameters",
    "parameter_count",
    "pool_weights",
    "product_weights",
    "set_parameters",
]


def parameter_count(module: nn.Module) -> int:
    """Parameters of a model, frozen ones and dendrites included; candidates are no part of it.

    Example:
        >>> parameter_count(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in module.parameters())


def set_parameters(kind: LayerKind, layer: nn.Module, below: int = 0) -> int:
    """Parameters of one dendrite on every neuron: its node, its links to those before it, and its output weight.

    Args:
        kind: the view that these dendrites have of the layer.
        layer: the layer; where its neurons are not known yet, nodes alone count.
        below: dendrites per neuron that there are.

    Example:
        >>> from pl_dendrites.core.kinds import kind_of
        >>> layer = nn.Linear(5, 3)
        >>> set_parameters(kind_of(layer), layer, below=2)
        27
    """
    return kind.cost(layer) + (kind.neurons or 0) * (below + 1)


def next_parameters(dendrites: Dendrites, layer: nn.Module) -> int:
    """Parameters of one more private dendrite on every neuron, of the form that the next ones have.

    Args:
        dendrites: of a layer.
        layer: the layer; where its neurons are not known yet, nodes alone count.

    Example:
        >>> from pl_dendrites.core import attach
        >>> network = attach(nn.Linear(50, 3), fan_in=4)
        >>> next_parameters(network.layers[""], network.model)
        18
    """
    return set_parameters(narrowed(dendrites.kind, layer, dendrites.next.fan_in, None), layer, dendrites.count)


def product_weights(module: nn.Module) -> int:
    """Weights that a module multiplies its input with at each position; of dendrites that hang in it, none.

    A node that sees a few inputs has as many weights, and a set for some of the neurons has nodes for these alone.

    Example:
        >>> product_weights(nn.Linear(5, 3)), product_weights(nn.Conv2d(4, 8, 3, groups=2))
        (15, 144)
    """
    own = (p for name, p in module.named_parameters() if "dendrites" not in name.split("."))
    return sum(parameter.numel() for parameter in own if parameter.ndim > 1)


def pool_weights(kind: LayerKind, layer: nn.Module, pool: int) -> int:
    """The same of candidates that see all their inputs.

    Args:
        kind: the view that dendrites have of the layer.
        layer: the layer.
        pool: candidates per neuron.

    Example:
        >>> from pl_dendrites.core.kinds import kind_of
        >>> layer = nn.Linear(5, 3)
        >>> pool_weights(kind_of(layer), layer, pool=4)
        60
    """
    entries = kind.template(layer, pool).values()
    return sum(entry.numel() for entry in entries if entry.is_floating_point() and entry.ndim > 1)


def inference_cost(dendrites: float) -> float:
    """A forward pass through layers with dendrites, by their matrix products: 1 is that of the plain layers.

    Args:
        dendrites: dense ones per neuron, or the weights that dendrites have for each that the layers have.
    """
    return 1.0 + dendrites


def base_step_cost(dendrites: float, live: bool) -> float:
    """A step of a base phase, by the matrix products of layers with dendrites: 1 is the plain layers' step.

    A plain step has three: forward, gradient of the inputs, gradient of the weights. A dendrite has the first of them;
    one that is live has all.

    Args:
        dendrites: see :func:`inference_cost`.
        live: whether they learn with the network.

    Example:
        >>> base_step_cost(3, live=False), base_step_cost(3, live=True)
        (2.0, 4.0)
    """
    return 1.0 + dendrites if live else (3 + dendrites) / 3


def correlation_step_cost(dendrites: float, pool: float) -> float:
    """A step of a correlation phase, in the same measure: the layer's own weights get no gradients.

    Args:
        dendrites: see :func:`inference_cost`.
        pool: the same of candidates, each with a forward pass and the gradient of its weights.

    Example:
        >>> correlation_step_cost(0, pool=4)
        3.3333333333333335
    """
    return (2 + dendrites + 2 * pool) / 3
