"""What dendrites must know of the layer that they hang on: where its neurons are, and how nodes like it are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "LayerKind", "scaled", "weight_of"]


class Inputs(NamedTuple):
    """What a layer was called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayerKind(ABC):
    """The view that dendrites have of one layer.

    A dendrite's node is the part of it that sees the layer's input. The nodes of all dendrites of a layer are one
    module, the node set; what it looks like is up to the kind.

    Attributes:
        neurons: number of neurons, ``C``; ``None`` while no forward pass has told.
        dim: their dimension in the layer's output, counted from the end.
        separable: whether each neuron has nodes of its own. Where it has not, a candidate is taken for all neurons or
            for none.
        choosable: whether a set may have nodes for some of the neurons alone.
        inputs: how many inputs each neuron sees; ``None`` where nodes cannot do with a part of them.
        scalable: whether a node whose parameters are all multiplied puts out as many times what it did.
        stateful: whether :meth:`before` has something to do.
    """

    neurons: int | None
    dim: int
    separable: bool
    choosable: bool = False
    inputs: int | None = None
    scalable: bool = False
    stateful: bool = False

    def before(self, layer: nn.Module, inputs: Inputs) -> Inputs:
        """What the layer is to be called with instead."""
        return inputs

    def output(self, out: Any) -> Tensor:
        """The tensor that holds the neurons' outputs, of all that the layer returned."""
        tensor: Tensor = out
        return tensor

    def with_output(self, out: Any, tensor: Tensor) -> Any:
        """What the layer returned, with another tensor in the place of :meth:`output`."""
        return tensor

    @abstractmethod
    def node_set(self, layer: nn.Module, count: int) -> nn.Module:
        """A set of ``count`` nodes for every neuron, its values undefined.

        Args:
            layer: the layer; the set is like it in type, geometry, device and dtype.
            count: nodes per neuron.
        """

    @abstractmethod
    def template(self, layer: nn.Module, count: int) -> dict[str, Tensor]:
        """The entries of a node set's state_dict, on the meta device: types and shapes alone, nothing allocated."""

    def cost(self, layer: nn.Module) -> int:
        """Parameters of one node of every neuron."""
        return sum(entry.numel() for entry in self.template(layer, 1).values() if entry.is_floating_point())

    @abstractmethod
    def initialise(self, nodes: nn.Module, generator: torch.Generator | None = None) -> None:
        """Draw the values of a node set as PyTorch draws those of a new layer.

        Args:
            nodes: the node set.
            generator: a generator on the CPU, so that a draw does not depend on the device, and the user's own sequence
                of random numbers is left alone; ``None``: PyTorch's default one.
        """

    @abstractmethod
    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """What a node set computes beside its layer.

        Args:
            nodes: the node set.
            count: nodes per neuron.
            inputs: what the layer was called with.
            out: the layer's own :meth:`output`.
            live: whether gradient flows through the nodes into the inputs.

        Returns:
            Shape ``(count, *, C, *)``.
        """

    @abstractmethod
    def take(self, nodes: nn.Module, choice: Tensor | int) -> dict[str, Tensor]:
        """One node of each neuron, as values that :meth:`put` takes.

        Args:
            nodes: the set that is read.
            choice: which of its nodes the neurons take: a number for all, or shape ``(C,)``; where neurons are not
                separable, all the same.
        """

    @abstractmethod
    def put(self, nodes: nn.Module, place: int, values: dict[str, Tensor]) -> None:
        """Write one node of every neuron.

        Args:
            nodes: the set that is written.
            place: which of its nodes.
            values: from :meth:`take`.
        """

    def best(self, correlation: Tensor) -> Tensor:
        """Which candidate each neuron takes, the one with the largest absolute correlation.

        Args:
            correlation: shape ``(P, C)``.

        Returns:
            Shape ``(C,)``; where neurons are not separable, for all the candidate with the largest mean.
        """
        size = correlation.abs()
        return size.argmax(0) if self.separable else size.mean(1).argmax().expand(size.shape[1])


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, or the first of all its weights: to read type, place and shape, with no effect on the layer.

    A parametrized weight is computed whenever it is read, and spectral norm in training takes a step each time.

    Example:
        >>> weight_of(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3))).shape
        torch.Size([3, 5])
        >>> weight_of(nn.Sequential(nn.Linear(2, 3).double())).dtype
        torch.float64
    """
    parametrizations = layer._modules.get("parametrizations")
    training = [] if parametrizations is None else [module for module in parametrizations.modules() if module.training]
    for module in training:
        module.training = False
    try:
        weight = getattr(layer, "weight", None)
    finally:
        for module in training:
            module.training = True
    if isinstance(weight, Tensor):
        return weight
    return next(parameter for parameter in layer.parameters() if parameter.is_floating_point())


def scaled(values: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """A node of each neuron whose potential is multiplied by a factor.

    Args:
        values: from :meth:`LayerKind.take` of a kind that is scalable.
        factors: shape ``(C,)``.

    Example:
        >>> scaled({"weight": torch.ones(2, 3), "inputs": torch.tensor([4, 5])}, torch.tensor([0.5, 2.0]))["weight"]
        tensor([[0.5000, 0.5000, 0.5000],
                [2.0000, 2.0000, 2.0000]])
    """
    weights = {name: value for name, value in values.items() if value.is_floating_point()}
    return values | {
        name: value * factors.to(value.dtype).view(-1, *[1] * (value.ndim - 1)) for name, value in weights.items()
    }
