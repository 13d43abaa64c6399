"""The controls beside the dendrites: what is compared is comparable."""

from __future__ import annotations

import json
import math
import os
import statistics
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from pl_dendrites import compare
from pl_dendrites.comparison import Run
from tests.models import Classifier, loaders

DENDRITES: dict[str, Any] = {
    "monitor": "val_loss",
    "base_epochs": 2,
    "max_correlation_epochs": 1,
    "max_dendrites": 2,
    "candidates": 2,
    "verbose": False,
}


class Data(L.LightningDataModule):
    tests = 0

    def train_dataloader(self) -> Any:
        return loaders()[0]

    def val_dataloader(self) -> Any:
        return loaders()[1]

    def test_dataloader(self) -> Any:
        Data.tests += 1
        return loaders()[1]


def size(hidden: int) -> int:
    return sum(p.numel() for p in Classifier(hidden).parameters())


def fits(grown: Run, each: int = 2) -> int:
    """Of its controls, each of so many epochs: as many restarts as it had sets, and as many epochs at least."""
    return max(1 + grown.tries, math.ceil(grown.epochs / each))


def test_every_network_is_tested_once_and_the_controls_are_as_large_and_trained_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Data.tests = 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    users = torch.get_rng_state()
    comparison = compare(Classifier, Data, DENDRITES, "val_acc", wider=Classifier, seeds=2)
    assert torch.equal(torch.get_rng_state(), users)
    assert os.environ["PL_GLOBAL_SEED"] == "7"
    assert "PL_SEED_WORKERS" not in os.environ
    names = ["plain", "with dendrites", "plain, restarted", "wider, restarted"]
    assert [run.name for run in comparison.runs] == names * 2
    assert Data.tests == 4 + 8  # a batch of each network before all
    for seed in range(2):
        plain, grown, restarted, wider = comparison.runs[4 * seed : 4 * seed + 4]
        assert {run.seed for run in (plain, grown, restarted, wider)} == {seed}
        assert plain.dendrites == restarted.dendrites == wider.dendrites == 0
        assert grown.dendrites > 0
        assert plain.parameters == restarted.parameters == size(6)
        assert abs(wider.parameters - grown.parameters) == min(abs(size(h) - grown.parameters) for h in range(1, 60))
        assert plain.epochs == 2
        assert plain.tries == restarted.tries == wider.tries == 0
        assert grown.tries >= grown.dendrites
        assert size(wider.width or 0) == wider.parameters
        assert (wider.kind, wider.beside, grown.kind) == ("wider", "with dendrites", "dendrites")
        assert grown.epochs == 2 + 3 * grown.tries  # a base phase of two epochs, after a correlation phase of one
        assert restarted.epochs == wider.epochs == 2 * fits(grown)
        assert all(0 <= run.result <= 1 and run.seconds > 0 for run in (plain, grown, restarted, wider))
    table = str(comparison).splitlines()
    assert [line[:16].strip() for line in table[1:]] == names
    accuracies = [run.result for run in comparison.runs if run.name == "with dendrites"]
    assert f"{statistics.mean(accuracies):.4g} ± {statistics.stdev(accuracies):.2g}" in table[2]
    assert "val_acc" in table[0]
    json.dumps(comparison.rows())


def test_each_fit_has_callbacks_of_its_own_for_some_remember_what_they_saw() -> None:
    def epochs(trainer: dict[str, Any]) -> list[int]:
        arguments = {**DENDRITES, "max_dendrites": 1}
        comparison = compare(Classifier, Data, arguments, "val_acc", wider=Classifier, seeds=1, trainer=trainer)
        return [run.epochs for run in comparison.runs]

    # Patient enough for any of the fits, but not for two of them.
    stopping = EarlyStopping("val_acc", mode="max", min_delta=1.0, patience=4)
    assert epochs({"callbacks": stopping}) == epochs({"callbacks": None}) == [2, 5, 6, 6]
    assert stopping.wait_count == 0


def test_the_same_seeds_give_the_same_results() -> None:
    one, two = (compare(Classifier, Data, DENDRITES, "val_loss", seeds=1) for _ in range(2))
    assert [(run.result, run.score) for run in one.runs] == [(run.result, run.score) for run in two.runs]
    plain, grown, restarted = one.runs
    assert restarted.score <= plain.score  # it goes on from the best weights
    assert grown.result == pytest.approx(grown.score)  # of the same data here: the best network was tested


def test_several_settings_have_controls_of_their_size_each() -> None:
    small = DENDRITES | {"max_dendrites": 1, "max_tries": 0}
    settings = {"one": small, "many": DENDRITES | {"learning": "gradient", "max_tries": 3}}
    comparison = compare(Classifier, Data, settings, "val_acc", wider=Classifier, sparse=True, seeds=1)
    runs = {run.name: run for run in comparison.runs}
    controls = ["as large as one, restarted", "as large as many, restarted"]
    sparse = ["sparse, as large as one", "sparse, as large as many"]
    assert list(runs) == ["plain", "one", "many", "plain, restarted", *controls, *sparse]
    assert [runs[name].parameters for name in sparse] == [runs[name].parameters for name in settings]
    assert runs["one"].tries < runs["many"].tries
    for name, control in zip(settings, controls, strict=True):
        parameters = runs[name].parameters
        assert abs(runs[control].parameters - parameters) == min(abs(size(h) - parameters) for h in range(1, 60))
        assert runs[control].epochs == 2 * fits(runs[name])
    assert runs["plain, restarted"].epochs == 2 * max(fits(runs[name]) for name in settings)


