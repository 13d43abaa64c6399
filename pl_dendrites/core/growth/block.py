"""Dendrites of one layer that are computed as one: sets that follow each other and are alike, and their cascade."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.checks import check, check_one_of
from pl_dendrites.core.kinds import Inputs, LayerKind, narrowed, weight_of
from pl_dendrites.core.tensors import INTEGERS, local, may_add_in_place, per_neuron

__all__ = ["Block", "Form", "as_integers_at_work", "cascade", "check_form", "inputs_kept"]


@dataclass(frozen=True)
class Form:
    """What a block looks like; with the number of dendrites below it, all that must be known to make one.

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

    def make(self, layer: nn.Module, kind: LayerKind, below: int) -> Block:
        """A block of this form, see :class:`Block`."""
        return Block(layer, kind, self, below)


def check_form(activation: object, fan_in: object) -> None:
    """Raise ``ValueError`` unless there can be such dendrites.

    Args:
        activation: the name of one.
        fan_in: a number of inputs, a share of them, or ``None``.

    Example:
        >>> check_form("tanh", 1.5)
        Traceback (most recent call last):
        ValueError: `fan_in` must be a positive number of inputs or a share of them up to 1.0, got 1.5
    """
    check_one_of("activation", activation, ACTIVATIONS)
    number = isinstance(fan_in, int | float) and not isinstance(fan_in, bool)
    holds = fan_in is None or (number and (0 < fan_in <= 1 if isinstance(fan_in, float) else fan_in >= 1))  # type: ignore[operator]
    check("fan_in", holds, "a positive number of inputs or a share of them up to 1.0", fan_in)


def inputs_kept(inputs: int | None, fan_in: int | float | None) -> int | None:
    """How many inputs dendrites of a layer see that are to see so many; ``None``: all of them.

    Args:
        inputs: of the layer; ``None``: its dendrites cannot do with a part.
        fan_in: a number, a share of them, or ``None``.

    Example:
        >>> inputs_kept(100, 0.25), inputs_kept(3, 4)
        (25, None)
    """
    if inputs is None or fan_in is None:
        return None
    kept = max(1, round(fan_in * inputs)) if isinstance(fan_in, float) else fan_in
    return kept if kept < inputs else None


