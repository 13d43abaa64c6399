"""Shared dendrites: units around a whole module, each of which feeds all of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.fields.product import field_product, spread_out
from pl_dendrites.core.fields.rewire import Gains, exchange
from pl_dendrites.core.growth.block import as_integers_at_work
from pl_dendrites.core.kinds import Inputs, LayerKind, weight_of
from pl_dendrites.core.tensors import local

__all__ = ["SharedBlock", "SharedForm", "features"]


@dataclass(frozen=True)
class SharedForm:
    """What a block of shared dendrites looks like.

    Attributes:
        units: how many, ``M``.
        inputs: of the module that they hang around, ``n``.
        outputs: of that module, ``C``.
        field: inputs that each unit sees, ``f``.
        feeds: outputs that each unit feeds; ``None``: all.
        activation: name of their activation.
        live: whether they learn with the network, by gradient.
    """

    units: int
    inputs: int
    outputs: int
    field: int
    feeds: int | None = None
    activation: str = "gelu"
    live: bool = True

    count: ClassVar[int] = 0  # of private dendrites per neuron

    def make(self, layer: nn.Module, kind: LayerKind, below: int) -> SharedBlock:
        """A block of this form, see :class:`SharedBlock`; how many private dendrites there are is nothing to it."""
        return SharedBlock(layer, kind, self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SharedForm:
        """The form of a block whose entries are these. Its integers tell; what is learned is not looked at.

        Args:
            values: of a state_dict, each by its part, checked already.

        Example:
            >>> places, code = torch.tensor([[0, 3]]), torch.tensor([2, 1, 9, 4])
            >>> SharedForm.of({"field": places, "code": code})
            SharedForm(units=1, inputs=9, outputs=4, field=2, feeds=None, activation='relu', live=True)
        """
        activation, live, inputs, outputs = values["code"].tolist()
        (units, field), feeds = values["field"].shape, values["feeds"].shape[1] if "feeds" in values else None
        return cls(units, inputs, outputs, field, feeds, list(ACTIVATIONS)[activation], bool(live))

    @property
    def parameters(self) -> int:
        """Numbers that are learned: of each unit its weights, its bias and its output weights.

        Example:
            >>> SharedForm(units=128, inputs=784, outputs=10, field=36).parameters
            6016
        """
        return self.units * (self.field + 1 + (self.outputs if self.feeds is None else self.feeds))


def features(inputs: Inputs, out: Tensor) -> Tensor:
    """What shared dendrites see: the first tensor of numbers that a module was called with, ``(..., n)``.

    Where the module makes one vector of each example, as a network with images does, all of an example is one vector.

    Args:
        inputs: what the module was called with.
        out: what it returned, ``(..., C)``.

    Raises:
        ValueError: if there is no such tensor, or it has other examples than ``out``.

    Example:
        >>> features(Inputs((torch.zeros(5, 1, 28, 28),), {}), torch.zeros(5, 10)).shape
        torch.Size([5, 784])
    """
    given = (*inputs.args, *inputs.kwargs.values())
    x = next((value for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)
    if x is None:
        raise ValueError(
            "a module that shared dendrites are to hang around is called with no tensor of numbers that they could see,"
            " as token ids are none. Name modules that come after the embedding"
        )
    if x.shape[:-1] == out.shape[:-1]:
        return x
    if x.shape[:1] == out.shape[:-1]:  # a vector for each example
        return x.flatten(1)
    raise ValueError(
        f"a module that shared dendrites are to hang around maps {tuple(x.shape)} to {tuple(out.shape)}, and they need"
        " the same positions in both. Name modules inside it, or others"
    )


class SharedBlock(nn.Module):
    r"""Shared dendrites at work as one module, the hidden units of Cascade-Correlation (CMU-CS-90-100, 1990).

    .. math:: h_m = f\big(V_m \cdot x_{F_m} + v_m\big), \qquad out_c = module(x)_c + \sum_m A_{c,m}\, h_m

    Args:
        layer: the module that they hang around; it is read, not kept.
        kind: the view that dendrites have of it.
        form: what to make. Values are undefined but for output weights, which are zero: the network's output does not
            change.

    Attributes:
        form: what it looks like.
        field: shape ``(M, f)``, the inputs that each unit sees, :math:`F`.
        weight: shape ``(M, f)``, :math:`V`.
        bias: shape ``(M,)``, :math:`v`.
        out: shape ``(M, C)``, or as many columns as each unit feeds outputs, :math:`A`.
        feeds: shape of ``out``, the outputs that each unit feeds; ``None``: all.
        code: position of the activation in ``ACTIVATIONS``, whether the units are live, ``n`` and ``C``.
        gains: what backward passes would move of what units do not see or feed yet, while that is looked at.
    """

    field: Tensor
    feeds: Tensor | None
    code: Tensor

    def __init__(self, layer: nn.Module, kind: LayerKind, form: SharedForm) -> None:
        super().__init__()
        self.form, self.kind = form, kind
        reference = weight_of(layer)
        place: dict[str, Any] = {"device": reference.device, "dtype": reference.dtype}
        self.register_buffer("field", _first(form.units, form.field, place["device"]))
        self.weight = nn.Parameter(torch.empty(form.units, form.field, **place), requires_grad=form.live)
        self.bias = nn.Parameter(torch.empty(form.units, **place), requires_grad=form.live)
        self.out = nn.Parameter(torch.zeros(form.units, form.feeds or form.outputs, **place))
        self.register_buffer("feeds", None if form.feeds is None else _first(form.units, form.feeds, place["device"]))
        code = [list(ACTIVATIONS).index(form.activation), int(form.live), form.inputs, form.outputs]
        self.register_buffer("code", torch.tensor(code, device=place["device"]))
        self.register_load_state_dict_pre_hook(as_integers_at_work)  # type: ignore[no-untyped-call]
        self.gains: Gains | None = None

    def can_take(self, form: object, below: int) -> bool:
        """Whether it is of a form; see :meth:`Block.can_take <pl_dendrites.core.growth.block.Block.can_take>`."""
        return form == self.form

    @property
    def live(self) -> bool:
        """Whether its units learn with the network: gradient flows into them and through them into the input."""
        return self.form.live

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along: not what is being watched."""
        return {**self.__dict__, "gains": None}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        form = self.form
        feeds = "" if form.feeds is None else f", each feeds {form.feeds} of {form.outputs}"
        return (
            f"{form.units} units that see {form.field} of {form.inputs}{feeds}, {form.activation}{', live' * form.live}"
        )

    def forward(self, inputs: Inputs, out: Tensor, earlier: list[Tensor]) -> list[Tensor]:
        """Outputs of its units.

        Args:
            inputs: what the module was called with.
            out: the module's own output.
            earlier: of private dendrites; they are not looked at.

        Returns:
            One tensor, shape ``(*, M)``.

        Raises:
            ValueError: if the module has other inputs or outputs than these were made for.
        """
        x, form = features(inputs, out), self.form
        if (x.shape[-1], out.shape[-1]) != (form.inputs, form.outputs):
            raise ValueError(
                f"shared dendrites were made for {form.inputs} inputs and {form.outputs} outputs, and their module has"
                f" {x.shape[-1]} and {out.shape[-1]}"
            )
        with nullcontext() if form.live else torch.no_grad():
            dtype = x.dtype
            weight, bias = local(self.weight).to(dtype), local(self.bias).to(dtype)
            potentials = field_product(x, self.field, weight, bias)
            if self.gains is not None and potentials.requires_grad:
                potentials = self.gains.watch_field(potentials, x)
            return [ACTIVATIONS[form.activation](potentials)]

    def add_to(self, total: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the next layer sees, as far as these units and all below go.

        Args:
            total: the module's output with the signals of those below, ``(*, C)``.
            outputs: what :meth:`forward` returned.
        """
        (units,) = outputs
        weight = local(self.out).to(units.dtype)
        term = units @ (weight if self.feeds is None else spread_out(weight, self.feeds, self.form.outputs))
        if self.gains is not None and self.feeds is not None and term.requires_grad:
            term = self.gains.watch_feeds(term, units)
        return total + term.to(total.dtype)

    def for_all(self, outputs: list[Tensor], out: Tensor) -> list[Tensor]:
        """Outputs that private dendrites see: none."""
        return []

    @torch.no_grad()
    def fill(self, field: Tensor, weight: Tensor, bias: Tensor, feeds: Tensor | None = None) -> None:
        """Say what its units see, and where they start. Output weights stay zero.

        Args:
            field: shape ``(M, f)``.
            weight: shape ``(M, f)``.
            bias: shape ``(M,)``.
            feeds: shape of :attr:`feeds`.
        """
        self.field.copy_(field)
        local(self.weight).copy_(weight)
        local(self.bias).copy_(bias)
        if self.feeds is not None and feeds is not None:
            self.feeds.copy_(feeds)

    @torch.no_grad()
    def rewire(self, gains: Gains, share: float, deviation: Tensor) -> dict[nn.Parameter, Tensor]:
        """Let the weakest inputs of each field leave, and those enter, at zero, whose weights would move most.

        Outputs that units feed are such a field too.

        Args:
            gains: of the backward passes that tell.
            share: of each field that moves.
            deviation: shape ``(n,)``, of the inputs: the strength of one is its weight times that, and one that never
                varies does not enter.

        Returns:
            For each parameter that changed which of its entries start anew.
        """
        changed: dict[nn.Parameter, Tensor] = {}
        if self.form.field < self.form.inputs:
            gain = torch.where(deviation > 0, gains.field.abs(), -1.0)
            changed[self.weight] = self._move(self.field, self.weight, gain, share, deviation[self.field.long()])
        if self.feeds is not None:
            changed[self.out] = self._move(self.feeds, self.out, gains.feeds.abs(), share, 1.0)
        return changed

    @torch.no_grad()
    def see_as(self, other: SharedBlock) -> None:
        """See and feed what another block does; weights of what is new to it are zero.

        Args:
            other: one of the same form.
        """
        for own, there, weight in ((self.field, other.field, self.weight), (self.feeds, other.feeds, self.out)):
            if own is not None and there is not None:
                weight.masked_fill_(own != there, 0)
                own.copy_(there)

    def _move(self, places: Tensor, weight: nn.Parameter, gain: Tensor, share: float, size: Tensor | float) -> Tensor:
        values = local(weight)
        moved, now = exchange(places, values.detach().abs() * size, gain, share)
        places.copy_(now)
        values.masked_fill_(moved, 0)
        return moved

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a base phase trains: the output weights, and of live units all else."""
        return [self.out, self.weight, self.bias] if self.live else [self.out]


def _first(rows: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device).repeat(rows, 1)
