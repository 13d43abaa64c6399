"""Shared by all tests."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest

# The files that take longest, the longest first: `make test` hands out whole files, and none of these may be the last.
# As long as one worker is at test_resume, the other one has those that start processes, which it imports for once.
LONGEST = [
    "test_resume",
    "test_ddp",
    "test_fsdp",
    "test_faults",
    "test_console",
    "test_examples",
    "test_other_callbacks",
    "test_exceptions",
    "test_readme",
    "test_callback",
]
DIRECTORIES = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    gc.freeze()  # all that was imported so far: no collection has to look through it again


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's, which looks through the directories of all tests before to find a name for the next one."""
    path = tmp_path_factory.getbasetemp() / str(next(DIRECTORIES))
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer writes into the directory it is started in: each test has its own."""
    monkeypatch.chdir(tmp_path)
