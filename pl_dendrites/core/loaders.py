"""Whatever loads a model, it grows to fit the weights: for loaders that make and load a model in one step.

A model that has never grown has no hook of ours that could see a load, so methods of its class stand in for others
while a block is open. A thread that opened none passes through them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from pl_dendrites.core.growth.hooks import attached_layers
from pl_dendrites.core.pretrained import LOADER, grow_and_load_files, warn_of_unknown
from pl_dendrites.core.structure import grow_on_load, stop_growing_on_load

__all__ = ["growing"]

_GROWING = ContextVar("pl_dendrites_growing", default=False)


@contextmanager
def growing() -> Iterator[None]:
    """Within the block, in this thread, every model grows to fit the weights that it loads.

    That holds for each ``load_state_dict`` of any module, whoever calls it, with ``strict=False`` too, and for
    ``from_pretrained`` of Hugging Face's transformers, from one file or several. The loader itself does the loading;
    just before, layers get the dendrites that the weights have, as :func:`grow_on_load` says. Blocks may lie in each
    other and be open in several threads; when the last ends, by an exception too, nothing of them is left but the
    models, which go on growing to fit what they load if they have dendrites.

    Raises:
        ValueError: within the block, from the loader: the dendrites do not fit the model. Names the layers that differ.
        RuntimeError: within the block, from ``from_pretrained``: there are dendrites, and it loads in a way that is not
            known, as a later version may. Says what to do.

    Example:
        >>> from pl_dendrites.core import attach
        >>> grown = nn.Sequential(nn.Linear(3, 2))
        >>> attach(grown).grow(["0"])
        >>> fresh = nn.Sequential(nn.Linear(3, 2))
        >>> with growing():
        ...     fresh.load_state_dict(grown.state_dict(), strict=False)
        <All keys matched successfully>
        >>> fresh[0].dendrites.count
        1
    """
    token = _GROWING.set(True)
    _STAND_INS.open()
    try:
        yield
    finally:
        _STAND_INS.close()
        _GROWING.reset(token)


class _StandIns:
    """Methods that stand in for those of classes as long as a block is open, in whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks = 0
        self._kept: list[tuple[type, str, Any, Any]] = []
        self._hook: Any = None

    def open(self) -> None:
        """A block begins."""
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._put(nn.Module, "load_state_dict", _while_growing(nn.Module.load_state_dict, _grow_and_load))
                self._hook = register_module_module_registration_hook(self._meet)

    def close(self) -> None:
        """A block ends; with the last all classes are what they were."""
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            self._hook.remove()
            while self._kept:
                owner, name, before, ours = self._kept.pop()
                if vars(owner).get(name) is ours:  # else somebody has put another over it, and will put ours back
                    setattr(owner, name, before)

    def _put(self, owner: type, name: str, ours: Any) -> None:
        self._kept.append((owner, name, vars(owner)[name], ours))
        setattr(owner, name, ours)

    def _meet(self, module: nn.Module, name: str, part: Any) -> None:
        # Who has a loader of this name is met when a model of it is made, wherever and whenever it was imported.
        if not _GROWING.get() or not hasattr(type(module), "from_pretrained"):
            return
        if not hasattr(type(module), LOADER):
            warn_of_unknown(type(module))
            return
        owner = next(each for each in type(module).__mro__ if LOADER in vars(each))
        with self._lock:
            if (owner, LOADER) not in {(other, method) for other, method, *_ in self._kept}:
                before = vars(owner)[LOADER]
                kind = type(before) if isinstance(before, (staticmethod, classmethod)) else lambda function: function
                function = getattr(before, "__func__", before)
                self._put(owner, LOADER, kind(_while_growing(function, grow_and_load_files)))


_STAND_INS = _StandIns()


def _while_growing(function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    # Of a block in this thread `instead` is called, with the function as its first argument.
    @wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return instead(function, *args, **kwargs) if _GROWING.get() else function(*args, **kwargs)

    return stand_in


def _grow_and_load(load: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Last of all hooks: those of the model may rename what it loads.
    before = grow_on_load(self)
    stop_growing_on_load(self)
    grow_on_load(self)
    try:
        return load(self, *args, **kwargs)
    finally:
        if not before and not any(attached_layers(self)):
            stop_growing_on_load(self)
