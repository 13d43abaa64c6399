"""What a dendrite does with its sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "FUNCTIONS", "UNBOUNDED", "linear", "sharp_gelu"]


def sharp_gelu(x: Tensor) -> Tensor:
    r"""GELU with half the deviation, :math:`x\,\Phi(2x)` (Hendrycks & Gimpel, arXiv:1606.08415), between GELU and ReLU.

    Where inputs are small and mostly zero, as in fingerprints and bags of words, GELU is nearly straight.

    Args:
        x: of any shape.
    """
    return F.gelu(2 * x) / 2


def linear(x: Tensor) -> Tensor:
    """The sum itself: of placed dendrites, whose synapses are further ones of their neuron.

    Args:
        x: of any shape.
    """
    return x


# The position of a name in this table is what a state_dict stores: append, never reorder.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
    "sharp_gelu": sharp_gelu,
    "linear": linear,
}
# Those that are to be had by name: a linear dendrite that sees all inputs does nothing that its neuron could not.
ACTIVATIONS = {name: function for name, function in FUNCTIONS.items() if name != "linear"}
# Of these the covariance makes outputs ever larger, so that their size says nothing.
UNBOUNDED = ("relu", "gelu", "sharp_gelu")