class Block(nn.Module):
    r"""Some dendrites of one layer, at work as one module.

    Args:
        layer: the layer that the dendrites belong to; it is read, not kept.
        kind: the view that its dendrites have of it.
        form: what to make.
        below: dendrites per neuron that come earlier, in other blocks.

    Attributes:
        form: what it looks like.
        below: dendrites per neuron that come earlier.
        nodes: :math:`V` and :math:`v` of all its dendrites, one module.
        links: :math:`u`, a row for each pair of a dendrite of this block and an earlier one, in the order (0, 0), ...,
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
        self.register_load_state_dict_pre_hook(as_integers_at_work)  # type: ignore[no-untyped-call]
        self.resize(layer, form.count)

    @property
    def count(self) -> int:
        """Dendrites of each of its neurons."""
        return self.form.count

    def can_take(self, form: object, below: int) -> bool:
        """Whether it differs from a form in no more than its number of dendrites."""
        return isinstance(form, Form) and self.below == below and replace(form, count=self.count) == self.form

    @property
    def live(self) -> bool:
        """Whether its dendrites learn with the network: gradient flows into them and through them into the input."""
        return self.form.live

    def train(self, mode: bool = True) -> Block:
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
            Those of this block in order, for its own neurons.
        """
        kind, form, neurons = self.kind, self.form, self._whose()
        remembers = form.live or not torch.is_grad_enabled()  # as it is
        with nullcontext() if remembers else torch.no_grad():
            potentials = kind.potentials_apart(self._part("nodes"), form.count, inputs, out, form.live)
            if neurons is not None:
                earlier = [output.index_select(kind.dim, neurons) for output in earlier]
            return cascade(potentials, self.links, ACTIVATIONS[form.activation], kind.dim, earlier)

    def add_to(self, total: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the next layer sees, as far as these dendrites and all below go.

        Args:
            total: the layer's output with the signals of those below, ``(*, C, *)``.
            outputs: what :meth:`forward` returned.
        """
        dim, dtype, given, in_place = self.kind.dim, total.dtype, total, may_add_in_place()
        neurons = self._whose()
        for weight, output in zip(self._output_weights(), outputs, strict=True):
            factor, term = per_neuron(local(weight), dim, total.ndim), output
            if not dtype == factor.dtype == term.dtype:
                factor, term = factor.to(dtype), term.to(dtype)
            if neurons is not None:
                total = total.index_add(dim, neurons, factor * term)
            elif total is given or not in_place:
                total = torch.addcmul(total, factor, term)
            else:
                total = total.addcmul_(factor, term)
        return total

    # At batch 1 nn.Module.__getattr__ and the like take as long as the arithmetic: what goes past them is below.

    def _whose(self) -> Tensor | None:
        return None if self.form.neurons is None else self.neurons

    def _part(self, name: str) -> nn.Module:
        part = self._modules[name]
        assert part is not None
        return part

    def _output_weights(self) -> Iterable[Tensor]:
        # Where not all are parameters, as after pruning, which puts what it computes in the place of one, the list is
        # asked.
        weights = self._part("weights")
        entries = weights._parameters
        return cast("Iterable[Tensor]", entries.values() if (*entries,) == self._places else weights)

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
        self._places = tuple(map(str, range(count)))
        self.form = Form(count, self.form.activation, self.live, self.form.fan_in, self.form.neurons)
        self.train(self.training)

    def links_of(self, dendrite: int) -> slice:
        """Which rows of ``links`` are those of one dendrite."""
        return slice(_rows(dendrite, self.below), _rows(dendrite + 1, self.below))

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a base phase trains: the output weights, and of live dendrites all else."""
        inner = [*self.nodes.parameters(), self.links] if self.live else []
        return [*self.weights, *(parameter for parameter in inner if parameter.numel())]


def as_integers_at_work(block: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook of blocks for loading: a file may hold integers in fewer bits, or in more.

    With ``assign=True`` PyTorch would take them as they are.
    """
    for name, own in block.named_buffers():
        given = state_dict.get(f"{prefix}{name}")
        if isinstance(given, Tensor) and {own.dtype, given.dtype} <= {*INTEGERS} and given.numel() == own.numel():
            state_dict[f"{prefix}{name}"] = given.to(own.dtype)


def cascade(
    potentials: Sequence[Tensor],
    links: Tensor,
    activation: Callable[[Tensor], Tensor],
    dim: int,
    below: Sequence[Tensor] = (),
) -> list[Tensor]:
    r"""Outputs of the dendrites of every neuron, each of which also sees the earlier ones of its neuron.

    .. math:: d_{j,c} = f\Big(z_{j,c} + \sum_{i<j} u_{j,i,c}\, d_{i,c}\Big), \qquad z_{j,c} = V_{j,c} \cdot x + v_{j,c}

    This is the cascade of Fahlman & Lebiere (CMU-CS-90-100, 1990), private to one neuron as in Brenner & Itti
    (arXiv:2501.18018).

    Args:
        potentials: ``k`` tensors of the layer's output shape, :math:`z_j`.
        links: shape ``(rows, C)``: :math:`u` of the first dendrite and each of those below, of the second and each of
            those below and the first, and so on. With none below, the rows (1,0), (2,0), (2,1), (3,0), ...
        activation: :math:`f`.
        dim: the neuron dimension, counted from the end.
        below: outputs of dendrites that come before all of these.

    Returns:
        ``k`` tensors of the layer's output shape.

    Example:
        >>> first, second = cascade([torch.ones(1, 1), torch.ones(1, 1)], torch.tensor([[-1.0]]), torch.relu, -1)
        >>> first.item(), second.item()
        (1.0, 0.0)
    """
    if dim != -1 and potentials:
        links = per_neuron(links, dim, potentials[0].ndim)
    rows = iter(links.unbind() if len(links) else ())
    in_place, seen = may_add_in_place(), [*below]
    for potential in potentials:
        total = potential
        for earlier in seen:
            link = next(rows)
            if link.dtype != earlier.dtype:
                link = link.to(earlier.dtype)
            # What the first sum made belongs to nobody else.
            if total is potential or not in_place:
                total = torch.addcmul(total, link, earlier)
            else:
                total.addcmul_(link, earlier)
        seen.append(activation(total))
    return seen[len(below) :]


def _rows(count: int, below: int) -> int:
    return count * below + count * (count - 1) // 2
