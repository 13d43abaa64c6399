"""Shared dendrites of a model that two processes share out between them, in more ways than ``test_fsdp.py`` has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pl_dendrites import load_from_checkpoint
from tests.models import same_bits
from tests.sharded import LONG, fit, main
from tests.test_ddp import assert_close, difference
from tests.together import double_precision, launch

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with checkpoints, and by name the runs of each of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    with launch(main, folder, LONG) as wait:
        errors = wait(200)
    assert all((folder / f"{name} {rank}.pt").exists() for name in LONG for rank in range(2)), errors
    load = {"weights_only": False}
    return folder, {name: [torch.load(folder / f"{name} {rank}.pt", **load) for rank in range(2)] for name in LONG}


@pytest.mark.parametrize("name", LONG)
def test_two_processes_are_one_with_their_global_batch(name: str, runs: Any, tmp_path: Path) -> None:
    first, second = (results["whole"] for results in runs[1][name])
    one = fit(LONG[name], None, tmp_path)
    assert any(key.endswith("dendrites.0.out") for key in one["weights"])
    assert_close(first, one)
    assert max(map(difference, first["trail"], one["trail"])) < 1e-9
    assert all(map(same_bits, first["trail"], second["trail"]))
    assert first["history"] == second["history"]
    assert first["hang on"] == one["hang on"] == list(one["history"][-1]["layers"])


@pytest.mark.parametrize("name", LONG)
def test_resumed_anywhere_they_end_with_the_same_bits(name: str, runs: Any) -> None:
    for results in runs[1][name]:
        for epoch in LONG[name].resumed:
            run, whole = results[f"from {epoch}"], results["whole"]
            assert all(map(same_bits, run["trail"], whole["trail"][4 * (epoch + 1) :]))
            assert run["history"] == whole["history"], epoch
            assert same_bits(run["weights"], whole["weights"])
            assert run["hang on"] == whole["hang on"]


@pytest.mark.parametrize("name", LONG)
def test_the_best_network_loads_anywhere(name: str, runs: Any) -> None:
    folder, two = runs
    with double_precision():
        model = load_from_checkpoint(LONG[name].model, folder / name / "best.ckpt")
    assert same_bits(dict(model.state_dict()), two[name][0]["whole"]["weights"])
