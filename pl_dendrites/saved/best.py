"""The best network so far, and how it comes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import fsspec
import lightning.pytorch as pl
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.keys import is_dendrite_key
from pl_dendrites.saved.copies import Others, address, model_weights, still_copies
from pl_dendrites.saved.fit_state import FitState
from pl_dendrites.saved.partial import whole_state
from pl_dendrites.saved.place import Place, has_values, put_weights
from pl_dendrites.saved.reading import read_trainers

__all__ = ["BestModel"]

Save = Callable[[pl.Trainer, Path], None]


class _Lent(WeakValueDictionary[int, Tensor]):
    def __reduce__(self) -> Any:  # a process that is spawned has lent nothing
        return _Lent, ()


class BestModel:
    """The best network so far.

    It is in memory, and in ``best.ckpt`` too if a directory is given. The callback's state holds it: a run that is
    resumed from a checkpoint older than the file must find the best network of that time. Or it is on the disk alone,
    each one in a file of its own name, which the callback's state tells. There stay the file of the best network and
    those that the last two such states told of; what was there before this fit is left alone.

    Args:
        dirpath: directory for files.
        on_disk: whether it is on the disk alone.
        save: saves a checkpoint to a local file, without putting it together in memory first.

    Attributes:
        path: the file; empty if there is none (yet).
        checkpoint: the one that a state to go on from comes from, if any; its folder may have the file, too.
        trusting: whether the user said that anything may be read with it.
    """

    def __init__(self, dirpath: str | Path | None, on_disk: bool, save: Save) -> None:
        self._dirpath, self._on_disk, self._save = dirpath, on_disk, save
        self.path = ""
        self.checkpoint: str | Path | None = None
        self.trusting = False
        self._held: dict[str, Any] | None = None
        self._others: Others | None = None
        # What others may look at is not written to: what was handed out, as long as it is there, and what was given.
        self._lent = _Lent()
        self._given: set[int] = set()
        self._file, self._trusted = "", False  # by which a file is known to be the one; whether it is our own
        self._written: set[str] = set()
        self._told: list[str] = []

    @property
    def weights(self) -> Mapping[str, Any] | None:
        """The network, on the CPU or in a file that is read as tensors are looked at; ``None`` if there is none (yet).

        Raises:
            ValueError: if the file is there no more, or another one.
        """
        return self._held if not self._file else _weights_in(Path(self.path), self._file, self._trusted)

    @property
    def place(self) -> Place:
        """Where it is now. What is held there changes with the next one, unless it is among the others of that."""
        return Place(self._held, self.path if self._file else "", self._file)

    def read(self, place: Place) -> Mapping[str, Any] | None:
        """The weights of a network that was the best once; ``None`` if its file is not there any more."""
        found = None if place.held is not None else self._find(place.path, place.file)
        return place.held if found is None else found[1]

    def keep(self, trainer: pl.Trainer, module: pl.LightningModule, others: Others | None = None) -> None:
        """Make the present network the best. A file is replaced whole or not at all.

        Args:
            trainer: the Trainer.
            module: the model.
            others: networks that were the best once and stay.
        """
        self._others = others
        if self._on_disk:
            self._write(trainer, module)
            return
        self._hold(module)
        if self._dirpath is not None:
            before, self.path = self.path, str(self._dirpath).rstrip("/") + "/best.ckpt"
            try:
                _save_whole(trainer, self.path, self._save)
            except BaseException:
                self.path = before
                raise

    @property
    def _folder(self) -> Path | None:
        return None if self._dirpath is None else Path(fsspec.core.url_to_fs(str(self._dirpath))[1])

    def _hold(self, module: pl.LightningModule) -> None:
        self._file = ""
        try:
            self._copy(module)
        except BaseException:  # of Ctrl-C, say, the network that it interrupts is no less the best
            if self._held is None and not is_sharded(module):
                self._copy(module)
            raise

    def _copy(self, module: pl.LightningModule) -> None:
        # Half of one network and half of another is none.
        former, self._held = dict(self._held or {}), None
        lent = self._given.union(map(address, self._lent.values()))
        self._held = model_weights(module, former, lent, self._others)
        self._given = set()

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before = self.path
        told = list(self._told)
        name = trainer.strategy.broadcast(f"{trainer.global_step}-{uuid4().hex[:8]}")
        assert self._folder is not None
        self.path = str(self._folder / f"best-{name}.ckpt")
        try:
            self._held, self._file = whole_state(module), name  # for its own file, which is written now
            _save_whole(trainer, self.path, self._save, always=True)
            trainer.strategy.barrier()
            if not Path(self.path).is_file():
                raise MisconfigurationException(
                    f"best_on='disk' needs a directory that all processes see: there is no '{self.path}' here"
                )
        except BaseException:
            self.path, self._told = before, told
            self._held = None
            self._hold(module)
            raise
        self._held, self._trusted, self._told = None, True, told
        self._written.add(self.path)
        others = set() if self._others is None else self._others.paths
        for path in self._written.difference([self.path, *told, *others]):
            self._written.discard(path)
            if trainer.is_global_zero:
                _remove(Path(path))

    def restore(self, module: pl.LightningModule) -> bool:
        """Load the best network into the model, which grows or shrinks to fit.

        Returns:
            Whether there is one.
        """
        weights = self.weights
        if weights is not None:
            put_weights(module, weights)
        return weights is not None

    def complete(self, module: pl.LightningModule) -> None:
        """Take what a checkpoint left out from a model that was loaded from it."""
        if self._held is not None and not is_sharded(module):
            whole, kept = whole_state(module), self._held
            left_out = {key: value for key, value in whole.items() if not (key in kept or is_dendrite_key(key))}
            self._held = {**kept, **still_copies(module, left_out)}

    def state_dict(self) -> dict[str, Any]:
        """For the callback's state."""
        state = {"weights": None if self._held is None else self._hand_out(self._held), "path": self.path}
        if not self._file:
            return state
        if self.path not in self._told:
            self._told = [*self._told[-1:], self.path]
        return state | {"file": self._file}

    def _hand_out(self, weights: dict[str, Any]) -> dict[str, Any]:
        found = {key: value.detach() if has_values(value) else value for key, value in weights.items()}
        tensors = [value for value in found.values() if has_values(value)]
        self._lent.update({id(tensor): tensor for tensor in tensors})
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: if the best network is in a file that is not there. Everything is then as it was.
        """
        weights, path, name = state["weights"], state["path"], state.get("file", "")
        if name:
            found = self._find(path, name)
            if found is not None:
                path, there, self._trusted = found
                weights, name = (None, name) if self._on_disk else (deepcopy(dict(there)), "")
            elif weights is None:
                raise self._lost(path)
            else:  # the file itself has them
                path, name = "", ""
        self._held = Place.of({"weights": weights, "path": ""}).held
        self._given = {address(value) for value in (self._held or {}).values() if has_values(value)}
        self.path, self._file = path, name
        self._told = [path] if name else []
        self._written = {path for path in self._told if Path(path).parent == self._folder}

    @property
    def _folders(self) -> list[Path]:
        beside = Path(self.checkpoint).parent if self.checkpoint else None
        return [folder for folder in (self._folder, beside) if folder is not None]

    def _find(self, path: str, name: str) -> tuple[str, Mapping[str, Any], bool] | None:
        # By its name alone: a checkpoint that comes from anywhere does not say which files of this machine are opened.
        for own in (folder / Path(path).name for folder in self._folders):
            if own.is_file():
                trusted = self.trusting or str(own) in self._written
                return str(own), _weights_in(own, name, trusted), trusted
        return None

    def _lost(self, path: str) -> ValueError:
        return ValueError(
            f"the best network of that time is in the file '{Path(path).name}' (best_on='disk'), which is not in"
            f" {[str(folder) for folder in self._folders]}. Give the directory that has it as `dirpath`. If it is no"
            " more, resume a newer checkpoint, or begin anew from the weights: `load_from_checkpoint(..., path)`, and a"
            " fit without `ckpt_path`"
        )


def _weights_in(path: Path, name: str, trusted: bool) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"the best network is in '{path}', which is not there any more")
    callbacks = read_trainers(path, path, trusted=trusted).get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        best = state.get("best") if isinstance(state, Mapping) else None
        if isinstance(best, Mapping) and best.get("file") == name and best.get("weights") is not None:
            weights: Mapping[str, Any] = FitState.from_dict(state).best["weights"]
            return weights
    raise ValueError(f"'{path}' is another file than the one that the best network was written to")


def _save_whole(trainer: pl.Trainer, path: str, save: Save, always: bool = False) -> None:
    # Lightning writes a local file in the directory for temporary files and moves it. Where that is another disk the
    # move is a copy, which may end halfway; a rename within one directory is not. Stores elsewhere show no half files,
    # and a plugin that writes in its own way (say, later) answers for it.
    files, local = fsspec.core.url_to_fs(path)
    plain = type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    if not (always or (plain and isinstance(files, LocalFileSystem))):
        trainer.save_checkpoint(path)
        return
    part = Path(f"{local}.part")
    try:
        save(trainer, part)
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
