"""Grown models from files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import fsspec
import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem

from pl_dendrites.core.loaders import growing
from pl_dendrites.saved.folder import read_folder
from pl_dendrites.saved.partial import refuse_lost
from pl_dendrites.saved.reading import NotPlainError, read_trainers

__all__ = ["load_from_checkpoint", "read_checkpoint"]

ModelT = TypeVar("ModelT", bound=pl.LightningModule)


def read_checkpoint(path: str | Path, *, weights: bool = True) -> dict[str, Any]:
    """A checkpoint of a Trainer; only tensors and plain values are read, onto the CPU.

    Args:
        path: a file, local or at any address that ``fsspec`` opens, or a local folder.
        weights: whether the weights in a folder are read. Those in a file are read when they are looked at.

    Raises:
        ValueError: if the file is no whole checkpoint.
    """
    if Path(path).is_dir():
        return read_folder(Path(path), weights=weights)
    with _local(path) as file:
        return read_trainers(file, path)


@contextmanager
def _local(path: str | Path) -> Iterator[Path]:
    # The file itself, or a copy of one that is elsewhere.
    files, place = fsspec.core.url_to_fs(str(path))
    if isinstance(files, LocalFileSystem):
        yield Path(path) if Path(path).exists() else Path(place)
        return
    with TemporaryDirectory() as directory:
        copy = Path(directory) / "remote.ckpt"
        with files.open(place, "rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield copy


@contextmanager
def _checked(path: str | Path, trusted: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    # A file with all that a checkpoint holds, of which it is known that whoever reads it runs nothing; and that, where
    # it had to be read for this.
    if Path(path).is_dir():
        with TemporaryDirectory() as directory:
            file = Path(directory) / "whole.ckpt"
            checkpoint = read_folder(Path(path), trusted=trusted)
            torch.save(checkpoint, file)
            yield file, checkpoint
        return
    with _local(path) as file:
        yield file, {} if trusted else read_trainers(file, path)


def load_from_checkpoint(model_class: type[ModelT], path: str | Path, **kwargs: Any) -> ModelT:
    """Load a grown LightningModule, with no Trainer and no callback at hand.

    ``ModelClass.load_from_checkpoint`` alone refuses the dendrites' entries, or drops them if told
    ``strict=False``.

    Args:
        model_class: the user's class.
        path: a checkpoint that a Trainer with a ``DendriteCallback`` wrote, at any time: a file, local or at any
            address that ``fsspec`` opens, or a local folder that ``ModelParallelStrategy`` wrote. Only tensors and
            plain values are read, unless ``weights_only=False`` is given.
        **kwargs: for ``model_class.load_from_checkpoint``, which does the loading: ``map_location``, ``hparams_file``,
            ``strict``, ``weights_only``, or arguments of the model that override the saved ones. With
            ``weights_only=False`` classes and functions are read too, as hyperparameters may be; that may run code.

    Returns:
        The model with its dendrites, in training mode as Lightning returns it.

    Raises:
        ValueError: if the file is no whole checkpoint or holds more than tensors and plain values, or if the dendrites
            do not fit the model; names what it holds, or the layers that differ.

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
    try:
        with _checked(path, kwargs.get("weights_only") is False) as (file, checkpoint):
            with growing():
                # A class of the user's may take one kind of path alone.
                model = model_class.load_from_checkpoint(file if isinstance(path, Path) else str(file), **kwargs)
            refuse_lost(model, checkpoint)
            return model
    except NotPlainError as error:
        raise ValueError(
            f"{error}. If you trust where it comes from, `load_from_checkpoint(..., weights_only=False)` reads it."
        ) from error
