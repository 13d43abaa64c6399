"""Optimizers over nothing: of a network that is frozen whole, what they are to train has yet to grow."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["empty_optimizers"]

_ALLOWED = ContextVar("pl_dendrites_empty_optimizers", default=False)


@contextmanager
def empty_optimizers() -> Iterator[None]:
    """Within the block, in this thread, an optimizer over no parameters has one group with the settings given.

    PyTorch takes a group that is empty, and no list that is: it would be a mistake elsewhere.

    Example:
        >>> import torch
        >>> with empty_optimizers():
        ...     optimizer = torch.optim.SGD([], lr=0.1)
        >>> [(group["params"], group["lr"]) for group in optimizer.param_groups]
        [([], 0.1)]
        >>> torch.optim.SGD([], lr=0.1)
        Traceback (most recent call last):
        ValueError: optimizer got an empty parameter list
    """
    token = _ALLOWED.set(True)
    _STAND_IN.open()
    try:
        yield
    finally:
        _STAND_IN.close()
        _ALLOWED.reset(token)


class _StandIn:
    """Stands in for the method that makes optimizers as long as a block is open, in whatever thread."""

    def __init__(self) -> None:
        self._lock, self._blocks = threading.Lock(), 0
        self._make: Any = None
        self._ours: Any = None

    def open(self) -> None:
        """A block begins."""
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._make = Optimizer.__init__
                Optimizer.__init__ = self._ours = _with_a_group(self._make)  # type: ignore[method-assign]

    def close(self) -> None:
        """A block ends; with the last the class is what it was."""
        with self._lock:
            self._blocks -= 1
            # Else somebody has put another over it, and will put ours back, which does nothing.
            if not self._blocks and Optimizer.__init__ is self._ours:
                Optimizer.__init__ = self._make  # type: ignore[method-assign]


_STAND_IN = _StandIn()


def _with_a_group(make: Any) -> Any:
    @wraps(make)
    def made(self: Optimizer, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        if _ALLOWED.get() and not isinstance(params, Tensor):
            params = list(params) or [{"params": []}]
        make(self, params, *args, **kwargs)

    return made
