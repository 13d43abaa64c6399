"""What a network takes, of which some weights are zero: its parameters, and its bytes on a disk."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from pl_dendrites.controls.masks import is_mask, masks_of
from pl_dendrites.core import dendrites_state_dict
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.keys import ENTRIES, is_dendrite_key

__all__ = ["closest_width", "parameters_left", "saved_bytes"]

_WIDEST = 2**20


def parameters_left(model: nn.Module) -> int:
    """Parameters of a model, dendrites included; of weights that have a mask those that are left.

    Example:
        >>> from pl_dendrites.controls import keep_largest
        >>> layer = nn.Linear(10, 4)
        >>> keep_largest(layer, ["weight"], 6)
        >>> parameters_left(layer)
        10
    """
    return parameter_count(model) - sum(int((~mask).sum()) for mask in masks_of(model).values())


def saved_bytes(model: nn.Module) -> int:
    """What it takes to save a model: its values, and the places of those that are left of some.

    Places are what takes least: indices in the smallest type of integers, by rows or by columns, or a bit for each
    place that there is. That holds for the inputs of sparse dendrites, too. What tensors are called does not count.

    Args:
        model: any module, with dendrites or masks or without.

    Example:
        >>> from pl_dendrites.controls import keep_largest
        >>> layer = nn.Linear(1000, 4)  # a value takes four bytes
        >>> keep_largest(layer, ["weight"], 6)
        >>> saved_bytes(layer)  # ten values, six indices of two bytes, and how many each of four rows has
        60
    """
    masks = masks_of(model)
    saved = {
        value: _bytes(value)  # once, whatever names it has
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not is_dendrite_key(name) and not is_mask(name, masks)
    }
    saved |= {weight: _left(weight, masks[name]) for name, weight in model.named_parameters() if name in masks}
    grown = [value for name, value in dendrites_state_dict(model).items() if name != ENTRIES]
    return sum(saved.values()) + sum(_bytes(value) if value.is_floating_point() else _indices(value) for value in grown)


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _left(weight: Tensor, mask: Tensor) -> int:
    return int(mask.sum()) * weight.element_size() + _places(mask.flatten(1))


def _places(mask: Tensor) -> int:
    def compressed(rows: int, columns: int) -> int:
        small = 1 if columns < 2**8 else 2 if columns < 2**16 else 4
        return small * (int(mask.sum()) + rows)

    return min(compressed(*mask.shape), compressed(*mask.T.shape), math.ceil(mask.numel() / 8))


def _indices(value: Tensor) -> int:
    # Rows are sets of places, each of as many: nothing says how many these are. What has no rows is something else.
    small = _bytes(value)
    return min(small, len(value) * math.ceil((int(value.max()) + 1) / 8)) if value.ndim > 1 and small else small


def closest_width(count: Callable[[int], int], parameters: int, name: str = "wider") -> int:
    """The width whose network comes closest to so many parameters.

    Args:
        count: the parameters of a network with a width; more for a larger one.
        parameters: that are asked for.
        name: of what makes the network, for the error.

    Returns:
        A width of at least 1; of two that are equally close, the smaller one.

    Raises:
        ValueError: if no width is large enough.

    Example:
        >>> closest_width(lambda width: 43 * width + 26, 3108)
        72
    """
    high = 1
    while count(high) < parameters:
        if high >= _WIDEST:
            raise ValueError(f"`{name}` has {count(high)} parameters at a width of {high}, and is to have {parameters}")
        high *= 2
    low = high // 2 + 1 if high > 1 else 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(middle) < parameters else (low, middle)
    return min(range(max(low - 1, 1), low + 1), key=lambda width: abs(count(width) - parameters))
