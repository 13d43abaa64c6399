"""What a set of shared dendrites to come is like."""

from __future__ import annotations

from dataclasses import dataclass

from pl_dendrites.core.checks import check_at_least
from pl_dendrites.core.growth.block import check_form
from pl_dendrites.core.growth.shared_block import SharedForm

__all__ = ["UnitSet"]


@dataclass(frozen=True)
class UnitSet:
    """What a set of shared dendrites to come is like.

    Attributes:
        units: how many; ``None``: what :meth:`SharedNetwork.set_next
            <pl_dendrites.core.SharedNetwork.set_next>` says of parameters.
        field: inputs that each sees, a number or a share; all, where there are no more.
        feeds: outputs that each feeds, those that it would take most from; ``None``, or where there are no more: all.
        activation: a name in ``ACTIVATIONS``.
        live: whether they go on learning with the network, by gradient; if not, their output weights alone do.

    Raises:
        ValueError: if one of them is not possible.
    """

    units: int | None = None
    field: int | float = 32
    feeds: int | None = 16
    activation: str = "sharp_gelu"
    live: bool = True

    def __post_init__(self) -> None:
        check_form(self.activation, self.field)
        for name in ("units", "feeds"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)

    def unit(self, inputs: int, outputs: int) -> SharedForm:
        """One unit of it around a module of so many inputs and outputs.

        Example:
            >>> UnitSet(field=0.5, feeds=9).unit(inputs=8, outputs=3)
            SharedForm(units=1, inputs=8, outputs=3, field=4, feeds=None, activation='sharp_gelu', live=True)
        """
        feeds = None if self.feeds is None or self.feeds >= outputs else self.feeds
        size = self.field if isinstance(self.field, int) else max(1, round(self.field * inputs))
        return SharedForm(1, inputs, outputs, min(size, inputs), feeds, self.activation, self.live)
