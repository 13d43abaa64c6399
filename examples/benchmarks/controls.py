"""Would another network of as many parameters, trained for as many epochs, have done as well?

A control comes in variants, of which validation data choose one. None of them knows of dendrites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol

import lightning as L
import torch
from networks import mlp
from torch import Tensor, nn
from torch.nn.utils import prune

from pl_dendrites.comparison import closest_width

# What sparse networks are cut from, and what is dropped of inputs and of hidden units.
WIDTHS = (32, 128, 512)
DROPPED = (0.0, 0.2, 0.5)
# Pruned in four rounds; the whole network and the last round are trained twice as long as those between.
LENGTHS = (2, 1, 1, 1, 2)


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
        return self.width or closest_width(lambda width: size(self.network(*[width] * depth)), self.parameters)

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
    """RigL, arXiv:1911.11134: the first layer is sparse from the start, at places that move."""
    for width in WIDTHS:
        kept = room.parameters - (room.outputs + 1) * width - room.outputs
        if 0 < kept <= room.inputs * width:
            yield f"of {width}", partial(_rewired, room, width, kept)


def _rewired(room: Room, width: int, kept: int, fit: Fit) -> nn.Module:
    net = room.network(width)
    first = net[0]
    mask = torch.zeros_like(first.weight).flatten()
    mask[torch.randperm(len(mask))[:kept]] = 1
    with torch.no_grad():
        first.weight *= math.sqrt(len(mask) / kept)  # drawn as for the inputs that a unit has left
    prune.custom_from_mask(first, "weight", mask.view_as(first.weight))
    fit(net, room.epochs, callbacks=(Rewire(first, room.epochs),))
    return net


class Rewire(L.Callback):
    """Every so many steps the weakest weights of a layer leave, and those with the largest gradient enter, at zero.

    Args:
        layer: a mask of ``torch.nn.utils.prune`` says where its weights are.
        epochs: of the fit.
        every: so many steps.
        share: of the weights, at first; it falls as a cosine.
        until: this part of the steps.
    """

    def __init__(
        self, layer: nn.Linear, epochs: int, *, every: int = 50, share: float = 0.3, until: float = 0.75
    ) -> None:
        self.layer, self.epochs, self.every, self.share, self.until = layer, epochs, every, share, until
        self._step = 0

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self._step += 1
        if self._step % self.every == 0:
            self.layer.weight.retain_grad()  # the masked one's: of all places, those that are empty too

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        done = self._step / (self.epochs * trainer.num_training_batches) / self.until
        if self._step % self.every or done >= 1:
            return
        weight, mask = self.layer.weight_orig, self.layer.weight_mask
        there = mask.bool()
        count = max(1, int(self.share / 2 * (1 + math.cos(math.pi * done)) * mask.sum()))
        weakest = weight.abs().masked_fill(~there, math.inf).flatten().topk(count, largest=False).indices
        strongest = self.layer.weight.grad.abs().masked_fill(there, -1).flatten().topk(count).indices
        mask.view(-1)[weakest] = 0
        weight *= mask
        mask.view(-1)[strongest] = 1
        for moment in ("exp_avg", "exp_avg_sq"):
            self.moments(trainer)[moment].view(-1)[weakest] = 0

    def moments(self, trainer: L.Trainer) -> dict[str, Tensor]:
        return trainer.optimizers[0].state[self.layer.weight_orig]


def pruned(room: Room, times: float = 1.0) -> Variants:
    """Cut from a trained network, the smallest weights of both layers first, and trained on after every cut."""
    for width in WIDTHS[:2]:
        net = room.network(width)
        if size(net) > room.parameters:
            yield f"from {width}", partial(_pruned, room, width, times)


def _pruned(room: Room, width: int, times: float, fit: Fit) -> nn.Module:
    net = room.network(width)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    whole = sum(layer.weight.numel() for layer in layers)
    kept = room.parameters - width - room.outputs
    ends = [round(times * room.epochs * sum(LENGTHS[: i + 1]) / sum(LENGTHS)) for i in range(len(LENGTHS))]
    fit(net, ends[0])
    left, rounds = whole, len(LENGTHS) - 1
    for cut in range(1, rounds + 1):
        next_left = int(whole * (kept / whole) ** (cut / rounds))
        weights = [(layer, "weight") for layer in layers]
        prune.global_unstructured(weights, prune.L1Unstructured, amount=left - next_left)
        left = next_left
        fit(net, ends[cut] - ends[cut - 1], rate=1.0 if cut == rounds else 0.5)
    return net


CONTROLS: dict[str, Callable[[Room], Variants]] = {
    "plain": plain,
    "plain, dropout": dropout,
    "one more hidden layer": partial(plain, depth=2),
    "sparsely trained": rewired,
    "pruned": pruned,
    "pruned, trained for longer": partial(pruned, times=3.5),
}


def size(net: nn.Module) -> int:
    """Parameters; where a mask says so, those that are left."""
    masks = sum(int((mask == 0).sum()) for name, mask in net.named_buffers() if name.endswith("_mask"))
    return sum(parameter.numel() for parameter in net.parameters()) - masks


def bytes_of(net: nn.Module) -> int:
    """What it takes to save a network: its tensors, and of a masked one the values that are left and their places."""
    total = sum(value.numel() * value.element_size() for value in net.state_dict().values())
    for name, mask in net.named_buffers():
        if name.endswith("_mask"):
            whole = mask.numel() * mask.element_size()
            total += _places(mask) - whole - int((mask == 0).sum()) * mask.element_size()
    return total


def _places(mask: Tensor) -> int:
    """Bytes of the smaller one of two forms: indices in each row and how many these are, or in each column."""

    def compressed(rows: int, columns: int) -> int:
        small = 1 if columns < 2**8 else 2 if columns < 2**16 else 4
        return small * (int(mask.sum()) + rows)

    return min(compressed(*mask.shape), compressed(*mask.T.shape))
