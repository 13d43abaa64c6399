"""Linear layers and convolutions: a set of nodes is itself one standard layer.

``count`` nodes for each of the ``C`` neurons of an ``nn.Linear(n, C)`` are one ``nn.Linear(n, count * C)``, of a
convolution one convolution of the same geometry with ``count * C`` channels. One matrix product serves them all, and
tools that know PyTorch's layers know ours.
"""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.functional import flat_nested, like_nested, unstack_nodes
from pl_dendrites.core.kinds import Inputs, LayerKind, weight_of

__all__ = ["STACKED", "Stacked"]

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_Transposed)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

STACKED = (nn.Linear, *_Convolution)


class Stacked(LayerKind):
    """A Linear or a convolution, whose nodes are one layer of the same type.

    Args:
        layer: the layer; it is read, not kept.

    Attributes:
        groups: number of groups that neurons fall into by the inputs they see.

    Example:
        >>> kind = Stacked(nn.Conv2d(4, 8, 3, groups=2))
        >>> kind.neurons, kind.dim, kind.groups
        (8, -3, 2)
        >>> Stacked(nn.Linear(5, 3)).node_set(nn.Linear(5, 3), count=2)
        Linear(in_features=5, out_features=6, bias=True)
    """

    separable = True
    neurons: int

    def __init__(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Linear):
            self.neurons, self.dim, self.groups = layer.out_features, -1, 1
        else:
            assert isinstance(layer, _Convolution)
            self.neurons, self.dim, self.groups = layer.out_channels, -1 - len(layer.kernel_size), layer.groups

        # A subclass may call its input as it likes.
        self._input_name = next(iter(signature(layer.forward).parameters))

    def output(self, out: Any) -> Tensor:
        """The layer's output; of a nested one, its samples one after another."""
        tensor: Tensor = out
        return flat_nested(tensor) if tensor.is_nested else tensor

    def with_output(self, out: Any, tensor: Tensor) -> Any:
        """The tensor, nested as the layer's output was."""
        return like_nested(tensor, out) if out.is_nested else tensor

    def node_set(self, layer: nn.Module, count: int) -> nn.Module:
        """A layer with bias whose output has ``count * C`` entries along the neuron dimension."""
        return self._make(layer, count, weight_of(layer).device)

    def template(self, layer: nn.Module, count: int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.template`."""
        return dict(self._make(layer, count, torch.device("meta")).state_dict())

    def _make(self, layer: nn.Module, count: int, device: torch.device) -> nn.Module:
        place: dict[str, Any] = {"device": device, "dtype": weight_of(layer).dtype}
        if isinstance(layer, nn.Linear):
            linear: nn.Module = nn.utils.skip_init(nn.Linear, layer.in_features, count * self.neurons, **place)
            return linear
        assert isinstance(layer, _Convolution)
        kind = next(base for base in _Convolution if isinstance(layer, base))
        geometry = {
            name: getattr(layer, name) for name in (*_GEOMETRY, *["output_padding"] * isinstance(layer, _Transposed))
        }
        convolution: nn.Module = nn.utils.skip_init(kind, layer.in_channels, count * self.neurons, **geometry, **place)
        return convolution

    @torch.no_grad()
    def initialise(self, nodes: nn.Module, generator: torch.Generator | None = None) -> None:
        r"""Draw weights and biases uniformly from :math:`\pm 1/\sqrt{n}`, as PyTorch's layers with ``n`` inputs do.

        For a transposed convolution ``n`` is the inputs that a whole kernel of one output channel has.

        Args:
            nodes: a set made by :meth:`node_set`.
            generator: see :meth:`LayerKind.initialise`.

        Example:
            >>> kind = Stacked(nn.Linear(4, 2))
            >>> nodes = kind.node_set(nn.Linear(4, 2), count=3)
            >>> kind.initialise(nodes, torch.Generator().manual_seed(0))
            >>> bool(nodes.weight.abs().max() <= 0.5)
            True
        """
        bound = 1 / math.sqrt(max(self._by_neuron(nodes, "weight")[0, 0].numel(), 1))
        for parameter in nodes.parameters():
            draw = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(draw)

    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """See :meth:`LayerKind.potentials`.

        Example:
            >>> layer = nn.ConvTranspose2d(3, 8, 3, stride=2)
            >>> kind, x = Stacked(layer), torch.randn(2, 3, 5, 5)
            >>> out = layer(x, output_size=(12, 12))  # a transposed convolution may be asked for its size
            >>> kind.potentials(kind.node_set(layer, count=2), 2, Inputs((x,), {}), out).shape
            torch.Size([2, 2, 8, 12, 12])
        """
        x = inputs.args[0] if inputs.args else inputs.kwargs[self._input_name]
        if not live:
            x = x.detach()
        if x.is_nested:
            x = flat_nested(x)
        if isinstance(nodes, _Transposed):
            stacked = nodes(x, output_size=list(out.shape[-len(nodes.kernel_size) :]))
        else:
            stacked = nodes(x)
        return unstack_nodes(stacked, count, self.groups, self.dim)

    @torch.no_grad()
    def put(self, nodes: nn.Module, place: int, source: nn.Module, choice: Tensor | int) -> None:
        """See :meth:`LayerKind.put`.

        Example:
            >>> layer = nn.Linear(3, 2)
            >>> kind = Stacked(layer)
            >>> pool, nodes = kind.node_set(layer, 4), kind.node_set(layer, 1)
            >>> kind.initialise(pool)
            >>> kind.put(nodes, 0, pool, torch.tensor([3, 0]))
            >>> torch.equal(nodes.weight, pool.weight[[6, 1]])
            True
        """
        for name, _ in nodes.named_parameters():
            values = self._by_neuron(source, name)
            chosen = (
                values[choice]
                if isinstance(choice, int)
                else values[choice, torch.arange(self.neurons, device=choice.device)]
            )
            self._by_group(nodes, name)[:, place] = chosen.unflatten(0, (self.groups, -1))

    def _by_group(self, nodes: nn.Module, name: str) -> Tensor:
        # A view (groups, count, C / groups, *rest) of a parameter.
        values: Tensor = nodes.get_parameter(name)
        if isinstance(nodes, _Transposed) and name == "weight":  # (inputs, outputs of a group, *kernel)
            apart: Tensor = values.unflatten(0, (self.groups, -1)).transpose(1, 2)
        else:
            apart = values.unflatten(0, (self.groups, -1))
        split: Tensor = apart.unflatten(1, (-1, self.neurons // self.groups))
        return split

    def _by_neuron(self, nodes: nn.Module, name: str) -> Tensor:
        # (count, C, *rest)
        values: Tensor = self._by_group(nodes, name).transpose(0, 1).flatten(1, 2)
        return values
