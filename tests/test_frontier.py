"""The sizes that a fit passed: each with its best network, which a model can have afterwards."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from pl_dendrites import DendriteCallback, load_from_checkpoint
from pl_dendrites.core import attach
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.saved import frontier
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick, same_bits, train
from tests.test_callback import ScriptedScore
from tests.test_memory import TRAINER, Big, allocated, best, held, keep_all

SCRIPT = {
    0: [0.1, 0.5, 0.4, 0.3],
    1: [0.3, 0.6, 0.65, 0.2, 0.1],
    2: [0.6, 0.55, 0.6],  # rejected
    3: [0.1, 0.7, 0.1, 0.1],
    4: [0.2, 0.1, 0.1],
    5: [0.3, 0.1, 0.1],
}


def scripted(model: L.LightningModule | None = None, **given: Any) -> tuple[DendriteCallback, ScriptedScore, Any]:
    """A fit whose sizes have the best scores 0.5, 0.65 and 0.7, and what the model was at each score."""
    settings = {
        "patience": 2,
        "max_tries": 1,
        "max_correlation_epochs": 1,
        "candidates": 2,
        "verbose": False,
        "form": "private",
    }
    dendrites = DendriteCallback("score", "max", **(settings | given))
    script = ScriptedScore(dendrites, SCRIPT)
    model = model or classifier()
    train(model, dendrites, script, max_epochs=60, data=loaders(128))
    return dendrites, script, model


@pytest.fixture(scope="module")
def fitted() -> tuple[DendriteCallback, ScriptedScore, Any]:
    return scripted()


def scores(dendrites: DendriteCallback) -> list[float]:
    return [record["score"] for record in dendrites.frontier]


def at(script: ScriptedScore, score: float) -> dict[str, Tensor]:
    return next(weights for own, weights in script.weights.items() if own == pytest.approx(score))


def test_each_size_is_kept_with_its_best_weights_and_can_be_taken_by_size_or_by_score(fitted: Any) -> None:
    dendrites, script, model = fitted
    assert scores(dendrites) == pytest.approx([0.5, 0.65, 0.7])
    assert [(size["cycle"], size["dendrites"]) for size in dendrites.frontier] == [(0, 0), (1, 1), (3, 2)]
    small, middle, large = (size["parameters"] for size in dendrites.frontier)
    cases = [({"parameters": middle + 1}, 1), ({"score": 0.45}, 0), ({"score": 0.66}, 2), ({}, 2)]
    for wanted, place in [*cases, ({"parameters": middle, "score": 0.4}, 0), ({"parameters": small}, 0)]:
        assert dendrites.take(model, **wanted) == dendrites.frontier[place], wanted
        assert same_bits(bits(model), at(script, dendrites.frontier[place]["score"])), wanted
        assert parameter_count(model) == (small, middle, large)[place]
    model(torch.randn(3, 4)).sum().backward()  # it works, and trains on
    fresh = classifier(seed=5)
    dendrites.take(fresh, score=0.6)
    assert same_bits(bits(fresh), at(script, 0.65))


def test_what_was_not_passed_is_refused_and_the_model_stays_what_it_was(fitted: Any) -> None:
    dendrites, _, model = fitted
    before = bits(model)
    for wanted in ({"parameters": 3}, {"score": 0.9}, {"parameters": 60, "score": 0.69}):
        with pytest.raises(ValueError, match=r"no network that is kept has parameters=.*there are:\n.*: 0\.5\n"):
            dendrites.take(model, **wanted)
    with pytest.raises(ValueError, match="does not fit the model"):
        dendrites.take(classifier(hidden=4), parameters=dendrites.frontier[1]["parameters"])
    assert same_bits(bits(model), before)


def test_a_model_cannot_be_changed_while_it_is_fitted() -> None:
    dendrites, model = quick(), classifier()

    class Takes(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            dendrites.take(pl_module)

    with pytest.raises(ValueError, match="a fit is running"):
        train(model, dendrites, Takes())
    assert dendrites.take(model)["score"] == dendrites.best_model_score  # after the exception it can


def test_a_taken_network_is_what_the_trainer_saves_and_tests(tmp_path: Path) -> None:
    dendrites, model = quick(), classifier()
    trainer = train(model, dendrites)
    smaller = dendrites.take(model, parameters=dendrites.frontier[-1]["parameters"] - 1)
    (metrics,) = trainer.validate(model, loaders()[1], verbose=False)
    assert metrics["val_loss"] == pytest.approx(smaller["score"], rel=1e-6)
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "small.ckpt")
    assert parameter_count(again) == smaller["parameters"]
    assert same_bits(bits(again), bits(model))


def test_pickles_and_checkpoints_have_all_sizes(fitted: Any) -> None:
    dendrites, script, _ = fitted
    fresh = DendriteCallback("score", "max")
    fresh.load_state_dict(dendrites.state_dict())
    for again in (pickle.loads(pickle.dumps(dendrites)), fresh):
        assert again.frontier == dendrites.frontier
        other = classifier(seed=3)
        again.take(other, parameters=dendrites.frontier[0]["parameters"])
        assert same_bits(bits(other), at(script, 0.5))


@pytest.mark.parametrize("given", [{}, {"around": ["net"], "fan_in": 2, "max_parameters": 180, "sets": 3}])
def test_a_resumed_fit_has_the_sizes_of_one_that_never_stopped(given: dict[str, Any], tmp_path: Path) -> None:
    def fit(folder: str, path: Path | None = None) -> DendriteCallback:
        dendrites = quick(growth_epochs=1, **given)
        train(
            classifier(),
            dendrites,
            keep_all(tmp_path / folder),
            max_epochs=12,
            ckpt_path=path,
            enable_checkpointing=True,
        )
        return dendrites

    def sizes(dendrites: DendriteCallback) -> list[dict[str, Tensor]]:
        models = [classifier() for _ in dendrites.frontier]
        for model, size in zip(models, dendrites.frontier, strict=True):
            dendrites.take(model, parameters=size["parameters"])
        return [bits(model) for model in models]

    whole = fit("whole")
    assert len(whole.frontier) == (4 if given else 3)
    paths = sorted((tmp_path / "whole").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in paths[2:-1:4]:
        torch.load(path, weights_only=True)
        resumed = fit(f"from {path.stem}", path)
        assert resumed.frontier == whole.frontier
        assert all(map(same_bits, sizes(resumed), sizes(whole)))


def test_an_older_checkpoint_has_no_sizes_and_goes_on(tmp_path: Path) -> None:
    train(classifier(), quick(), max_epochs=3).save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    (state,) = (state for name, state in checkpoint["callbacks"].items() if "Dendrite" in name)
    del state["frontier"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    dendrites = quick()
    train(classifier(), dendrites, max_epochs=12, ckpt_path=tmp_path / "old.ckpt")
    assert scores(dendrites)[-1] == dendrites.best_model_score


# -- what it takes -----------------------------------------------------------------------------------------------------


class Frozen(Classifier):
    """4 MB that are never trained, and a small network behind."""

    def __init__(self) -> None:
        super().__init__(hidden=5)
        self.backbone = nn.Linear(1000, 1000).requires_grad_(False)


def weights_of(dendrites: DendriteCallback) -> list[dict[str, Any]]:
    state = dendrites.state_dict()
    return [*(size["weights"] for size in state["frontier"]["smaller"]), state["best"]["weights"]]


def test_what_never_changes_is_there_once_in_memory_in_pickles_and_in_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dendrites, _, model = scripted(Frozen(), exclude=["backbone"])
    one, sizes = held(model.state_dict()), weights_of(dendrites)
    assert len(sizes) == 3
    assert held(*sizes) < 1.01 * one
    assert len(pickle.dumps(dendrites)) < 1.02 * one
    trainer = L.Trainer(callbacks=[dendrites], max_epochs=0, **QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert (tmp_path / "end.ckpt").stat().st_size < 1.02 * one


class SavesAPart(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("backbone.weight", "backbone.bias"):
            del checkpoint["state_dict"][name]


def test_what_a_model_leaves_out_of_its_checkpoints_comes_back_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = SavesAPart(), tmp_path / "part.ckpt"
    train(model, quick(exclude=["backbone"]), max_epochs=7).save_checkpoint(path)
    assert path.stat().st_size < 10**6
    dendrites = quick(exclude=["backbone"])
    train(model, dendrites, max_epochs=12, ckpt_path=path)
    assert len(weights_of(dendrites)) > 1
    assert held(*weights_of(dendrites)) < 1.1 * held(model.state_dict())
    dendrites.take(fresh := SavesAPart(), parameters=dendrites.frontier[0]["parameters"])
    assert torch.equal(fresh.backbone.weight, model.backbone.weight)


def test_a_fit_takes_no_more_than_a_little_memory_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained differs from size to size."""
    model = classifier()
    one = held(model.state_dict())
    for most, keep, kept in [(0.9, None, [0.7]), (1.8, None, [0.65, 0.7]), (0.9, True, [0.5, 0.65, 0.7])]:
        monkeypatch.setattr(frontier, "_UNASKED", most * one)
        dendrites, script, _ = scripted(keep_sizes=keep)
        assert scores(dendrites) == pytest.approx(kept)
        sizes = weights_of(dendrites)
        assert held(*sizes) - held(sizes[-1]) <= most * one or keep
        dendrites.take(model)
        assert same_bits(bits(model), at(script, 0.7))
    dendrites, *_ = scripted(keep_sizes=False)
    assert scores(dendrites) == pytest.approx([0.7])


