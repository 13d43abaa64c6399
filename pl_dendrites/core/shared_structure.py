"""What a state_dict says of a block of shared dendrites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.claims import Claims, shape_of
from pl_dendrites.core.growth.shared_block import SharedForm
from pl_dendrites.core.tensors import alike

__all__ = ["Misfit", "read_shared"]


class Misfit(Exception):
    """An entry of a block is not what it must be; says which and why."""


def read_shared(values: Mapping[str, Any], outputs: int | None = None) -> SharedForm:
    """The form of a block of shared dendrites.

    Args:
        values: its entries.
        outputs: of the module that it hangs around; ``None``: not known.

    Raises:
        ValueError: if entries are missing or claim more than they hold.
        Misfit: if one is not what it must be.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core.kinds import kind_of
        >>> layer, form = nn.Linear(9, 3), SharedForm(units=4, inputs=9, outputs=3, field=2)
        >>> read_shared(form.make(layer, kind_of(layer), 0).state_dict()) == form
        True
    """
    wanted = {"field", "weight", "bias", "out", "code"} | {"feeds"} & set(values)
    if set(values) != wanted:
        missing = sorted(wanted - set(values))
        raise ValueError(f"its dendrites are incomplete: there are {sorted(values)}, missing {missing}")
    (units, field), (_, feeds) = _matrix(values, "field"), _matrix(values, "out")
    shapes = {"weight": (units, field), "bias": (units,), "out": (units, feeds), "code": (4,)}
    for part, expected in (shapes | ({"feeds": (units, feeds)} if "feeds" in values else {})).items():
        if shape_of(values[part]) != expected:
            raise Misfit(f"{part} must have the shape {expected}, got {shape_of(values[part])}")
        floating = part in ("weight", "bias", "out")
        if not alike(torch.float32 if floating else torch.int64, values[part].dtype):
            raise Misfit(f"{part} must be {'floating point' if floating else 'integers'}, got {values[part].dtype}")
    Claims().take(values.values(), "its dendrites")
    activation, live, inputs, size = values["code"].tolist()
    if not (0 <= activation < len(ACTIVATIONS) and live in (0, 1) and inputs >= field and size >= feeds >= 1):
        raise Misfit(f"code must say which activation, 0 or 1, and how many inputs and outputs, got {values['code']}")
    if outputs is not None and size != outputs:
        raise Misfit(f"code must say that there are {outputs} outputs, got {size}")
    if "feeds" not in values and feeds != size:
        raise Misfit(f"out must have a column for each of {size} outputs, got {feeds}")
    _check_places(values, "field", inputs)
    if "feeds" in values:
        _check_places(values, "feeds", size)
    return SharedForm.of(values)


def _matrix(values: Mapping[str, Any], part: str) -> tuple[int, int]:
    match shape_of(values[part]):
        case (int(rows), int(columns)) if rows and columns:
            return rows, columns
        case shape:
            raise Misfit(f"{part} must have a row for each unit, got {shape}")


def _check_places(values: Mapping[str, Any], part: str, bound: int) -> None:
    places = values[part]
    if int(places.min()) < 0 or int(places.max()) >= bound:
        raise Misfit(f"{part} must hold integers below {bound}, got {int(places.min())} to {int(places.max())}")
    if not bool((places.sort(1).values.diff() > 0).all()):
        raise Misfit(f"{part} must have different ones in each row")
