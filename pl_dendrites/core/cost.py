"""What dendrites cost: in parameters, and in the time of a step. Selection, ``share`` and the report all ask here."""

from __future__ import annotations

from torch import nn

from pl_dendrites.core.kinds import LayerKind

__all__ = ["base_step_cost", "correlation_step_cost", "inference_cost", "parameter_count", "set_parameters"]


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


def inference_cost(dendrites: int) -> float:
    """A forward pass through a layer with dense dendrites, by its matrix products: 1 is the plain layer's.

    Args:
        dendrites: per neuron.
    """
    return 1.0 + dendrites


def base_step_cost(dendrites: int, live: bool) -> float:
    """A step of a base phase, by the matrix products of a layer with dense dendrites: 1 is the plain layer's step.

    A plain step has three: forward, gradient of the inputs, gradient of the weights. A dendrite has the first of them;
    one that is live has all.

    Args:
        dendrites: per neuron.
        live: whether they learn with the network.

    Example:
        >>> base_step_cost(3, live=False), base_step_cost(3, live=True)
        (2.0, 4.0)
    """
    return 1.0 + dendrites if live else (3 + dendrites) / 3


def correlation_step_cost(dendrites: int, pool: int) -> float:
    """A step of a correlation phase, in the same measure: the layer's own weights get no gradients.

    Args:
        dendrites: per neuron.
        pool: candidates per neuron, each with a forward pass and the gradient of its weights.

    Example:
        >>> correlation_step_cost(0, pool=4)
        3.3333333333333335
    """
    return (2 + dendrites + 2 * pool) / 3