class Counted(Classifier):
    """Notes when it is tested how many parameters it has, and how many are not zero."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def on_test_start(self) -> None:
        values = [parameter for parameter in self.parameters() if parameter.requires_grad]
        Counted.seen.append((sum(p.numel() for p in values), sum(int((p != 0).sum()) for p in values)))


class Deeper(Classifier):
    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.net.insert(4, nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()))


def test_sparse_and_pruned_controls_have_as_many_parameters_left_and_deeper_ones_about_as_many() -> None:
    Counted.seen.clear()
    arguments = DENDRITES | {"form": "private", "max_dendrites": 1, "max_tries": 0, "base_epochs": 3}
    comparison = compare(
        Counted, Data, arguments, "val_loss", wider=Counted, deeper=Deeper, pruned=True, sparse=True, seeds=1
    )
    plain, grown, *_, deeper, pruned, sparse = comparison.runs
    names = ["wider, restarted", "deeper, restarted", "pruned", "sparse"]
    assert [run.name for run in comparison.runs][3:] == names
    for control, (whole, left) in zip((pruned, sparse), Counted.seen[-2:], strict=True):
        assert control.parameters == grown.parameters
        # Biases of neurons that never had an input learn nothing, and are zero as they began.
        assert 0 <= grown.parameters - left <= (0 if control is pruned else 2)
        # So large that a neuron more would leave less than half of it to weights: of each the bias, two of BatchNorm.
        assert whole == max(size(hidden) for hidden in range(1, 60) if 3 * hidden + 2 <= grown.parameters // 2)
        assert control.epochs == grown.epochs == 7
        assert control.result == pytest.approx(control.score)  # of the same data here: the best weights were tested
        assert control.dendrites == control.tries == 0
        assert 4 * left < control.bytes < 8 * whole
    sizes = [sum(p.numel() for p in Deeper(hidden).parameters()) for hidden in range(1, 60)]
    assert abs(deeper.parameters - grown.parameters) == min(abs(found - grown.parameters) for found in sizes)
    assert deeper.epochs == 3 * fits(grown, 3)
    counts = 2 * 4 * 6 + 8  # BatchNorm's means and variances of six neurons, and how many batches it saw
    assert plain.bytes == 4 * plain.parameters + counts
    table = str(comparison).splitlines()
    assert all(f"{run.bytes:,}" in line for run, line in zip(comparison.runs, table[1:], strict=True))


class Spoilt(Classifier):
    """Every fit makes it worse, and its weights know."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__(hidden)
        self.register_buffer("fits", torch.zeros(()))

    def on_train_start(self) -> None:
        self.fits += 1

    def validation_step(self, *_: Any) -> None:
        self.log("fits", self.fits)

    test_step = validation_step


@pytest.mark.parametrize(("mode", "best"), [("min", 1.0), ("max", 4.0)])
def test_a_restart_that_makes_a_network_worse_is_forgotten(mode: str, best: float) -> None:
    arguments = DENDRITES | {"monitor": "fits", "mode": mode, "max_tries": 1}
    _, grown, restarted = compare(Spoilt, Data, arguments, "fits", seeds=1).runs
    assert (grown.tries, grown.epochs) == (2, 8)  # so there are four fits of two epochs
    assert (restarted.score, restarted.result) == (best, best)


def test_a_network_that_was_better_before_a_cut_is_not_the_pruned_one() -> None:
    arguments = DENDRITES | {"monitor": "fits", "form": "private", "max_dendrites": 1, "max_tries": 0}
    *_, pruned = compare(Spoilt, Data, arguments, "fits", wider=Spoilt, pruned=True, seeds=1).runs
    assert pruned.epochs == 5
    assert pruned.score == pruned.result == 4.0  # of one, one, none, one and two epochs


class Hurried(Classifier):
    """Only its first fits have time for an epoch; the others spoil it at once."""

    fits = 0

    def on_train_start(self) -> None:
        Hurried.fits += 1
        if Hurried.fits > 3:
            self.trainer.should_stop = True
            torch.nn.init.zeros_(self.net[0].weight)


def test_a_restart_that_ends_before_its_first_validation_is_forgotten() -> None:
    Hurried.fits = -3  # of the three networks, each tried for a batch before
    _, grown, restarted = compare(Hurried, Data, DENDRITES, "val_loss", seeds=1).runs
    assert (restarted.epochs, Hurried.fits) == (2, 3 + grown.tries)
    assert restarted.result == pytest.approx(restarted.score)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"'f1' is not logged in test_step; logged are \['val_acc'"):
        compare(Classifier, Data, DENDRITES, "f1", seeds=1)
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        compare(Classifier, Data, DENDRITES, "val_acc", workers=0)
    with pytest.raises(ValueError, match="`dendrites`: 'plain' is what another network is called"):
        compare(Classifier, Data, {"plain": DENDRITES}, "val_acc")
    with pytest.raises(ValueError, match="`seeds` must be at least 1, got 0"):
        compare(Classifier, Data, DENDRITES, "val_acc", seeds=0)
    with pytest.raises(ValueError, match="`deeper` has 56 parameters at a width of 1048576"):
        compare(Classifier, Data, DENDRITES, "val_acc", deeper=lambda width: Classifier(), seeds=1)
    with pytest.raises(ValueError, match="`pruned` and `sparse` begin with a network that `wider` makes"):
        compare(Classifier, Data, DENDRITES, "val_acc", deeper=Classifier, sparse=True)
    with pytest.raises(ValueError, match="`dense` must be above 1, got 1"):
        compare(Classifier, Data, DENDRITES, "val_acc", wider=Classifier, pruned=True, dense=1)
    with pytest.raises(MisconfigurationException, match="fit of 'plain' ended before its first validation"):
        compare(Classifier, Data, DENDRITES, "val_acc", seeds=1, trainer={"max_epochs": 0})
