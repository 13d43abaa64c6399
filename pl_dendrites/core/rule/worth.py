"""Which neurons a set of dendrites is worth its parameters to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pl_dendrites.core.rule.correlation import pearson
from pl_dendrites.core.rule.moments import Moments

__all__ = ["Offer", "choose_neurons", "choose_share", "worth_of"]


class Offer(NamedTuple):
    """What dendrites on one layer would bring, and cost.

    Attributes:
        worth: shape ``(C,)``, see :func:`worth_of`.
        parameters: of one neuron's dendrite.
        together: whether all of the layer's neurons get one or none does.
        seen: shape ``(C,)``, the same without the adjustment: decides where nothing is worth anything, for want of
            samples; ``None``: nothing does.
    """

    worth: Tensor
    parameters: float
    together: bool
    seen: Tensor | None = None


def worth_of(moments: Moments, inputs: int) -> Tensor:
    r"""The squared gradient, over all samples, of the output weight that a neuron's best candidate would get.

    .. math:: w_c = \max_p \bar r_{p,c}^2 \, N \sum_s (E_{s,c} - \bar E_c)^2, \qquad
              \bar r^2 = 1 - (1 - r^2) \frac{N - 1}{N - n - 1}

    A dendrite with unit variance and output weight ``a`` has :math:`\partial L / \partial a = \sum_s D_s E_s`, whose
    square this is, but that ``r`` is adjusted: ``n`` weights learn to correlate with ``N`` samples even where there is
    nothing to learn (Ezekiel, 1930). It is a sum over samples, squared: one weight of a convolution serves all
    positions of a map.

    Args:
        moments: over ``N`` samples of the pool's outputs and the errors.
        inputs: weights of a candidate, ``n``; 0: nothing is adjusted.

    Returns:
        Shape ``(C,)``, not negative.

    Example:
        >>> from pl_dendrites.core.rule.moments import batch_moments
        >>> error = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(50, 1)
        >>> outputs = torch.stack([error[:, 0], torch.zeros(100)], 1)[None]
        >>> worth_of(batch_moments(outputs, error, dim=-1)[0], inputs=4)
        tensor([10000.,     0.])
    """
    square = pearson(moments).square().amax(0)
    left = (moments.samples - inputs - 1).clamp(min=1)
    adjusted = 1 - (1 - square) * (moments.samples - 1).clamp(min=1) / left
    return (adjusted * moments.square_error * moments.samples).clamp(min=0)


def choose_neurons(offers: Mapping[str, Offer], budget: float) -> dict[str, Tensor]:
    """The neurons that are worth most for each parameter, of all layers.

    One that is worth more than another and does not fit into what is left of the parameters is passed over.

    Args:
        offers: by layer name.
        budget: how many parameters the chosen ones may take. One neuron, or one layer whose neurons get theirs
            together, is chosen in any case.

    Returns:
        Ascending neurons of each layer where any was chosen.

    Example:
        >>> worth = torch.tensor([0.1, 0.9, 0.5, 0.0])
        >>> choose_neurons({"a": Offer(worth, 5, False), "b": Offer(2 * worth, 20, False)}, budget=10)
        {'a': tensor([1, 2])}
    """
    units = [unit for name, offer in offers.items() for unit in _units(name, offer)]
    chosen: dict[str, list[int]] = {}
    for unit in sorted(units, key=lambda unit: (-unit.worth, -unit.seen)):
        if chosen and (unit.parameters > budget or unit.worth <= 0):
            continue
        budget -= unit.parameters
        chosen[unit.layer] = [*chosen.get(unit.layer, []), *unit.neurons]
    return {name: torch.tensor(sorted(neurons), device="cpu") for name, neurons in chosen.items()}


def choose_share(offers: Mapping[str, Offer], share: float) -> dict[str, Tensor]:
    """The same within a share of the parameters that a dendrite on every neuron would have.

    Args:
        offers: by layer name.
        share: above 0 and at most 1.
    """
    return choose_neurons(offers, share * sum(offer.parameters * len(offer.worth) for offer in offers.values()))


class _Unit(NamedTuple):
    # Neurons that get their dendrites together, and what these are worth for each parameter.
    worth: float
    seen: float
    layer: str
    neurons: Sequence[int]
    parameters: float


def _units(name: str, offer: Offer) -> list[_Unit]:
    cost, every = offer.parameters, range(len(offer.worth))
    seen = torch.zeros_like(offer.worth) if offer.seen is None else offer.seen
    if offer.together:
        return [_Unit(float(offer.worth.mean()) / cost, float(seen.mean()) / cost, name, every, cost * len(every))]
    pairs = zip((offer.worth / cost).tolist(), (seen / cost).tolist(), strict=True)
    return [_Unit(worth, found, name, [c], cost) for c, (worth, found) in enumerate(pairs)]
