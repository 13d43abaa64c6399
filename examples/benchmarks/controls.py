"""Would another network of as many parameters, trained for as many epochs, have done as well?

A control comes in variants, of which validation data choose one. None of them knows of dendrites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Protocol

import lightning as L
from networks import mlp
from torch import nn

from pl_dendrites.controls import closest_width, parameters_left, pruned, sparse

# What sparse networks are cut from, and what is dropped of inputs and of hidden units.
WIDTHS = (32, 128, 512)
DROPPED = (0.0, 0.2, 0.5)
# Factors of the learning rate: of the whole network, between cuts, and after the last one.
RATES = (1.0, 0.5, 0.5, 0.5, 1.0)


class Fit(Protocol):
    """Trains a network and leaves it at its best weights, by its score on validation data."""

    def __call__(
        self, net: nn.Module, epochs: int, *, rate: float = 1.0, callbacks: tuple[L.Callback, ...] = ()
    ) -> None:
        """``rate`` is a factor of the task's learning rate."""


@dataclass(frozen=True)
class Room:
    """What a control is to be like.

    Attributes:
        inputs: of the network.
        outputs: of the network.
        epochs: that it is trained for.
        parameters: that it has, about; of a sparse network those that are not zero.
        width: of its hidden layer, where that is given instead.
    """

    inputs: int
    outputs: int
    epochs: int
    parameters: int = 0
    width: int = 0

    def widest(self, depth: int = 1) -> int:
        """The width of so many hidden layers that comes closest to the parameters."""

        def count(width: int) -> int:
            return parameters_left(self.network(*[width] * depth))

        return self.width or closest_width(count, self.parameters)

    def network(self, *hidden: int) -> nn.Sequential:
        return mlp(self.inputs, *hidden, self.outputs)


Variants = Iterator[tuple[str, Callable[[Fit], nn.Module]]]


def plain(room: Room, depth: int = 1) -> Variants:
    width = room.widest(depth)
    yield " x ".join([str(width)] * depth), partial(_whole, room, [width] * depth, 0, 0)


def dropout(room: Room) -> Variants:
    width = room.widest()
    for inputs, units in product(DROPPED, repeat=2):
        yield f"{width}, inputs {inputs}, units {units}", partial(_whole, room, [width], inputs, units)


def _whole(room: Room, hidden: list[int], inputs: float, units: float, fit: Fit) -> nn.Module:
    net = room.network(*hidden)
    if inputs or units:
        first, *others = net
        net = nn.Sequential(nn.Dropout(inputs), first, *others[:-1], nn.Dropout(units), others[-1])
    fit(net, room.epochs)
    return net


def rewired(room: Room) -> Variants:
    """RigL, arXiv:1911.11134, of the first layer; the second one is small."""
    for width in WIDTHS:
        kept = room.parameters - (room.outputs + 1) * width - room.outputs
        if 0 < kept <= room.inputs * width:
            yield f"of {width}", partial(_rewired, room, width)


def _rewired(room: Room, width: int, fit: Fit) -> nn.Module:
    net = room.network(width)
    for stage in sparse(net, room.parameters, room.epochs, ["0.weight"]):
        fit(net, stage.epochs, callbacks=stage.callbacks)
    return net


def cut(room: Room, times: float = 1.0) -> Variants:
    """Pruned, the smallest weights of both layers first; trained for longer where ``times`` says so."""
    for width in WIDTHS[:2]:
        if parameters_left(room.network(width)) > room.parameters:
            yield f"from {width}", partial(_cut, room, width, times)


def _cut(room: Room, width: int, times: float, fit: Fit) -> nn.Module:
    net = room.network(width)
    for rate, stage in zip(RATES, pruned(net, room.parameters, round(times * room.epochs)), strict=False):
        fit(net, stage.epochs, rate=rate, callbacks=stage.callbacks)
    return net


CONTROLS: dict[str, Callable[[Room], Variants]] = {
    "plain": plain,
    "plain, dropout": dropout,
    "one more hidden layer": partial(plain, depth=2),
    "sparsely trained": rewired,
    "pruned": cut,
    "pruned, trained for longer": partial(cut, times=3.5),
}
