"""Files and folders that anybody may have changed anywhere: they are read, or refused; see ``test_untrusted_files``."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pl_dendrites.saved.folder import read_folder, weights_to_fit
from pl_dendrites.saved.reading import read_values
from tests.test_untrusted_files import HUGE, folder, write_index

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    place, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 40])
    noise = rng.choice(
        [rng.randbytes(length), b"", b"\xff" * length, data[:length], b"cposix\nsystem\n", b"\x93", b"R"]
    )
    return data[:place] + noise + data[place + rng.choice([0, len(noise), length]) :]


STRANGE: list[Any] = [None, -1, 0, 1, 2**62, 10**30, "", "x", (), [], {}, (1, 2), [None], 0.5, True, b"x"]
STRANGE += [torch.Size([HUGE]), torch.Size([0]), torch.float16, Path]


def objects(value: Any, depth: int = 0) -> list[Any]:
    """Every part of an index that can be changed."""
    found = [value] if isinstance(value, dict | list) or hasattr(value, "__dict__") else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    inner = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else inner
    return found + [part for entry in (inner if depth < 6 else ()) for part in objects(entry, depth + 1)]


def mutate_index(rng: random.Random, index: Any) -> None:
    place = rng.choice(objects(index))
    strange = rng.choice(STRANGE)
    if isinstance(place, list) and place:
        place[rng.randrange(len(place))] = strange
    elif isinstance(place, dict) and place:
        key = rng.choice(list(place))
        value = place.pop(key)
        if rng.random() < 0.7:
            place[rng.choice([key, key, "x", 7])] = rng.choice([strange, value])
    elif not isinstance(place, dict | list | type) and vars(place):
        vars(place)[rng.choice([name for name in vars(place) if name != "memory_format"])] = strange


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bytes of the index", "index", "bytes of the rest", "bytes of the tensors"])
def test_a_folder_is_read_or_refused(kind: str, number: int) -> None:
    path = folder()
    file = {"bytes of the rest": "meta.pt", "bytes of the tensors": "__0_0.distcp"}.get(kind, ".metadata")
    rng, data, answers = random.Random(kind), (path / file).read_bytes(), {"taken": 0, "refused": 0}
    whole = sum(part.stat().st_size for part in path.iterdir())
    for _ in range(number):
        if kind == "index":
            index = pickle.loads(data)
            mutate_index(rng, index)
            write_index(path, index)
        else:
            (path / file).write_bytes(mutate_bytes(rng, data))
        try:
            weights = read_folder(path)["state_dict"]
            weights_to_fit(path, False)
        except ValueError:
            answers["refused"] += 1
        else:
            answers["taken"] += 1
            assert sum(value.nbytes for value in weights.values()) <= whole
    assert answers["refused"] > number / 10


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_file_is_read_or_refused(number: int) -> None:
    file, rng, refused = io.BytesIO(), random.Random(0), 0
    torch.save({"state_dict": {"a": torch.zeros(3), "b": [1, "x"]}}, file)
    for _ in range(number):
        data = mutate_bytes(rng, file.getvalue())
        try:
            read_values(data, "file")
        except ValueError:
            refused += 1
    assert refused > number / 10
