"""Finding a set of units in samples of inputs and errors: candidates are drawn, the best of them chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.fields.choose import choose_units
from pl_dendrites.core.fields.draw import clustered, drawn_weights
from pl_dendrites.core.fields.product import field_product
from pl_dendrites.core.fields.sample import ErrorSample

__all__ = ["Found", "find_units"]

# A choice keeps the outputs of all candidates, and looks at each as often as it takes one.
_MOST_CANDIDATES = 4096
_AT_ONCE = 256


class Found(NamedTuple):
    """Units to be.

    Attributes:
        field: shape ``(M, f)``, the inputs that each sees.
        weight: shape ``(M, f)``, where they start.
        bias: shape ``(M,)``.
        feeds: shape ``(M, g)``, the outputs that each would take most from.
        worth: shape ``(M,)``, what each takes of the error beside those before it, as a share of its square; 0 of units
            that were not chosen but fill up the set.
    """

    field: Tensor
    weight: Tensor
    bias: Tensor
    feeds: Tensor
    worth: Tensor


@torch.no_grad()
def find_units(
    sample: ErrorSample,
    units: int,
    field: int,
    feeds: int,
    activation: str,
    *,
    pool: int = 1,
    seed: int = 0,
) -> Found:
    """Draw ``pool`` times as many candidates as there are to be units, up to 4,096, and choose among them.

    Args:
        sample: inputs and errors.
        units: how many there are to be, ``M``.
        field: inputs of each, ``f``.
        feeds: outputs that each is to feed, ``g``.
        activation: name of their activation.
        pool: candidates for each.
        seed: what is drawn follows from it.

    Example:
        >>> x = torch.randn(300, 6)
        >>> sample = ErrorSample(x, (x[:, 4] * 2).relu()[:, None])
        >>> find_units(sample, units=1, field=1, feeds=1, activation="relu", pool=40).field.tolist()
        [[4]]
    """
    generator = torch.Generator().manual_seed(seed)
    candidates = max(units, min(units * pool, _MOST_CANDIDATES))
    fields = clustered(sample, candidates, field, generator)
    weight, bias = (drawn.to(sample.inputs) for drawn in drawn_weights(candidates, field, generator))
    potentials = [
        field_product(sample.inputs, *some)  # some at a time: inputs may be fetched for each
        for some in zip(*(tensor.split(_AT_ONCE) for tensor in (fields, weight, bias)), strict=True)
    ]
    outputs = ACTIVATIONS[activation](torch.cat(potentials, 1))
    chosen, worth = choose_units(outputs, sample.errors, units if candidates <= _MOST_CANDIDATES else 0)
    rest = torch.ones(candidates, dtype=torch.bool, device=chosen.device)
    rest[chosen] = False
    chosen = torch.cat([chosen, rest.nonzero()[:, 0]])[:units]
    towards = (sample.errors.T @ outputs[:, chosen]).T.abs().topk(feeds, 1).indices
    worth = torch.cat([worth, worth.new_zeros(units - len(worth))])
    return Found(fields[chosen], weight[chosen], bias[chosen], towards, worth)
