"""What a dendrite must know of a layer type: where its neurons are, and how a set of nodes of that type is built.

A set of nodes is itself a standard layer: ``count`` nodes for each of the ``C`` neurons of an ``nn.Linear(n, C)`` are
one ``nn.Linear(n, count * C)``, of a convolution one convolution of the same geometry with ``count * C`` channels. One
matrix product serves them all, and tools that know PyTorch's layers know ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.functional import stack_nodes, unstack_nodes

__all__ = [
    "Neurons",
    "by_neuron",
    "initialise",
    "is_supported",
    "neurons_of",
    "node_set",
    "potentials",
    "put_by_neuron",
]

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_Transposed)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


@dataclass(frozen=True)
class Neurons:
    """Where the neurons of a layer are.

    Attributes:
        count: number of neurons, ``C``.
        dim: their dimension in the layer's output, counted from the end.
        groups: number of groups they fall into by the inputs they see.
    """

    count: int
    dim: int
    groups: int


def is_supported(layer: nn.Module) -> bool:
    """Whether a layer is of a type that can have dendrites.

    Example:
        >>> is_supported(nn.Conv2d(3, 8, 3)), is_supported(nn.LayerNorm(8))
        (True, False)
    """
    return isinstance(layer, (nn.Linear, *_Convolution))


def neurons_of(layer: nn.Module) -> Neurons:
    """The neurons of a supported layer.

    Raises:
        TypeError: if the layer is of no supported type.

    Example:
        >>> neurons_of(nn.Conv2d(4, 8, 3, groups=2))
        Neurons(count=8, dim=-3, groups=2)
    """
    if isinstance(layer, nn.Linear):
        return Neurons(layer.out_features, -1, 1)
    if isinstance(layer, _Convolution):
        return Neurons(layer.out_channels, -1 - len(layer.kernel_size), layer.groups)
    raise TypeError(
        f"{type(layer).__name__} cannot have dendrites; supported are Linear, Conv1d/2d/3d and their transposes"
    )


def node_set(layer: nn.Module, count: int, device: torch.device | None = None) -> nn.Module:
    """A layer of the same kind and geometry with ``count`` nodes for every neuron, its values undefined.

    Args:
        layer: a supported layer.
        count: nodes per neuron.
        device: where to make it; ``None``: where the layer's weight is.

    Returns:
        A layer with bias whose output has ``count * C`` entries along the neuron dimension.

    Raises:
        TypeError: if the layer is of no supported type.

    Example:
        >>> node_set(nn.Linear(5, 3), count=2)
        Linear(in_features=5, out_features=6, bias=True)
    """
    neurons = neurons_of(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    place: dict[str, Any] = {"device": weight.device if device is None else device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        linear: nn.Linear = nn.utils.skip_init(nn.Linear, layer.in_features, count * neurons.count, **place)
        return linear
    assert isinstance(layer, _Convolution)
    kind = next(base for base in _Convolution if isinstance(layer, base))
    geometry = {
        name: getattr(layer, name) for name in (*_GEOMETRY, *["output_padding"] * isinstance(layer, _Transposed))
    }
    convolution: nn.Module = nn.utils.skip_init(kind, layer.in_channels, count * neurons.count, **geometry, **place)
    return convolution


def potentials(nodes: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """What a set of nodes computes beside its layer.

    Args:
        nodes: a set made by :func:`node_set`.
        x: the layer's input.
        out: the layer's output, ``(*, C, *)``; a transposed convolution may have been asked for its size.

    Returns:
        ``(*, count * C, *)``.

    Example:
        >>> layer = nn.ConvTranspose2d(3, 8, 3, stride=2)
        >>> x = torch.randn(2, 3, 5, 5)
        >>> potentials(node_set(layer, count=2), x, layer(x, output_size=(12, 12))).shape
        torch.Size([2, 16, 12, 12])
    """
    if isinstance(nodes, _Transposed):
        sized: Tensor = nodes(x, output_size=list(out.shape[-len(nodes.kernel_size) :]))
        return sized
    plain: Tensor = nodes(x)
    return plain


def by_neuron(nodes: nn.Module, name: str, count: int) -> Tensor:
    """A parameter of a set of nodes, with the nodes of a neuron and the neurons in front.

    Args:
        nodes: a set made by :func:`node_set`.
        name: of the parameter, ``"weight"`` or ``"bias"``.
        count: nodes per neuron.

    Returns:
        Shape ``(count, C, *rest)``; a copy, or a view of the parameter.

    Example:
        >>> by_neuron(node_set(nn.ConvTranspose2d(6, 8, 3, groups=2), count=5), "weight", 5).shape
        torch.Size([5, 8, 3, 3, 3])
    """
    parameter, groups = nodes.get_parameter(name), int(getattr(nodes, "groups", 1))
    if isinstance(nodes, _Transposed) and name == "weight":
        # (inputs, outputs of a group, *kernel): outputs in front, in the order of all the groups' outputs
        parameter = parameter.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return unstack_nodes(parameter, count, groups, 0)


@torch.no_grad()
def put_by_neuron(nodes: nn.Module, name: str, values: Tensor) -> None:
    """Write a parameter of a set of nodes, the inverse of :func:`by_neuron`.

    Args:
        nodes: a set made by :func:`node_set`.
        name: of the parameter.
        values: shape ``(count, C, *rest)``.

    Example:
        >>> nodes = node_set(nn.Linear(3, 2), count=2)
        >>> put_by_neuron(nodes, "bias", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> nodes.bias.tolist()
        [1.0, 2.0, 3.0, 4.0]
    """
    groups = int(getattr(nodes, "groups", 1))
    stacked = stack_nodes(values, groups)
    if isinstance(nodes, _Transposed) and name == "weight":
        stacked = stacked.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    nodes.get_parameter(name).copy_(stacked)


@torch.no_grad()
def initialise(nodes: nn.Module, generator: torch.Generator | None = None) -> None:
    r"""Draw weights and biases uniformly from :math:`\pm 1/\sqrt{n}`, as PyTorch's layers with ``n`` inputs do.

    For a transposed convolution ``n`` is the inputs that a whole kernel of one output channel has.

    Args:
        nodes: a set made by :func:`node_set`.
        generator: a generator on the CPU, so that a draw does not depend on the device, and the user's own sequence of
            random numbers is left alone; ``None``: PyTorch's default one.

    Example:
        >>> nodes = node_set(nn.Linear(4, 2), count=3)
        >>> initialise(nodes, torch.Generator().manual_seed(0))
        >>> bool(nodes.weight.abs().max() <= 0.5)
        True
    """
    bound = 1 / math.sqrt(max(by_neuron(nodes, "weight", 1)[0, 0].numel(), 1))
    for parameter in nodes.parameters():
        draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(draw)
