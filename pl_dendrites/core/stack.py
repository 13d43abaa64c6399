"""Dendrites of one layer that are computed as one: sets that follow each other and are alike."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.functional import ACTIVATIONS, cascade
from pl_dendrites.core.kinds import Inputs, LayerKind, weight_of
from pl_dendrites.core.layers import narrowed
from pl_dendrites.core.shapes import local, per_neuron

__all__ = ["Form", "Stack"]


@dataclass(frozen=True)
class Form:
    """What a stack looks like; with the number of dendrites below it, all that must be known to make one.

    Attributes:
        count: dendrites of each neuron.
        activation: name of their activation.
        live: whether they learn with the network, by gradient.
        fan_in: inputs that each dendrite sees; ``None``: all.
        neurons: how many neurons have them; ``None``: all of the layer's.
    """

    count: int
    activation: str = "tanh"
    live: bool = False
    fan_in: int | None = None
    neurons: int | None = None


class Stack(nn.Module):
    r"""Some dendrites of one layer, at work as one module.

    Args:
        layer: the layer that the dendrites belong to; it is read, not kept.
        kind: the view that its dendrites have of it.
        form: what to make.
        below: dendrites per neuron that come earlier, in other stacks.

    Attributes:
        form: what it looks like.
        below: dendrites per neuron that come earlier.
        nodes: :math:`V` and :math:`v` of all its dendrites, one module.
        links: :math:`u`, a row for each pair of a dendrite of this stack and an earlier one, in the order (0, 0), ...,
            (0, below - 1), (1, 0), ..., (1, below), ...
        weights: :math:`a`, a parameter of shape ``(C,)`` for each dendrite.
        neurons: which neurons have these dendrites, ascending; ``None``: all.
        code: position of the activation in ``ACTIVATIONS``, and whether the dendrites are live; for state_dicts.

    Raises:
        ValueError: if the layer cannot have such dendrites.
    """

    nodes: nn.Module
    links: nn.Parameter
    code: Tensor
    neurons: Tensor | None

    def __init__(self, layer: nn.Module, kind: LayerKind, form: Form, below: int) -> None:
        super().__init__()
        self.form, self.below = Form(0, form.activation, form.live, form.fan_in, form.neurons), below
        self.kind = narrowed(kind, layer, form.fan_in, form.neurons)
        device = weight_of(layer).device
        self.weights = nn.ParameterList()
        neurons = None if form.neurons is None else torch.arange(form.neurons, device=device)
        self.register_buffer("neurons", neurons)
        code = [list(ACTIVATIONS).index(form.activation), int(form.live)]
        self.register_buffer("code", torch.tensor(code, device=device))
        self.resize(layer, form.count)

    @property
    def count(self) -> int:
        """Dendrites of each of its neurons."""
        return self.form.count

    @property
    def live(self) -> bool:
        """Whether its dendrites learn with the network: gradient flows into them and through them into the input."""
        return self.form.live

    def train(self, mode: bool = True) -> Stack:
        """Set the mode of the network; what is frozen stays in evaluation mode."""
        super().train(mode)
        if not self.live:
            self.nodes.eval()
        return self

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        neurons = "" if self.neurons is None else f" for {len(self.neurons)} neurons"
        return f"{self.count} per neuron{neurons}, {self.form.activation}{', live' * self.live}"

    def forward(self, inputs: Inputs, out: Tensor, earlier: list[Tensor]) -> list[Tensor]:
        """Outputs of its dendrites.

        Args:
            inputs: what the layer was called with.
            out: the layer's own output.
            earlier: outputs of the dendrites below, for all neurons of the layer.

        Returns:
            Those of this stack in order, for its own neurons.
        """
        with nullcontext() if self.live else torch.no_grad():
            potentials = self.kind.potentials(self.nodes, self.count, inputs, out, self.live)
            if self.neurons is not None:
                earlier = [output.index_select(self.kind.dim, self.neurons) for output in earlier]
            return cascade(potentials.unbind(0), self.links, ACTIVATIONS[self.form.activation], self.kind.dim, earlier)

    def add_to(self, total: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the next layer sees, as far as these dendrites and all below go.

        Args:
            total: the layer's output with the signals of those below, ``(*, C, *)``.
            outputs: what :meth:`forward` returned.
        """
        dim = self.kind.dim
        for weight, output in zip(self.weights, outputs, strict=True):
            factor, term = per_neuron(local(weight), dim, total.ndim).to(total.dtype), output.to(total.dtype)
            if self.neurons is None:
                total = torch.addcmul(total, factor, term)
            else:
                total = total.index_add(dim, self.neurons, factor * term)
        return total

    def for_all(self, outputs: list[Tensor], out: Tensor) -> list[Tensor]:
        """Outputs of dendrites for all neurons of the layer, zero where a neuron has none here.

        Args:
            outputs: what :meth:`forward` returned.
            out: the layer's own output.
        """
        if self.neurons is None:
            return outputs
        dim = self.kind.dim
        return [torch.zeros_like(out, dtype=o.dtype).index_copy(dim, self.neurons, o) for o in outputs]

    @torch.no_grad()
    def resize(self, layer: nn.Module, count: int) -> None:
        """Make room for ``count`` dendrites of each neuron; the first of those that were there keep their values.

        New ones have undefined nodes, zero links and zero output weights: they change no output until they are filled
        in and trained. Parameters of the output weights of dendrites that stay keep their identity.

        Args:
            layer: the layer that the dendrites belong to.
            count: at least 1.
        """
        keep = min(self.count, count)
        neurons = self.kind.neurons
        assert neurons is not None
        reference = weight_of(layer)
        place: dict[str, Any] = {"device": reference.device, "dtype": reference.dtype}
        nodes = self.kind.node_set(layer, count)
        links = torch.zeros(_rows(count, self.below), neurons, **place)
        if keep:
            for j in range(keep):
                self.kind.put(nodes, j, self.kind.take(self.nodes, j))
            links[: _rows(keep, self.below)] = self.links[: _rows(keep, self.below)]
        self.nodes, self.links = nodes.requires_grad_(self.live), nn.Parameter(links)
        # Without any links the parameter gets no gradient, and that is an error under DDP.
        self.links.requires_grad_(self.live and links.numel() > 0)
        self.weights = self.weights[:keep]
        for _ in range(keep, count):
            self.weights.append(nn.Parameter(torch.zeros(neurons, **place)))
        self.form = Form(count, self.form.activation, self.live, self.form.fan_in, self.form.neurons)
        self.train(self.training)

    def links_of(self, dendrite: int) -> slice:
        """Which rows of ``links`` are those of one dendrite."""
        return slice(_rows(dendrite, self.below), _rows(dendrite + 1, self.below))

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a base phase trains: the output weights, and of live dendrites all else."""
        inner = [*self.nodes.parameters(), self.links] if self.live else []
        return [*self.weights, *(parameter for parameter in inner if parameter.numel())]


def _rows(count: int, below: int) -> int:
    return count * below + count * (count - 1) // 2
