"""The best network so far, and how it comes back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from pl_dendrites.core.growth.sharded import gather_weights, is_sharded, scatter_weights
from pl_dendrites.core.keys import is_dendrite_key
from pl_dendrites.core.structure import taken_whole
from pl_dendrites.saved.partial import whole_state

__all__ = ["BestModel", "has_weights", "model_weights", "on_cpu"]


def model_weights(module: pl.LightningModule) -> dict[str, Any]:
    """A copy on the CPU of all that a model has, what it leaves out of its checkpoints too.

    Of a sharded one see :func:`~pl_dendrites.core.growth.sharded.gather_weights`.
    """
    if is_sharded(module):
        return gather_weights(module)
    return on_cpu(whole_state(module))


def on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a state_dict on the CPU."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value for key, value in state.items()
    }


def has_weights(module: nn.Module, weights: Mapping[str, Any]) -> bool:
    """Whether a model has these weights, to the last bit; what else a state_dict holds is not compared.

    Args:
        module: the model, on any device.
        weights: as :func:`model_weights` returns them.
    """
    present = whole_state(module)
    return present.keys() == weights.keys() and all(
        _same(value, weights[key]) for key, value in present.items() if isinstance(value, Tensor)
    )


def _same(value: Tensor, other: Any) -> bool:
    if not isinstance(other, Tensor) or (value.shape, value.dtype) != (other.shape, other.dtype):
        return False
    value, other = value.detach().cpu(), other.cpu()
    return torch.equal(value, other) or bool(((value == other) | (value.isnan() & other.isnan())).all())


class BestModel:
    """The best network so far, in memory and, if a directory is given, in ``best.ckpt``.

    The callback's state holds it in both cases: a run that is resumed from a checkpoint older than the file must find
    the best network of that time.

    Args:
        dirpath: directory for the file.

    Attributes:
        path: the file; empty if there is none (yet).
        weights: the network, on the CPU; ``None`` if there is none (yet).
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self._dirpath = dirpath
        self.weights: dict[str, Any] | None = None
        self.path = ""

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the present network the best. A file is replaced whole or not at all."""
        self.weights = model_weights(module)
        if self._dirpath is not None:
            before, self.path = self.path, str(self._dirpath).rstrip("/") + "/best.ckpt"
            try:
                _save_whole(trainer, self.path)
            except BaseException:
                self.path = before
                raise

    def restore(self, module: pl.LightningModule) -> None:
        """Load the best network into the model, if there is one; the model grows or shrinks to fit."""
        if self.weights is not None and is_sharded(module):
            scatter_weights(module, self.weights)
        elif self.weights is not None:
            with taken_whole():
                module.load_state_dict(self.weights, strict=module.strict_loading)

    def complete(self, module: pl.LightningModule) -> None:
        """Take what a checkpoint left out from a model that was loaded from it."""
        if self.weights is not None and not is_sharded(module):
            whole, kept = whole_state(module), self.weights
            left_out = {key: value for key, value in whole.items() if not (key in kept or is_dendrite_key(key))}
            self.weights = {**kept, **on_cpu(left_out)}

    def state_dict(self) -> dict[str, Any]:
        """For the callback's state."""
        return {"weights": self.weights, "path": self.path}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.weights, self.path = state["weights"], state["path"]


def _save_whole(trainer: pl.Trainer, path: str) -> None:
    # Lightning writes a local file in the directory for temporary files and moves it. Where that is another disk the
    # move is a copy, which may end halfway; a rename within one directory is not. Stores elsewhere show no half files,
    # and a plugin that writes in its own way (say, later) answers for it.
    files, local = fsspec.core.url_to_fs(path)
    plain = type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    if not (plain and isinstance(files, LocalFileSystem)):
        trainer.save_checkpoint(path)
        return
    part = Path(f"{local}.part")
    try:
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            _replace(part, Path(local))
    except BaseException:
        if trainer.is_global_zero:  # another process that fails must not take it from this one
            _remove(part)
        raise


def _replace(part: Path, path: Path) -> None:
    old = Path(f"{path}.old")
    if part.is_dir() or path.is_dir():  # a folder takes nobody's place in one step
        _remove(old)
        if path.exists():
            path.rename(old)
    part.replace(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
