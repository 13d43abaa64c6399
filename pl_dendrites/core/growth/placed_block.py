"""Placed dendrites: of a layer that does not learn, units that see its inputs along a few directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pl_dendrites.core.kinds import Inputs, LayerKind, LinearConv, inputs_of, like, run_like, weight_of

__all__ = ["PlacedBlock", "PlacedForm"]


@dataclass(frozen=True)
class PlacedForm:
    """What a block of placed dendrites looks like.

    Attributes:
        units: how many, ``M``.
        directions: along which they see the layer's inputs, ``K``.
        neurons: of the layer, ``C``.
    """

    units: int
    directions: int
    neurons: int

    count: ClassVar[int] = 0  # of private dendrites per neuron

    def make(self, layer: nn.Module, kind: LayerKind, below: int) -> PlacedBlock:
        """A block of this form, see :class:`PlacedBlock`; how many private dendrites there are is nothing to it."""
        return PlacedBlock(layer, kind, self)

    @property
    def parameters(self) -> int:
        """Numbers that are learned: of each unit its weights and its output weights.

        Example:
            >>> PlacedForm(units=2, directions=32, neurons=10).parameters
            84
        """
        return self.units * (self.directions + self.neurons)


class PlacedBlock(nn.Module):
    r"""Placed dendrites at work as one module.

    .. math:: out_c = layer(x)_c + \sum_m A_{c,m} \sum_k V_{m,k}\, (q_k \cdot x)

    The directions :math:`q` are found once and stay. Of a convolution each is a kernel. No gradient flows through a
    dendrite into its input.

    Args:
        layer: a Linear or a convolution without groups; it is read, not kept.
        kind: the view that dendrites have of it.
        form: what to make. Values are undefined but for output weights, which are zero.

    Attributes:
        form: what it looks like.
        nodes: a layer of the same type, whose ``K`` outputs are the inputs along each direction.
        weight: shape ``(M, K)``, :math:`V`.
        out: shape ``(M, C)``, :math:`A`.

    Raises:
        ValueError: if the layer is of another type, or has groups.
    """

    live: ClassVar[bool] = False  # no gradient flows through it into its input

    def __init__(self, layer: nn.Module, kind: LayerKind, form: PlacedForm) -> None:
        super().__init__()
        if not (isinstance(kind, LinearConv) and kind.choosable):
            raise ValueError("only a Linear and a convolution without groups can have placed dendrites")
        self.form, self.kind = form, kind
        reference = weight_of(layer)
        place: dict[str, Any] = {"device": reference.device, "dtype": reference.dtype}
        nodes = like(layer, inputs_of(layer), form.directions, 1, reference.device)
        self.nodes = nodes.requires_grad_(False)
        self.weight = nn.Parameter(torch.empty(form.units, form.directions, **place))
        self.out = nn.Parameter(torch.zeros(form.units, form.neurons, **place))

    def can_take(self, form: object, below: int) -> bool:
        """Whether it is of a form; see :meth:`Block.can_take <pl_dendrites.core.growth.block.Block.can_take>`."""
        return form == self.form

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.form.units} placed units that see {self.form.directions} directions"

    def forward(self, inputs: Inputs, out: Tensor, earlier: list[Tensor]) -> list[Tensor]:
        """Outputs of its units.

        Args:
            inputs: what the layer was called with.
            out: the layer's own output.
            earlier: of private dendrites; they are not looked at.

        Returns:
            One tensor, shape of ``out``, but ``M`` in the place of ``C``.
        """
        seen = run_like(self.nodes, self.kind.input_of(inputs, live=False), out)
        return [_product(seen, self.weight, self.kind.dim)]

    def add_to(self, total: Tensor, outputs: list[Tensor]) -> Tensor:
        """What the next layer sees, as far as these units and all below go.

        Args:
            total: the layer's output with the signals of those below, ``(*, C, *)``.
            outputs: what :meth:`forward` returned.
        """
        (units,) = outputs
        return total + _product(units, self.out.T, self.kind.dim).to(total.dtype)

    def for_all(self, outputs: list[Tensor], out: Tensor) -> list[Tensor]:
        """Outputs that private dendrites see: none."""
        return []

    @torch.no_grad()
    def place(self, directions: Tensor) -> None:
        """Say what its units see: each begins along one direction. Output weights stay zero.

        Args:
            directions: shape ``(K, n, *kernel)``.
        """
        for parameter in self.nodes.parameters():
            parameter.zero_()
        self.kernels.copy_(directions)
        nn.init.eye_(self.weight)

    @property
    def kernels(self) -> Tensor:
        """The directions, a view of shape ``(K, n, *kernel)``."""
        return LinearConv(self.nodes).by_neuron(self.nodes, "weight")[0].detach()

    @property
    def difference(self) -> Tensor:
        """What they add to the layer's weight, shape ``(C, n, *kernel)``."""
        kernels = self.kernels
        rows = self.out.detach().T @ self.weight.detach() @ kernels.flatten(1)
        return rows.view(-1, *kernels.shape[1:])

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a base phase trains."""
        return [self.out, self.weight]


def _product(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    # Of a weight (outputs, inputs), with inputs along a dimension counted from the end.
    weight = weight.to(x.dtype)
    if dim == -1:
        return x @ weight.T
    product = weight @ x.flatten(dim + 1)
    return product.view(*product.shape[:-1], *x.shape[dim + 1 :])
