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

__all__ = ["Neurons", "initialise", "is_supported", "neurons_of", "node_set"]

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
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
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


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
    raise TypeError(f"{type(layer).__name__} cannot have dendrites; supported are Linear, Conv1d, Conv2d and Conv3d")


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
    geometry = {name: getattr(layer, name) for name in _GEOMETRY}
    convolution: nn.Module = nn.utils.skip_init(kind, layer.in_channels, count * neurons.count, **geometry, **place)
    return convolution


@torch.no_grad()
def initialise(nodes: nn.Module, generator: torch.Generator | None = None) -> None:
    r"""Draw weights and biases uniformly from :math:`\pm 1/\sqrt{n}`, as PyTorch's layers with ``n`` inputs do.

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
    weight = nodes.weight
    assert isinstance(weight, Tensor)
    bound = 1 / math.sqrt(max(weight[0].numel(), 1))
    for parameter in nodes.parameters():
        draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        parameter.copy_(draw)
