"""Shared by all tests."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

# The files that take longest, the longest first: `make test` hands out whole files, and none of these may be the last.
LONGEST = [
    "test_ddp",
    "test_examples",
    "test_resume",
    "test_fsdp",
    "test_faults",
    "test_other_callbacks",
    "test_exceptions",
    "test_readme",
    "test_callback",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that was imported so far: no collection has to look through it again


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer writes into the directory it is started in: each test has its own."""
    monkeypatch.chdir(tmp_path)
