"""Files that anybody may have written: tensors and plain values come out, and no more of them than the file holds.

``torch.load(weights_only=True)`` runs nothing that a file brings along, but makes what a file asks for: a kilobyte can
ask for gigabytes, compressed or by a number alone.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["NotPlainError", "read_trainers", "read_values"]

_ZIP = b"PK\x03\x04"

# The one name in a pickle that `weights_only=True` lets fill memory by a number. Nothing that a Trainer saves needs it.
_FILLER = b"\nbytearray\n"


class NotPlainError(ValueError):
    """A file holds more than tensors and plain values."""


def read_values(source: Path | bytes, name: str | Path, *, map_location: Any = "cpu", trusted: bool = False) -> Any:
    """What ``torch.save`` wrote: tensors and plain values.

    Args:
        source: a local file, whose tensors are read when they are looked at; or what one holds.
        name: what messages call it.
        map_location: as for ``torch.load``.
        trusted: whether anything may be read, classes and functions too, which may run code.

    Raises:
        NotPlainError: if it holds anything else.
        ValueError: if it cannot be read, or asks for more memory than it is large.

    Example:
        >>> file = io.BytesIO()
        >>> torch.save({"a": torch.ones(2), "b": 3}, file)
        >>> read_values(file.getvalue(), "file")
        {'a': tensor([1., 1.]), 'b': 3}
        >>> file = io.BytesIO()
        >>> torch.save({"a": Path("b")}, file)
        >>> read_values(file.getvalue(), "file")  # doctest: +ELLIPSIS, +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        NotPlainError: 'file' cannot be read as a checkpoint: it holds more than tensors and plain values: ...
    """
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        archive = file.read(len(_ZIP)) == _ZIP
        try:
            if not trusted:
                _check_archive(file, size) if archive else _check_pickle(_mapped(source))
            file.seek(0)
            if archive and isinstance(source, Path):
                values = torch.load(str(source), map_location=map_location, weights_only=not trusted, mmap=True)
            else:
                values = torch.load(file, map_location=map_location, weights_only=not trusted)
        except Exception as error:  # what a broken file makes of an unpickler may be anything
            others = _others(file) if archive and isinstance(error, pickle.UnpicklingError) else []
            if others:
                why = f"it holds more than tensors and plain values: {', '.join(others)}"
                raise NotPlainError(f"'{name}' cannot be read as a checkpoint: {why}") from error
            raise ValueError(f"'{name}' cannot be read as a checkpoint: {error or 'it is empty'}") from error
    if not trusted and _held(values) > size:
        raise ValueError(f"'{name}' cannot be read as a checkpoint: it asks for more memory than it is large")
    return values


def read_trainers(file: Path, name: str | Path, *, map_location: Any = "cpu", trusted: bool = False) -> dict[str, Any]:
    """A checkpoint of a Trainer in a file.

    Args:
        file: a local file.
        name: what messages call it.
        map_location: as for ``torch.load``.
        trusted: as for :func:`read_values`.

    Raises:
        ValueError: if it cannot be read, or is something else.
    """
    checkpoint = read_values(file, name, map_location=map_location, trusted=trusted)
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"'{name}' is not a checkpoint of a Trainer: it has no state_dict")
    if not all(isinstance(key, str) for key in weights):
        raise ValueError(f"'{name}' is not a checkpoint of a Trainer: a key of its state_dict is no text")
    found: dict[str, Any] = checkpoint
    return found


def _check_archive(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which PyTorch's files are not")
        if sum(member.file_size for member in members) > size:
            raise ValueError("it asks for more memory than it is large")
        for member in members:
            if member.filename.endswith("data.pkl"):
                _check_pickle(archive.read(member))


def _check_pickle(data: bytes | mmap.mmap) -> None:
    if data.find(_FILLER) >= 0:
        raise ValueError("it makes a bytearray")


def _mapped(source: Path | bytes) -> bytes | mmap.mmap:
    if isinstance(source, bytes) or not source.stat().st_size:
        return source if isinstance(source, bytes) else b""
    with source.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _others(file: IO[bytes]) -> list[str]:
    file.seek(0)
    with suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return []


def _held(values: Any) -> int:
    # Bytes of all storages. What lies in several places counts once.
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting: list[Any] = [values]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_meta:
                with suppress(NotImplementedError, RuntimeError):  # a sparse one has none
                    storage = value.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
            waiting.extend(value)
    return sum(storages.values())
