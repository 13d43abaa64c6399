"""Grown models from files."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
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
def _whole(path: str | Path, trusted: bool) -> Iterator[Path]:
    # A file with all that a checkpoint holds.
    if Path(path).is_dir():
        with TemporaryDirectory() as directory:
            file = Path(directory) / "whole.ckpt"
            torch.save(read_folder(Path(path), trusted=trusted), file)
            yield file
        return
    with _local(path) as file:
        yield file


# Lightning reads a file into memory whole. What is handed to it instead names this, which is open already, and of which
# only those tensors are read that the model takes.
_OPEN: ContextVar[dict[str, Any]] = ContextVar("pl_dendrites_open")


class _Open:
    def __reduce__(self) -> Any:
        return _opened, ()


def _opened() -> dict[str, Any]:
    return _OPEN.get()


def _load_open(model_class: type[ModelT], checkpoint: dict[str, Any], **kwargs: Any) -> ModelT:
    torch.save(_Open(), name := io.BytesIO())
    name.seek(0)
    token = _OPEN.set(checkpoint)
    try:
        with torch.serialization.safe_globals([_opened]):
            options = _known_options(model_class, {**kwargs, "weights_only": True})
            return model_class.load_from_checkpoint(name, **options)
    finally:
        _OPEN.reset(token)


_LIGHTNINGS = "lightning.pytorch.core.module", "pytorch_lightning.core.module"


def _loads_as_lightning(model_class: type[pl.LightningModule]) -> bool:
    return getattr(model_class.load_from_checkpoint, "__module__", "") in _LIGHTNINGS


def _known_options(model_class: type[pl.LightningModule], options: Mapping[str, Any]) -> dict[str, Any]:
    # Lightning before 2.6 takes `weights_only` for an argument of the model.
    lightnings: Any = next((kind for kind in model_class.__mro__ if kind.__module__ in _LIGHTNINGS), pl.LightningModule)
    known = signature(lightnings.load_from_checkpoint).parameters
    return {name: value for name, value in options.items() if name != "weights_only" or name in known}


def _where_it_was(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    # As Lightning does it without a `map_location`.
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "xla": False}
    return None if there.get(location.partition(":")[0], True) else storage.cpu()


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
    trusted = kwargs.get("weights_only") is False
    try:
        with _whole(path, trusted) as file, growing():
            if _loads_as_lightning(model_class):
                place = kwargs.get("map_location") or _where_it_was
                checkpoint = read_trainers(file, path, map_location=place, trusted=trusted)
                model = _load_open(model_class, checkpoint, **kwargs)
            else:
                checkpoint = {} if trusted else read_trainers(file, path)  # who reads it then runs nothing
                # A class of the user's may take one kind of path alone.
                options = _known_options(model_class, kwargs)
                model = model_class.load_from_checkpoint(file if isinstance(path, Path) else str(file), **options)
            refuse_lost(model, checkpoint)
            return model
    except NotPlainError as error:
        raise ValueError(
            f"{error}. If you trust where it comes from, `load_from_checkpoint(..., weights_only=False)` reads it."
        ) from error
