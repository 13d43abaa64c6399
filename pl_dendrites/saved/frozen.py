"""Copies of what is frozen: in a file that nobody else sees, for what does not train seldom changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import torch
from torch import Tensor, nn

from pl_dendrites.core.keys import is_dendrite_key

__all__ = ["frozen_names", "in_file"]

# Bytes below which memory is cheaper than a file.
_LEAST = 2**24


def frozen_names(model: nn.Module) -> set[str]:
    """The parameters that do not train now, those of dendrites aside, by all of their names.

    Args:
        model: the model.

    Example:
        >>> sorted(frozen_names(nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))))
        ['0.bias', '0.weight']
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if not (p.requires_grad or is_dendrite_key(name))}


def in_file(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that take no memory: the system reads their pages when they are looked at, and lets go of them.

    They are as good as any others, whatever becomes of the values: a page that is written to is in memory from then on,
    and the file stays as it is. It is in the directory for temporary files, has no name any more and goes with the
    last copy, or with the process.

    Args:
        values: plain tensors on any device.

    Returns:
        The copies, on the CPU. None where there are less than 16 MiB, where the disk would be more than half full of
        what is free, or where a file in use cannot be deleted (Windows).

    Example:
        >>> values = {"big": torch.ones(2**22), "small": torch.ones(1)}
        >>> copies = in_file(values)
        >>> values["big"].zero_()[:2], copies["big"][:2]
        (tensor([0., 0.]), tensor([1., 1.]))
        >>> in_file({"small": torch.ones(2)})
        {}
    """
    size = sum(value.nbytes for value in values.values())
    if size < _LEAST or os.name != "posix":
        return {}
    try:
        if 2 * size > shutil.disk_usage(gettempdir()).free:
            return {}
        with TemporaryDirectory() as folder:
            file = Path(folder) / "frozen.pt"
            torch.save({name: value.detach() for name, value in values.items()}, file)
            copies: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            return copies
    except (OSError, RuntimeError):  # of a full disk, PyTorch raises the latter
        return {}
