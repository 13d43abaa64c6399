"""Sparse dendrites: nodes that each see a few inputs of their layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.kinds.bags import weighted_sums
from pl_dendrites.core.kinds.base import Inputs, LayerKind, plain_kind, weight_of
from pl_dendrites.core.kinds.linear_conv import LinearConv, like, pick, run_like
from pl_dendrites.core.tensors import unstack_nodes

__all__ = ["Sparse", "SparseConv", "SparseLinear", "narrowed"]


class SparseLinear(nn.Module):
    """Nodes that each see ``m`` of a Linear's ``n`` inputs. Cost and memory follow ``m`` and not ``n``.

    Args:
        nodes: how many, ``N``.
        fan_in: inputs of each, ``m``.
        device: where its values, which are undefined, lie.
        dtype: of the weights.

    Attributes:
        inputs: shape ``(N, m)``, which inputs each node sees.
        weight: shape ``(N, m)``.
        bias: shape ``(N,)``.
    """

    inputs: Tensor

    def __init__(self, nodes: int, fan_in: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.zeros(nodes, fan_in, dtype=torch.int32, device=device))
        self.weight = nn.Parameter(torch.empty(nodes, fan_in, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(nodes, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Potentials.

        Args:
            x: shape ``(*, n)``.

        Returns:
            Shape ``(*, N)``.
        """
        # Rows are inputs, with a column for each sample.
        bags = weighted_sums(x.reshape(-1, x.shape[-1]).T, self.weight.to(x.dtype), self.inputs)
        return (bags.T + self.bias.to(x.dtype)).view(*x.shape[:-1], len(self.bias))


