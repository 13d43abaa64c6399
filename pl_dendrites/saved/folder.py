"""Checkpoints that are folders, of which each process wrote a part."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pl_dendrites.core.keys import is_dendrite_key

if torch.distributed.is_available():
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

__all__ = ["SHARDED_KEY", "read_folder", "weights_to_fit"]

# In such a folder: all but weights and optimizer states.
_METADATA_FILE = "meta.pt"

# Whether a checkpoint's model was sharded.
SHARDED_KEY = "pl_dendrites_sharded"


def read_folder(path: Path) -> dict[str, Any]:
    """A checkpoint that each process wrote a part of; optimizer states are left out.

    Args:
        path: a folder.

    Raises:
        ValueError: if it is no checkpoint.
    """
    if not (path / _METADATA_FILE).is_file():
        raise ValueError(f"'{path}' cannot be read as a checkpoint: it is a folder without '{_METADATA_FILE}'")
    checkpoint: dict[str, Any] = torch.load(path / _METADATA_FILE, map_location="cpu", weights_only=True)
    return checkpoint | {"state_dict": _weights_of_folder(path, lambda key: True)}


def _weights_of_folder(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    # Of those that are not wanted only types and shapes are true.
    metadata = FileSystemReader(path).read_metadata()
    places = {place: flat for flat, place in (metadata.planner_data or {}).items()}
    read, shapes = {}, {}
    for (root, *rest), flat in places.items():
        entry = metadata.state_dict_metadata[flat]
        if root == "state_dict" and len(rest) == 1 and isinstance(entry, TensorStorageMetadata):
            key, dtype = rest[0], entry.properties.dtype
            if wanted(key):
                read[key] = torch.empty(entry.size, dtype=dtype)
            else:
                shapes[key] = torch.empty((), dtype=dtype).expand(entry.size)
    with warnings.catch_warnings():  # of there being one process
        warnings.simplefilter("ignore")
        load({"state_dict": read}, checkpoint_id=path)
    return shapes | read


def weights_to_fit(path: Path, fitting: bool) -> dict[str, Any]:
    """The weights of a checkpoint that a model is to have the structure for; of a folder those of dendrites alone.

    Args:
        path: a file or a folder.
        fitting: whether training is to go on from it.

    Raises:
        MisconfigurationException: if training cannot go on from it with a sharded model; says why.
    """
    if path.is_dir():
        return _weights_of_folder(path, is_dendrite_key)
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    weights: dict[str, Any] = checkpoint["state_dict"]
    if fitting and any(map(is_dendrite_key, weights)) and not checkpoint.get(SHARDED_KEY):
        raise MisconfigurationException(
            f"'{path}' was saved by a fit that did not shard the model, and has optimizer states by position, which"
            " Lightning would give to other parameters here. Go on with the strategy that it was saved under."
        )
    return weights
