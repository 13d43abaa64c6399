from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """All is made on the device that the environment names, as ``DEVICE=cuda`` (see `make test-gpu`)."""
    torch.set_default_device(os.environ.get("DEVICE"))
    yield
    torch.set_default_device(None)