class SparseConv(nn.Module):
    """Nodes that each see ``m`` of a convolution's input channels, with a kernel for each of these.

    Args:
        layer: the convolution.
        nodes: how many, ``N``.
        fan_in: channels that each sees, ``m``.
        device: where its values, which are undefined, lie.

    Attributes:
        inputs: shape ``(N, m)``, which channels each node sees.
        layer: a convolution of ``N`` groups, one for each node.
    """

    inputs: Tensor

    def __init__(self, layer: nn.Module, nodes: int, fan_in: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.zeros(nodes, fan_in, dtype=torch.int32, device=device))
        self.layer = like(layer, nodes * fan_in, nodes, nodes, device)
        self._is_pointwise = _is_pointwise(self.layer)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Potentials.

        Args:
            x: the convolution's input.
            out: its output, whose size alone matters.

        Returns:
            Shape of ``out``, but ``N`` channels.
        """
        dim = -1 - len(self.layer.kernel_size)  # type: ignore[arg-type]
        if self._is_pointwise:
            return self._sums(x.movedim(dim, 0)).movedim(0, dim)
        return run_like(self.layer, x.index_select(dim, self.inputs.flatten()), out)

    def _sums(self, channels: Tensor) -> Tensor:
        # A convolution of many small groups takes ten times as long.
        weight, bias = (self.layer.get_parameter(name).to(channels.dtype) for name in ("weight", "bias"))
        bags = weighted_sums(channels.flatten(1), weight.reshape(self.inputs.shape), self.inputs)
        sums: Tensor = (bags + bias[:, None]).unflatten(1, channels.shape[1:])
        return sums


def _is_pointwise(layer: nn.Module) -> bool:
    # Each output sees the inputs at its own position, and there is one for each.
    geometry: Any = layer
    shifted = isinstance(geometry.padding, tuple) and any(geometry.padding)
    return {*geometry.kernel_size, *geometry.stride} == {1} and not shifted


class Sparse(LayerKind):
    """A Linear or a convolution, each of whose nodes sees a few inputs: features, or whole channels.

    Args:
        layer: the layer; it is read, not kept.
        fan_in: inputs of each node.
        neurons: how many of its neurons have nodes; ``None``: all.

    Raises:
        ValueError: if there are not that many inputs.

    Example:
        >>> layer = nn.Linear(100, 3)
        >>> kind = Sparse(layer, fan_in=4)
        >>> nodes = kind.node_set(layer, count=2)
        >>> kind.initialise(nodes)
        >>> x = torch.randn(7, 100)
        >>> kind.potentials(nodes, 2, Inputs((x,), {}), layer(x)).shape, kind.cost(layer)
        (torch.Size([2, 7, 3]), 15)
    """

    separable = choosable = scalable = True
    neurons: int
    inputs: int

    def __init__(self, layer: nn.Module, fan_in: int, neurons: int | None = None) -> None:
        dense = plain_kind(layer)
        assert isinstance(dense, LinearConv)
        self._dense = dense
        self.inputs = self._dense.inputs
        if not 1 <= fan_in <= self.inputs:
            raise ValueError(f"each of its neurons has {self.inputs} inputs, and a dendrite cannot see {fan_in}")
        self.fan_in, self.dim = fan_in, self._dense.dim
        self.neurons = self._dense.neurons if neurons is None else neurons

    def node_set(self, layer: nn.Module, count: int) -> nn.Module:
        """See :meth:`LayerKind.node_set`."""
        return self._make(layer, count, weight_of(layer).device)

    def template(self, layer: nn.Module, count: int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.template`."""
        return dict(self._make(layer, count, torch.device("meta")).state_dict())

    def _make(self, layer: nn.Module, count: int, device: torch.device) -> nn.Module:
        nodes = count * self.neurons
        if hasattr(layer, "kernel_size"):
            return SparseConv(layer, nodes, self.fan_in, device)
        return SparseLinear(nodes, self.fan_in, device, weight_of(layer).dtype)

    @torch.no_grad()
    def initialise(self, nodes: nn.Module, generator: torch.Generator | None = None) -> None:
        r"""Draw inputs without order, and weights and biases uniformly from :math:`\pm 1/\sqrt{n}`.

        Here ``n`` is what a node has of weights. A set of all neurons is expected, for inputs are those of their group.

        Args:
            nodes: a set made by :meth:`node_set`.
            generator: see :meth:`LayerKind.initialise`.
        """
        inputs, groups = nodes.get_buffer("inputs"), self._dense.groups
        draw = torch.rand(len(inputs), self.inputs, device="cpu", generator=generator)
        order = draw.argsort(1)[:, : self.fan_in].sort(1).values
        size = self._dense.neurons // groups
        group = torch.arange(len(inputs), device="cpu") % self._dense.neurons // size
        inputs.copy_(order + self.inputs * group[:, None])
        parameters = dict(nodes.named_parameters())
        bound = 1 / math.sqrt(max(sum(p.numel() for p in parameters.values()) // len(inputs) - 1, 1))
        for parameter in parameters.values():
            parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))

    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """See :meth:`LayerKind.potentials`."""
        return unstack_nodes(self._side_by_side(nodes, inputs, out, live), count, 1, self.dim)

    def potentials_apart(
        self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False
    ) -> Sequence[Tensor]:
        """See :meth:`LayerKind.potentials_apart`."""
        stacked = self._side_by_side(nodes, inputs, out, live)
        return torch.split_with_sizes(stacked, [self.neurons] * count, self.dim)

    def _side_by_side(self, nodes: nn.Module, inputs: Inputs, out: Tensor, live: bool) -> Tensor:
        x = self._dense.input_of(inputs, live)
        stacked: Tensor = nodes(x) if isinstance(nodes, SparseLinear) else nodes(x, out)
        return stacked

    @torch.no_grad()
    def strongest(self, nodes: nn.Module, count: int, deviation: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Of nodes that see all inputs, what they are with their strongest ones alone.

        The strength of an input is its weight times its standard deviation: one that never varies, a pixel at the
        border say, keeps the weight that it was drawn with, and does nothing.

        Args:
            nodes: a set that the dense kind made.
            count: nodes per neuron.
            deviation: of each input, of all groups; ``None``: all are alike.

        Returns:
            For each node of every neuron values that :meth:`put` takes. A weight that stays is what it was.
        """
        return [self._keep(self._dense.take(nodes, j), deviation) for j in range(count)]

    def _keep(self, values: dict[str, Tensor], deviation: Tensor | None) -> dict[str, Tensor]:
        strength = values["weight"].reshape(self._dense.neurons, self.inputs, -1).norm(dim=2)
        rows = torch.arange(len(strength), device=strength.device)
        group = rows // (self._dense.neurons // self._dense.groups)
        if deviation is not None:
            strength = strength * deviation.view(self._dense.groups, self.inputs)[group]
        kept = strength.topk(self.fan_in, 1).indices.sort(1).values
        return {
            "inputs": kept + self.inputs * group[:, None],
            "weight": values["weight"][rows[:, None], kept],
            "bias": values["bias"],
        }

    @torch.no_grad()
    def take(self, nodes: nn.Module, choice: Tensor | int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.take`."""
        return {name: pick(value, choice) for name, value in self.by_neuron(nodes).items()}

    @torch.no_grad()
    def put(self, nodes: nn.Module, place: int, values: dict[str, Tensor]) -> None:
        """See :meth:`LayerKind.put`."""
        own = self.by_neuron(nodes)
        for name, value in values.items():
            own[name][place] = value

    def by_neuron(self, nodes: nn.Module) -> dict[str, Tensor]:
        """Views ``(count, C, *)`` of all that a set holds; of a convolution's weight ``(count, C, m, *kernel)``."""
        values = {name.removeprefix("layer."): value.detach() for name, value in nodes.state_dict().items()}
        values["weight"] = values["weight"].reshape(*values["inputs"].shape, *values["weight"].shape[2:])
        return {name: value.unflatten(0, (-1, self.neurons)) for name, value in values.items()}


def narrowed(kind: LayerKind, layer: nn.Module, fan_in: int | None, neurons: int | None) -> LayerKind:
    """The view of dendrites that see only some of the inputs, or that only some neurons have.

    Args:
        kind: the view of those that see all.
        layer: the layer.
        fan_in: inputs of each dendrite; ``None``: all.
        neurons: how many neurons have them; ``None``: all.

    Raises:
        ValueError: if the layer cannot have such dendrites.

    Example:
        >>> layer = nn.Linear(5, 3)
        >>> narrowed(LinearConv(layer), layer, fan_in=2, neurons=None).cost(layer)
        9
    """
    if fan_in is None and neurons is None:
        return kind
    if not isinstance(kind, LinearConv):
        raise ValueError("its dendrites see all inputs, and all of its neurons have them")
    return type(kind)(layer, neurons) if fan_in is None else Sparse(layer, fan_in, neurons)
