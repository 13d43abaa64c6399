from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = os.environ.get("DEVICE")


class MadeOn(TorchFunctionMode):
    """Tensors are made on a device, if nothing else is said; what a generator draws is drawn where that is."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _device_constructors() or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return function(*args, **kwargs).to(DEVICE)
        return function(*args, **(kwargs | {"device": DEVICE}))


@pytest.fixture(autouse=True)
def place() -> Iterator[None]:
    """Where the environment says, as ``DEVICE=cuda``; tests with constants of their own on the CPU fail then."""
    with nullcontext() if DEVICE is None else MadeOn():
        torch.manual_seed(0)
        yield
