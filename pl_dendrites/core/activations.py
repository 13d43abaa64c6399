"""What a dendrite does with its sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "UNBOUNDED", "sharp_gelu"]


def sharp_gelu(x: Tensor) -> Tensor:
    r"""GELU with half the deviation, :math:`x\,\Phi(2x)` (Hendrycks & Gimpel, arXiv:1606.08415), between GELU and ReLU.

    Where inputs are small and mostly zero, as in fingerprints and bags of words, GELU is nearly straight.

    Args:
        x: of any shape.
    """
    return F.gelu(2 * x) / 2


# The position of a name in this table is what a state_dict stores: append, never reorder.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sharp_gelu": sharp_gelu,
}
# Of these the covariance makes outputs ever larger, so that their size says nothing.
UNBOUNDED = ("relu", "gelu", "sharp_gelu")
