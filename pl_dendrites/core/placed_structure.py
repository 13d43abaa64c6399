"""What a state_dict says of a block of placed dendrites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pl_dendrites.core.claims import Claims, shape_of
from pl_dendrites.core.growth.placed_block import PlacedForm
from pl_dendrites.core.kinds import LinearConv, inputs_of, kind_of, like
from pl_dendrites.core.shared_structure import Misfit
from pl_dendrites.core.tensors import alike

__all__ = ["read_placed"]


def read_placed(layer: nn.Module, values: Mapping[str, Any]) -> PlacedForm:
    """The form of a block of placed dendrites.

    Args:
        layer: that they hang on.
        values: entries of the block.

    Raises:
        ValueError: if the layer cannot have such dendrites, or entries are missing or claim more than they hold.
        Misfit: if one is not what it must be.

    Example:
        >>> layer, form = nn.Linear(9, 3), PlacedForm(units=2, directions=4, neurons=3)
        >>> read_placed(layer, form.make(layer, kind_of(layer), 0).state_dict()) == form
        True
    """
    kind = kind_of(layer)
    if not (isinstance(kind, LinearConv) and kind.choosable):
        raise ValueError("only a Linear and a convolution without groups can have placed dendrites")
    wanted = {"nodes.weight", "nodes.bias", "weight", "out"}
    if set(values) != wanted:
        missing = sorted(wanted - set(values))
        raise ValueError(f"its dendrites are incomplete: there are {sorted(values)}, missing {missing}")
    match shape_of(values["weight"]):
        case (int(units), int(directions)) if units and directions:
            pass
        case shape:
            raise Misfit(f"weight must have a row for each unit, got {shape}")
    nodes = like(layer, inputs_of(layer), directions, 1, torch.device("meta")).state_dict()
    shapes = {f"nodes.{part}": tuple(value.shape) for part, value in nodes.items()}
    for part, expected in (shapes | {"out": (units, kind.neurons)}).items():
        if shape_of(values[part]) != expected:
            raise Misfit(f"{part} must have the shape {expected}, got {shape_of(values[part])}")
    for part, value in values.items():
        if not alike(torch.float32, value.dtype):
            raise Misfit(f"{part} must be floating point, got {value.dtype}")
    Claims().take(values.values(), "its dendrites")
    return PlacedForm(units, directions, kind.neurons)