def test_what_would_be_too_much_is_not_there_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "_UNASKED", 2**20)
    model, machine = Big(), PhaseMachine()
    network, sizes = attach(model, targets=["net.1"]), frontier.Frontier(best(), None, "min")
    machine.step(0.5)
    sizes.keep(TRAINER, model, machine, network)
    network.grow(["net.1"])
    nn.init.ones_(model.net[0].weight)
    machine.step(0.4)
    assert allocated(lambda: sizes.keep(TRAINER, model, machine, network)) < 0.1 * held(model.state_dict())
    assert [record["score"] for record in sizes.records] == [0.4]


def test_a_backbone_that_is_trained_late_does_not_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "_UNASKED", 2**20)

    class Thaws(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if dendrites.cycle == 1 and dendrites.phase == "base" and len(dendrites.frontier) == 2:
                with torch.no_grad():
                    pl_module.backbone.weight.add_(1.0)

    torch.manual_seed(0)
    model = Frozen()
    dendrites = DendriteCallback(
        "score", "max", patience=2, max_tries=1, max_correlation_epochs=1, exclude=["backbone"], verbose=False
    )
    script = ScriptedScore(dendrites, SCRIPT)
    train(model, dendrites, script, Thaws(), max_epochs=60, data=loaders(128))
    assert 0.5 not in scores(dendrites)
    assert same_bits(bits(model), at(script, 0.7))
    assert held(*weights_of(dendrites)) < 1.1 * held(model.state_dict())


def test_on_the_disk_sizes_are_files_and_only_where_they_are_asked_for(tmp_path: Path) -> None:
    for keep, kept in [(None, [0.7]), (True, [0.5, 0.65, 0.7])]:
        folder = tmp_path / str(keep)
        dendrites, script, model = scripted(keep_sizes=keep, best_on="disk", dirpath=folder)
        assert scores(dendrites) == pytest.approx(kept)
        assert not any(weights_of(dendrites))
        assert len(list(folder.iterdir())) == len(kept)
        for score in kept:
            dendrites.take(model, score=score - 1e-6)
            assert same_bits(bits(model), at(script, score))
    fresh = DendriteCallback("score", "max", best_on="disk", dirpath=folder)
    fresh.load_state_dict(dendrites.state_dict())
    fresh.take(model, score=0.6)
    assert same_bits(bits(model), at(script, 0.65))
    before = bits(model)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="is neither in `dirpath` nor beside the checkpoint"):
        fresh.take(model, parameters=dendrites.frontier[0]["parameters"])
    assert same_bits(bits(model), before)
