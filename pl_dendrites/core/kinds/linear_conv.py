"""Linear layers and convolutions: a set of nodes is itself one standard layer.

``count`` nodes for each of the ``C`` neurons of an ``nn.Linear(n, C)`` are one ``nn.Linear(n, count * C)``, of a
convolution one convolution of the same geometry with ``count * C`` channels. One matrix product serves them all, and
tools that know PyTorch's layers know ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_dendrites.core.kinds.base import Inputs, LayerKind, plain_class, plain_kind, register, weight_of
from pl_dendrites.core.tensors import flat_nested, like_nested, unstack_nodes

__all__ = ["LINEAR_CONV", "LinearConv", "inputs_of", "like", "pick", "run_like"]

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_Transposed)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")

LINEAR_CONV = (nn.Linear, *_Convolution)


@register(*LINEAR_CONV)
class LinearConv(LayerKind):
    """A Linear or a convolution, whose nodes are one layer of the same type.

    Args:
        layer: the layer; it is read, not kept.
        neurons: how many of its neurons have nodes; ``None``: all.

    Attributes:
        groups: number of groups that neurons fall into by the inputs they see.

    Raises:
        ValueError: if some neurons of several groups are asked for.

    Example:
        >>> kind = LinearConv(nn.Conv2d(4, 8, 3, groups=2))
        >>> kind.neurons, kind.dim, kind.groups
        (8, -3, 2)
        >>> LinearConv(nn.Linear(5, 3)).node_set(nn.Linear(5, 3), count=2)
        Linear(in_features=5, out_features=6, bias=True)
    """

    computes_in: ClassVar[tuple[str, ...]] = (*LayerKind.computes_in, "_conv_forward", "_output_padding")
    separable = scalable = True
    neurons: int
    inputs: int

    def __init__(self, layer: nn.Module, neurons: int | None = None) -> None:
        self._measure(layer)
        self.choosable = self.groups == 1
        if neurons is not None:
            if not self.choosable:
                raise ValueError("its neurons fall into groups, and a set that sees all inputs has all of them")
            self.neurons = neurons

        # A subclass may call its input as it likes.
        self._input_name = next(iter(signature(layer.forward).parameters))

    def _measure(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            self.neurons, self.dim, self.groups = layer.out_features, -1, 1
            self.inputs = layer.in_features
        else:
            assert isinstance(layer, _Convolution)
            self.neurons, self.dim, self.groups = layer.out_channels, -1 - len(layer.kernel_size), layer.groups
            self.inputs = layer.in_channels // layer.groups

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Nothing but a weight that cannot learn."""
        dtype = weight_of(module).dtype
        return None if dtype.is_floating_point else f"its weight is of type {dtype}, not floating point"

    def first_neuron(self, layer: nn.Module) -> Tensor:
        """See :meth:`LayerKind.first_neuron`."""
        return self.by_group(layer, "weight")[0, 0, 0]

    def output(self, out: Any) -> Tensor:
        """The layer's output; of a nested one, its samples one after another."""
        tensor: Tensor = out
        return flat_nested(tensor) if tensor.is_nested else tensor

    def with_output(self, out: Any, tensor: Tensor, inputs: Inputs) -> Any:
        """The tensor, nested as the layer's output was."""
        return like_nested(tensor, out) if out.is_nested else tensor

    def node_set(self, layer: nn.Module, count: int) -> nn.Module:
        """A layer with bias whose output has ``count * C`` entries along the neuron dimension."""
        return self._make(layer, count, weight_of(layer).device)

    def template(self, layer: nn.Module, count: int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.template`."""
        return dict(self._make(layer, count, torch.device("meta")).state_dict())

    def _make(self, layer: nn.Module, count: int, device: torch.device) -> nn.Module:
        return like(layer, inputs_of(layer), count * self.neurons, self.groups, device)

    @torch.no_grad()
    def initialise(self, nodes: nn.Module, generator: torch.Generator | None = None) -> None:
        r"""Draw weights and biases uniformly from :math:`\pm 1/\sqrt{n}`, as PyTorch's layers with ``n`` inputs do.

        For a transposed convolution ``n`` is the inputs that a whole kernel of one output channel has.

        Args:
            nodes: a set made by :meth:`node_set`.
            generator: see :meth:`LayerKind.initialise`.

        Example:
            >>> kind = LinearConv(nn.Linear(4, 2))
            >>> nodes = kind.node_set(nn.Linear(4, 2), count=3)
            >>> kind.initialise(nodes, torch.Generator().manual_seed(0))
            >>> bool(nodes.weight.abs().max() <= 0.5)
            True
        """
        bound = 1 / math.sqrt(max(self.by_neuron(nodes, "weight")[0, 0].numel(), 1))
        for parameter in nodes.parameters():
            draw = torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator)
            parameter.copy_(draw)

    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """See :meth:`LayerKind.potentials`.

        Example:
            >>> layer = nn.ConvTranspose2d(3, 8, 3, stride=2)
            >>> kind, x = LinearConv(layer), torch.randn(2, 3, 5, 5)
            >>> out = layer(x, output_size=(12, 12))  # a transposed convolution may be asked for its size
            >>> kind.potentials(kind.node_set(layer, count=2), 2, Inputs((x,), {}), out).shape
            torch.Size([2, 2, 8, 12, 12])
        """
        stacked = run_like(nodes, self.input_of(inputs, live), out)
        return unstack_nodes(stacked, count, self.groups, self.dim)

    def potentials_apart(
        self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False
    ) -> Sequence[Tensor]:
        """See :meth:`LayerKind.potentials_apart`."""
        if self.groups > 1:
            return super().potentials_apart(nodes, count, inputs, out, live)
        stacked = run_like(nodes, self.input_of(inputs, live), out)
        return torch.split_with_sizes(stacked, [self.neurons] * count, self.dim)

    def input_of(self, inputs: Inputs, live: bool) -> Tensor:
        """The tensor that nodes see, without its history unless they are live; of a nested one, its samples."""
        x: Tensor = inputs.args[0] if inputs.args else inputs.kwargs[self._input_name]
        if not live:
            x = x.detach()
        return flat_nested(x) if x.is_nested else x

    @torch.no_grad()
    def take(self, nodes: nn.Module, choice: Tensor | int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.take`.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> kind = LinearConv(layer)
            >>> pool, nodes = kind.node_set(layer, 4), kind.node_set(layer, 1)
            >>> kind.initialise(pool)
            >>> kind.put(nodes, 0, kind.take(pool, torch.tensor([3, 0])))
            >>> torch.equal(nodes.weight, pool.weight[[6, 1]])
            True
        """
        return {name: pick(self.by_neuron(nodes, name), choice) for name, _ in nodes.named_parameters()}

    @torch.no_grad()
    def put(self, nodes: nn.Module, place: int, values: dict[str, Tensor]) -> None:
        """See :meth:`LayerKind.put`."""
        for name, value in values.items():
            self.by_group(nodes, name)[:, place] = value.unflatten(0, (self.groups, -1))

    def by_group(self, nodes: nn.Module, name: str) -> Tensor:
        """A parameter of a node set as it is divided into groups, nodes and neurons.

        Returns:
            A view, shape ``(groups, count, C / groups, *)``.
        """
        values: Tensor = nodes.get_parameter(name)
        if isinstance(nodes, _Transposed) and name == "weight":  # (inputs, outputs of a group, *kernel)
            apart: Tensor = values.unflatten(0, (self.groups, -1)).transpose(1, 2)
        else:
            apart = values.unflatten(0, (self.groups, -1))
        split: Tensor = apart.unflatten(1, (-1, self.neurons // self.groups))
        return split

    def by_neuron(self, nodes: nn.Module, name: str) -> Tensor:
        """A parameter of a node set by nodes and neurons, shape ``(count, C, *)``."""
        values: Tensor = self.by_group(nodes, name).transpose(0, 1).flatten(1, 2)
        return values


def inputs_of(layer: nn.Module) -> int:
    """How many inputs a layer has, features or channels, those of all groups; none if it is of another type.

    Example:
        >>> inputs_of(nn.Conv2d(4, 8, 3, groups=2)), inputs_of(nn.GRU(4, 8))
        (4, 0)
    """
    if not issubclass(plain_class(layer), LinearConv):
        return 0
    kind = plain_kind(layer)
    assert isinstance(kind, LinearConv)
    return kind.inputs * kind.groups


def like(layer: nn.Module, inputs: int, outputs: int, groups: int, device: torch.device) -> nn.Module:
    """A layer of the same type, geometry and dtype with bias, and with other inputs, outputs and groups.

    Args:
        layer: a convolution, or any other layer: then it is a Linear, which has no groups.
        inputs: features or channels.
        outputs: features or channels.
        groups: of a convolution.
        device: where its values, which are undefined, lie.
    """
    place: dict[str, Any] = {"device": device, "dtype": weight_of(layer).dtype}
    if not isinstance(layer, _Convolution):
        linear: nn.Module = nn.utils.skip_init(nn.Linear, inputs, outputs, **place)
        return linear
    kind = next(base for base in _Convolution if isinstance(layer, base))
    names = (*_GEOMETRY, *["output_padding"] * isinstance(layer, _Transposed))
    geometry = {name: getattr(layer, name) for name in names}
    convolution: nn.Module = nn.utils.skip_init(kind, inputs, outputs, groups=groups, **geometry, **place)
    return convolution


def run_like(nodes: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """Call a node set so that its output has the size of the layer's, which a transposed convolution may be asked for.

    Args:
        nodes: a Linear or a convolution.
        x: its input.
        out: the layer's output.
    """
    if isinstance(nodes, _Transposed):
        stacked: Tensor = nodes(x, output_size=list(out.shape[-len(nodes.kernel_size) :]))
    else:
        stacked = nodes(x)
    return stacked


def pick(values: Tensor, choice: Tensor | int) -> Tensor:
    """Of the nodes of each neuron the one that it takes.

    Args:
        values: shape ``(count, C, *)``.
        choice: a number for all neurons, or shape ``(C,)``.

    Returns:
        Shape ``(C, *)``.

    Example:
        >>> pick(torch.arange(6).view(3, 2), torch.tensor([2, 0]))
        tensor([4, 1])
    """
    if isinstance(choice, Tensor):
        return values[choice, torch.arange(len(choice), device=choice.device)]
    return values[choice]
