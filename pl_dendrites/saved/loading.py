"""Grown models from files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import lightning.pytorch as pl
import torch

from pl_dendrites.core.attach import restore_structure
from pl_dendrites.core.keys import is_dendrite_key
from pl_dendrites.saved.folder import read_folder

__all__ = ["load_from_checkpoint", "read_checkpoint"]

ModelT = TypeVar("ModelT", bound=pl.LightningModule)


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
