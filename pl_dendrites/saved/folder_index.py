"""What a checkpoint that is a folder holds, and in which of its files: the index that PyTorch writes beside them.

The index is a pickle, and PyTorch's own reader runs whatever one says. Here it is read by an interpreter that knows the
few names that such an index needs, as plain records, and every place and size in it is compared with the files.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import _Unpickler
from typing import Any, ClassVar

import torch

__all__ = ["Bytes", "Piece", "Stored", "inside", "read_index"]

_INDEX_FILE = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
# All that an index is made of. Others that pickles have may reach objects that other pickles left behind, or take
# memory by a number; they are no part of this list.
_OPERATIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "NEWOBJ", "REDUCE", "BUILD"),
)


@dataclass(frozen=True)
class Bytes:
    """A part of a file.

    Attributes:
        file: the file.
        offset: where the part begins.
        length: of the part.
    """

    file: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The part."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor.

    Attributes:
        start: where in the tensor it begins.
        shape: its own.
        data: as ``torch.save`` writes it.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    data: Bytes


@dataclass(frozen=True)
class Stored:
    """A tensor in pieces.

    Attributes:
        shape: of the whole.
        dtype: its type.
        pieces: as large as the whole together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def inside(folder: Path, name: str) -> Path:
    """A plain file of a folder.

    Args:
        folder: the folder.
        name: the file's, relative to it.

    Raises:
        ValueError: if there is none, or it lies elsewhere.

    Example:
        >>> inside(Path("."), "../file")
        Traceback (most recent call last):
        ValueError: '.' cannot be read as a checkpoint: '../file' is no file in it
    """
    with_name = folder / name
    if not with_name.is_file() or folder.resolve() not in with_name.resolve().parents:
        raise ValueError(f"'{folder}' cannot be read as a checkpoint: '{name}' is no file in it")
    return with_name


def read_index(folder: Path) -> dict[tuple[str | int, ...], Stored | Bytes]:
    """What a folder holds, by its place in the checkpoint.

    Args:
        folder: the folder.

    Returns:
        Tensors, and anything else as the bytes that ``torch.save`` made of it.

    Raises:
        ValueError: if the index is not one as PyTorch writes it, or its files are not what it says.
    """
    data = inside(folder, _INDEX_FILE).read_bytes()
    try:
        return _Index(folder, _Reader(io.BytesIO(data)).load()).entries()
    except Exception as error:  # what a broken pickle makes of an interpreter may be anything
        raise ValueError(f"'{folder}' cannot be read as a checkpoint: its '{_INDEX_FILE}': {error}") from error


class _Record:
    # Stands for every class; keeps what it is made with.
    def __new__(cls, *args: Any) -> _Record:
        self = super().__new__(cls)
        self.args = args
        return self

    args: tuple[Any, ...]
    state: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state


# The interpreter in Python: the one in C makes a table as long as the largest number that a pickle gives a value.
class _Reader(_Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: _Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OPERATIONS)
    }

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # Made anew each time: a pickle may write to what it was given.
        self._records = {key: type(key[1], (_Record,), {}) for key in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._records:
            return self._records[module, name]
        if (module, name) == ("torch", "Size"):
            return tuple
        found = getattr(torch, name, None) if module == "torch" else None
        if not isinstance(found, torch.dtype):
            raise pickle.UnpicklingError(f"it names '{module}.{name}', which is nothing that a checkpoint holds")
        return found


class _Index:
    def __init__(self, folder: Path, metadata: Any) -> None:
        self._folder, self._metadata = folder, metadata
        self._sizes: dict[str, int] = {}
        self._lengths = 0
        self._places = {(at.fqn, _offset(at)): info for at, info in metadata.storage_data.items()}

    def entries(self) -> dict[tuple[str | int, ...], Stored | Bytes]:
        found: dict[tuple[str | int, ...], Stored | Bytes] = {}
        for flat, entry in self._metadata.state_dict_metadata.items():
            kind = type(entry).__name__
            if type(flat) is not str:
                raise ValueError("a key is no text")
            if kind not in ("TensorStorageMetadata", "BytesStorageMetadata"):
                raise ValueError(f"'{flat}' is a {kind}")
            place = (self._metadata.planner_data or {}).get(flat, (flat,))
            if type(place) is not tuple or not all(type(part) in (str, int) for part in place):
                raise ValueError(f"'{flat}' has no place in a checkpoint")
            found[place] = self._tensor(flat, entry) if kind == "TensorStorageMetadata" else self._bytes(flat, None)
        # Two entries may say that they are the same bytes: what they take together, the files must hold.
        if self._lengths > sum(self._sizes.values()):
            raise ValueError(f"it asks for {self._lengths} bytes, and its files hold {sum(self._sizes.values())}")
        return found

    def _tensor(self, flat: str, entry: Any) -> Stored:
        properties = entry.properties
        dtype = properties.state[0] if "state" in vars(properties) else properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"'{flat}' has no type")
        shape, pieces, filled = _whole(entry.size), [], 0
        for chunk in entry.chunks:
            start, own = _whole(chunk.offsets), _whole(chunk.sizes)
            if not len(start) == len(own) == len(shape) or any(
                a + n > whole for a, n, whole in zip(start, own, shape, strict=True)
            ):
                raise ValueError(f"a piece of '{flat}' lies outside of it")
            data = self._bytes(flat, start)
            if math.prod(own) * dtype.itemsize > data.length:
                raise ValueError(f"a piece of '{flat}' is larger than what its file holds of it")
            filled += math.prod(own)
            pieces.append(Piece(start, own, data))
        if filled != math.prod(shape):
            raise ValueError(f"'{flat}' is not whole")
        return Stored(shape, dtype, tuple(pieces))

    def _bytes(self, flat: str, start: tuple[int, ...] | None) -> Bytes:
        info = self._places[flat, start]
        name, offset, length = info.relative_path, *_whole((info.offset, info.length))
        if type(name) is not str:
            raise ValueError(f"'{flat}' is in no file")
        if vars(info).get("transform_descriptors"):
            raise ValueError(f"'{flat}' is encoded in some way")
        file = inside(self._folder, name)
        size = self._sizes.setdefault(name, file.stat().st_size)
        if offset + length > size:
            raise ValueError(f"'{flat}' lies outside of '{name}'")
        self._lengths += length
        return Bytes(file, offset, length)


def _offset(at: Any) -> tuple[int, ...] | None:
    offset = vars(at).get("offset")
    return None if offset is None else _whole(offset)


def _whole(numbers: Iterable[Any]) -> tuple[int, ...]:
    # Sizes and places, none of which is beyond what PyTorch can count.
    numbers = tuple(numbers)
    if any(type(n) is not int or n < 0 for n in numbers) or math.prod(max(n, 1) for n in numbers) >= 2**60:
        raise ValueError("a size or place is none")
    return numbers
