"""Checkpoints that are folders, of which each process wrote a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_dendrites.core.keys import is_dendrite_key
from pl_dendrites.saved.folder_index import Bytes, Stored, inside, read_index
from pl_dendrites.saved.reading import read_trainers, read_values

__all__ = ["SHARDED_KEY", "is_folder_checkpoint", "read_folder", "weights_to_fit"]

# In such a folder: all but weights and optimizer states.
_METADATA_FILE = "meta.pt"

# Whether a checkpoint's model was sharded.
SHARDED_KEY = "pl_dendrites_sharded"


def is_folder_checkpoint(path: Path) -> bool:
    """Whether a path is a folder that a strategy may have written as a checkpoint."""
    return (path / _METADATA_FILE).is_file()


def read_folder(path: Path, *, weights: bool = True, trusted: bool = False) -> dict[str, Any]:
    """A checkpoint that each process wrote a part of; optimizer states are left out.

    Args:
        path: a folder.
        weights: whether the model's weights are read.
        trusted: whether anything may be read but weights, classes and functions too, which may run code.

    Raises:
        ValueError: if it is no checkpoint, or holds anything but tensors and plain values.
    """
    if not is_folder_checkpoint(path):
        raise ValueError(f"'{path}' cannot be read as a checkpoint: it is a folder without '{_METADATA_FILE}'")
    file = inside(path, _METADATA_FILE)
    checkpoint = read_values(file, file, trusted=trusted)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"'{path}' is not a checkpoint of a Trainer: its '{_METADATA_FILE}' is no dict")
    return checkpoint | {"state_dict": _weights_of_folder(path, lambda key: True) if weights else {}}


def _weights_of_folder(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    # Of those that are not wanted only types and shapes are true.
    weights = {}
    for place, entry in read_index(path).items():
        if len(place) == 2 and place[0] == "state_dict" and isinstance(entry, Stored):  # noqa: PLR2004 - root and key
            key = str(place[1])
            weights[key] = _read(path, entry) if wanted(key) else torch.empty((), dtype=entry.dtype).expand(entry.shape)
    return weights


def _read(path: Path, entry: Stored) -> Tensor:
    whole = torch.zeros(entry.shape, dtype=entry.dtype)  # pieces that lie upon each other leave gaps
    for piece in entry.pieces:
        part = read_values(piece.data.read(), piece.data.file)
        if not isinstance(part, Tensor) or part.shape != piece.shape or part.dtype != entry.dtype:
            raise ValueError(f"'{path}' cannot be read as a checkpoint: a piece of a tensor is not what its index says")
        whole[tuple(slice(start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))] = part
    return whole


def weights_to_fit(path: Path, fitting: bool, trusted: bool = False) -> dict[str, Any]:
    """The weights of a checkpoint that a model is to have the structure for; of a folder those of dendrites alone.

    A strategy that goes on to read a folder runs what it says; it is looked through here before.

    Args:
        path: a file or a folder.
        fitting: whether training is to go on from it.
        trusted: whether anything may be read, classes and functions too, which may run code.

    Raises:
        MisconfigurationException: if training cannot go on from it with a sharded model; says why.
        ValueError: if it is no checkpoint, or holds anything but tensors and plain values.
    """
    if path.is_dir():
        if not trusted:
            for entry in read_index(path).values():
                if isinstance(entry, Bytes):
                    read_values(entry.read(), entry.file)
        return _weights_of_folder(path, is_dendrite_key)
    checkpoint = read_trainers(path, path, trusted=trusted)
    weights: dict[str, Any] = checkpoint["state_dict"]
    if fitting and any(map(is_dendrite_key, weights)) and not checkpoint.get(SHARDED_KEY):
        raise MisconfigurationException(
            f"'{path}' was saved by a fit that did not shard the model, and has optimizer states by position, which"
            " Lightning would give to other parameters here. Go on with the strategy that it was saved under."
        )
    return weights
