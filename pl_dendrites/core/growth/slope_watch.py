"""How steeply the loss falls along each weight that dendrites of a layer could have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pl_dendrites.core.growth.watch import Watch
from pl_dendrites.core.kinds import Inputs, LinearConv, like, run_like, weight_of
from pl_dendrites.core.tensors import below_transforms

__all__ = ["SlopeWatch"]

_DIRECTIONS = 8


class SlopeWatch(Watch):
    r"""Adds up the gradient that a weight from each input to each neuron would have, if there was one.

    A dendrite whose weights :math:`V` are zero and whose activation has slope 1 there changes no output, and has the
    gradient :math:`G_{c,i} = \sum_s E_{s,c}\, x_{s,i}`, that of the layer's own weight. All of ``G`` is as large as
    the layer. So it is looked at twice: first at ``G R`` for a narrow random ``R``, whose rows are as long as those of
    ``G`` in the mean (Johnson & Lindenstrauss, 1984), and then, for some neurons, at their rows of ``G``.

    Args:
        layer: a Linear or a convolution without groups; it is read, not kept.
        kind: the view that dendrites have of it.
        seed: of the directions.

    Attributes:
        neurons: the neurons whose rows are looked at; ``None``: it is the first look.
        sums: shape ``(C, directions, *kernel)``, or ``(neurons, inputs, *kernel)``.

    Example:
        >>> layer, x, error = nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 2)
        >>> watch = SlopeWatch(layer, LinearConv(layer))
        >>> watch.look_at(layer, torch.tensor([1]))
        >>> watch.take(watch.features(Inputs((x,), {}), layer(x)), error)
        >>> bool(torch.allclose(watch.sums, error[:, 1:].T @ x, atol=1e-6))
        True
    """

    neurons: Tensor | None

    def __init__(self, layer: nn.Module, kind: LinearConv, seed: int = 0) -> None:
        super().__init__()
        self._kind, self.neurons = kind, None
        self._backward = 0
        weight, generator = weight_of(layer), torch.Generator("cpu").manual_seed(seed)
        directions = torch.randn(kind.inputs, _DIRECTIONS, device="cpu", generator=generator) / math.sqrt(_DIRECTIONS)
        self._directions: Tensor | None = directions.to(weight.device)
        self._probe(layer, _DIRECTIONS, kind.neurons)

    def _probe(self, layer: nn.Module, inputs: int, neurons: int) -> None:
        # A layer of the same geometry, whose gradient is wanted and whose weights say nothing.
        if not neurons:
            self.sums = torch.zeros(0, inputs, device=weight_of(layer).device)
            return
        self._nodes = like(layer, inputs, neurons, 1, weight_of(layer).device).float()
        self._view = type(self._kind)(layer, neurons)
        self.sums = torch.zeros_like(self._view.by_neuron(self._nodes, "weight")[0].detach())

    def look_at(self, layer: nn.Module, neurons: Tensor) -> None:
        """From now on look at all inputs of some neurons.

        Args:
            layer: the layer.
            neurons: ascending.
        """
        self.neurons, self._directions = neurons.to(weight_of(layer).device), None
        self._probe(layer, self._kind.inputs, len(neurons))

    @property
    def seen(self) -> int:
        """Backward passes that brought an error."""
        return self._backward

    def features(self, inputs: Inputs, out: Tensor) -> Tensor:
        """See :meth:`Watch.features`."""
        x = below_transforms(self._kind.input_of(inputs, live=False))
        if self._directions is None:
            return x
        dim = self._kind.dim
        return (x.movedim(dim, -1) @ self._directions.to(x.dtype)).movedim(-1, dim)

    @torch.no_grad()
    def take(self, x: Tensor, error: Tensor) -> None:
        """See :meth:`Watch.take`. Of an error that is not finite nothing is taken."""
        self._backward += 1
        if not len(self.sums):
            return
        if self.neurons is not None:
            error = error.index_select(self._kind.dim, self.neurons)
        x, error = x.float(), error.float()
        if isinstance(self._nodes, nn.Linear):
            gradient = error.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            gradient = self._of_convolution(x, error)
        self.sums += gradient.nan_to_num(0.0, 0.0, 0.0)

    @torch.enable_grad()
    def _of_convolution(self, x: Tensor, error: Tensor) -> Tensor:
        weight = self._nodes.get_parameter("weight")
        (gradient,) = torch.autograd.grad(run_like(self._nodes, x, error), weight, error)
        weight.data.copy_(gradient)  # whose place in memory tells neurons and inputs
        return self._view.by_neuron(self._nodes, "weight")[0].detach()

    def state_dict(self) -> dict[str, Tensor]:
        """What it saw, as plain tensors."""
        neurons = {} if self.neurons is None else {"neurons": self.neurons.clone()}
        return {"sums": self.sums.clone(), "seen": torch.tensor(self._backward), **neurons}

    def load_state_dict(self, layer: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            layer: the layer.
            state: of the same layer.

        Raises:
            ValueError: if it is of another.
        """
        if "neurons" in state:
            neurons = state["neurons"]
            if neurons.ndim != 1 or neurons.is_floating_point() or not _ascend(neurons, self._kind.neurons):
                raise ValueError(f"the neurons looked at are to be some of {self._kind.neurons}, ascending")
            self.look_at(layer, neurons)
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"slopes of the shape {tuple(state['sums'].shape)} are none of {tuple(self.sums.shape)}")
        self.sums.copy_(state["sums"])
        self._backward = int(state["seen"])


def _ascend(places: Tensor, there: int) -> bool:
    values = places.tolist()
    return values == sorted(set(values)) and all(0 <= value < there for value in values)
