"""Drawing fields, and the weights that units start with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pl_dendrites.core.fields.sample import ErrorSample

__all__ = ["clustered", "drawn_weights"]

# Seeds whose products with all inputs are formed at once: never n x n.
_AT_ONCE = 256


def clustered(sample: ErrorSample, units: int, size: int, generator: torch.Generator) -> Tensor:
    """Fields of a seed and the inputs that correlate most with it.

    Seeds are drawn by the square of their correlation with the error, and by a third of the chance by how much they
    vary, so that none is out of reach.

    Args:
        sample: inputs and errors.
        units: how many fields, ``M``.
        size: inputs of each, ``f``.
        generator: a generator on the CPU.

    Returns:
        Shape ``(M, f)``, on the device of the sample.

    Example:
        >>> x = torch.randn(500, 3).repeat_interleave(2, 1)  # three pairs of twins
        >>> sample = ErrorSample(x, x[:, :1])
        >>> fields = clustered(sample, units=8, size=2, generator=torch.Generator())
        >>> bool((fields.sort(1).values.diff() == 1).all())
        True
    """
    chance = sample.correlation.square().sum(1)
    chance = chance / chance.sum().clamp(min=1e-30)
    spread = sample.deviation * sample.varies
    chance = (chance + spread / spread.sum().clamp(min=1e-30) / 2).double().cpu()
    if not bool(chance.sum() > 0):
        chance = torch.ones_like(chance)
    seeds = torch.multinomial(chance, units, replacement=True, generator=generator).to(sample.inputs.device)
    fields = []
    for some in seeds.split(_AT_ONCE):
        alike = sample.alike(some)
        alike[torch.arange(len(some)), some] = 2  # itself first, whatever the rounding
        fields.append(alike.topk(size, 1).indices)
    return torch.cat(fields)


def drawn_weights(units: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""Weights ``(M, f)`` and biases ``(M,)`` as PyTorch draws those of a Linear: uniformly from :math:`\pm 1/\sqrt f`.

    Args:
        units: how many, ``M``.
        size: inputs of each, ``f``.
        generator: a generator on the CPU.
    """
    bound = 1 / math.sqrt(size)
    weight, bias = torch.empty(units, size, device="cpu"), torch.empty(units, device="cpu")
    return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)
