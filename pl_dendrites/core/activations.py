"""What a dendrite does with its sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "UNBOUNDED"]

# The position of a name in this table is what a state_dict stores: append, never reorder.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
}
# Of these the covariance makes outputs ever larger, so that their size says nothing.
UNBOUNDED = ("relu", "gelu")
