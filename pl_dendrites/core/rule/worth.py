"""Which neurons a set of dendrites is worth its parameters to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pl_dendrites.core.rule.correlation import pearson
from pl_dendrites.core.rule.moments import Moments

__all__ = ["Offer", "choose_neurons", "worth_of"]


class Offer(NamedTuple):
    """What dendrites on one layer would bring, and cost.

    Attributes:
        worth: shape ``(C,)``, see :func:`worth_of`.
        parameters: of one neuron's dendrite.
        together: whether all of the layer's neurons get one or none does.
    """

    worth: Tensor
    parameters: float
    together: bool


def worth_of(moments: Moments, inputs: int) -> Tensor:
    r"""What the best candidate of each neuron takes off the squared error, in the mean over samples.

    .. math:: w_c = \max_p \bar r_{p,c}^2 \operatorname{var}(E_c), \qquad
              \bar r^2 = 1 - (1 - r^2) \frac{N - 1}{N - n - 1}

    A dendrite with unit variance and output weight ``a`` has the gradient :math:`dL/da` whose square this is, but that
    ``r`` is adjusted: ``n`` weights learn to correlate with ``N`` samples even where there is nothing to learn
    (Ezekiel, 1930).

    Args:
        moments: over ``N`` samples of the pool's outputs and the errors.
        inputs: weights of a candidate, ``n``.

    Returns:
        Shape ``(C,)``, not negative.

    Example:
        >>> from pl_dendrites.core.rule.moments import batch_moments
        >>> error = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(50, 1)
        >>> outputs = torch.stack([error[:, 0], torch.zeros(100)], 1)[None]
        >>> worth_of(batch_moments(outputs, error, dim=-1)[0], inputs=4)
        tensor([1., 0.])
    """
    square = pearson(moments).square().amax(0)
    left = (moments.samples - inputs - 1).clamp(min=1)
    adjusted = 1 - (1 - square) * (moments.samples - 1).clamp(min=1) / left
    return (adjusted * moments.square_error / moments.samples.clamp(min=1)).clamp(min=0)


def choose_neurons(offers: Mapping[str, Offer], share: float) -> dict[str, Tensor]:
    """The neurons that are worth most for each parameter, of all layers.

    Args:
        offers: by layer name.
        share: of the parameters that a dendrite on every neuron would have, how much the chosen ones may take. One
            neuron, or one layer whose neurons get theirs together, is chosen in any case.

    Returns:
        Ascending neurons of each layer where any was chosen.

    Example:
        >>> worth = torch.tensor([0.1, 0.9, 0.5, 0.0])
        >>> choose_neurons({"a": Offer(worth, 5, False), "b": Offer(2 * worth, 20, False)}, share=0.1)
        {'a': tensor([1, 2])}
    """
    budget = share * sum(offer.parameters * len(offer.worth) for offer in offers.values())
    units: list[tuple[float, str, int, float]] = []  # worth for each parameter, layer, neuron (-1: all), parameters
    for name, (worth, parameters, together) in offers.items():
        if together:
            units.append((float(worth.mean()) / parameters, name, -1, parameters * len(worth)))
        else:
            units += [(value / parameters, name, c, parameters) for c, value in enumerate(worth.tolist())]
    chosen: dict[str, list[int]] = {}
    for value, name, neuron, parameters in sorted(units, key=lambda unit: -unit[0]):
        if chosen and (parameters > budget or value <= 0):
            break
        budget -= parameters
        chosen[name] = [*chosen.get(name, []), *(range(len(offers[name].worth)) if neuron < 0 else [neuron])]
    return {name: torch.tensor(sorted(neurons), device="cpu") for name, neurons in chosen.items()}
