"""What is kept and how it comes back: the best network, and grown models from files."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from pl_dendrites.core.network import restore_structure
from pl_dendrites.core.structure import is_dendrite_key
from pl_dendrites.sharding import gather_weights, is_sharded, read_folder, scatter_weights

__all__ = ["BestModel", "load_from_checkpoint", "model_weights", "read_checkpoint"]

ModelT = TypeVar("ModelT", bound=pl.LightningModule)


def model_weights(module: pl.LightningModule) -> dict[str, Any]:
    """A copy on the CPU of what a checkpoint holds of a model; of a sharded one, see :mod:`pl_dendrites.sharding`."""
    if is_sharded(module):
        return gather_weights(module)
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in module.state_dict().items()
    }


class BestModel:
    """The best network so far, in memory and, if a directory is given, in ``best.ckpt``.

    The callback's state holds it in both cases: a run that is resumed from a checkpoint older than the file must find
    the best network of that time.

    Args:
        dirpath: directory for the file.

    Attributes:
        path: the file; empty if there is none (yet).
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self._dirpath = dirpath
        self._weights: dict[str, Any] | None = None
        self.path = ""

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the present network the best. A file is replaced whole or not at all."""
        self._weights = model_weights(module)
        if self._dirpath is not None:
            before, self.path = self.path, str(self._dirpath).rstrip("/") + "/best.ckpt"
            try:
                _save_whole(trainer, self.path)
            except BaseException:
                self.path = before
                raise

    def restore(self, module: pl.LightningModule) -> None:
        """Load the best network into the model, if there is one; the model grows or shrinks to fit."""
        if self._weights is not None and is_sharded(module):
            scatter_weights(module, self._weights)
        elif self._weights is not None:
            module.load_state_dict(self._weights, strict=module.strict_loading)

    def state_dict(self) -> dict[str, Any]:
        """For the callback's state."""
        return {"weights": self._weights, "path": self.path}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._weights, self.path = state["weights"], state["path"]


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


def read_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """A checkpoint of a Trainer; only tensors and plain values are read.

    Args:
        path: a file, local or at any address that ``fsspec`` opens, or a local folder.
        map_location: as for ``torch.load``.

    Raises:
        ValueError: if the file is no whole checkpoint.
    """
    if Path(path).is_dir():
        return read_folder(Path(path))
    with fsspec.open(str(path), "rb") as file:
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"'{path}' cannot be read as a checkpoint: {error or 'it is empty'}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"'{path}' is not a checkpoint of a Trainer: it has no state_dict")
    return checkpoint


def load_from_checkpoint(model_class: type[ModelT], path: str | Path, **kwargs: Any) -> ModelT:
    """Load a grown LightningModule, with no Trainer and no callback at hand.

    ``ModelClass.load_from_checkpoint`` alone refuses the dendrites' entries, or drops them silently if told
    ``strict=False``.

    Args:
        model_class: the user's class.
        path: a checkpoint that a Trainer with a ``DendriteCallback`` wrote, at any time: a file, local or at any
            address that ``fsspec`` opens, or a local folder that ``ModelParallelStrategy`` wrote. Only tensors and
            plain values are read (``weights_only=True``).
        **kwargs: for ``model_class.load_from_checkpoint``: ``map_location``, ``hparams_file``, ``strict``, or arguments
            of the model that override the saved ones.

    Returns:
        The model with its dendrites, in training mode as Lightning returns it.

    Raises:
        ValueError: if the file is no whole checkpoint, or if the dendrites do not fit the model; names the layers that
            differ.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from pl_dendrites.core import attach
        >>> grown = BoringModel()
        >>> attach(grown).grow(["layer"])
        >>> checkpoint = {"state_dict": grown.state_dict(), "pytorch-lightning_version": "2.6.0"}
        >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        ...     torch.save(checkpoint, file.name)
        ...     load_from_checkpoint(BoringModel, file.name).layer.dendrites.count
        1
    """
    checkpoint = read_checkpoint(path, kwargs.get("map_location"))
    grown = checkpoint["state_dict"]
    plain = {key: value for key, value in grown.items() if not is_dendrite_key(key)}
    stripped = io.BytesIO()
    torch.save({**checkpoint, "state_dict": plain}, stripped)
    stripped.seek(0)
    # Lightning builds the plain model from its hyperparameters; what it does there is its own affair.
    model: ModelT = model_class.load_from_checkpoint(stripped, **kwargs)
    if len(plain) < len(grown):
        restore_structure(model, grown)
        model.load_state_dict(grown, strict=kwargs.get("strict") is not False and model.strict_loading)
    return model
