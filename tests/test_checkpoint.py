"""Grown models come back from files: with a Trainer, without one, and into a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pl_dendrites import DendriteCallback, detach, load_from_checkpoint, restore_structure
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick, same_bits

pytestmark = pytest.mark.versions

X = torch.linspace(-2, 2, 20).reshape(5, 4)


def grown(tmp_path: Path, **settings: Any) -> tuple[L.Trainer, Classifier, DendriteCallback]:
    dendrites = quick(dirpath=tmp_path / "best", **settings)
    trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites], **QUIET)
    model = classifier(hidden=5)
    trainer.fit(model, *loaders())
    assert dendrites.num_dendrites > 0
    return trainer, model, dendrites


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, Classifier]:
    trainer, model, _ = grown(tmp_path)
    path = tmp_path / "end.ckpt"
    trainer.save_checkpoint(path)
    return path, model.eval()


def test_best_ckpt_is_the_best_model(tmp_path: Path) -> None:
    _, model, dendrites = grown(tmp_path)
    assert dendrites.best_model_path == str(tmp_path / "best" / "best.ckpt")
    again = load_from_checkpoint(Classifier, dendrites.best_model_path)
    assert same_bits(bits(again), bits(model))


def test_without_dirpath_there_is_no_file(tmp_path: Path) -> None:
    dendrites = quick()
    L.Trainer(max_epochs=3, callbacks=[dendrites], **QUIET).fit(classifier(), *loaders())
    assert dendrites.best_model_path == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_load_from_checkpoint_needs_no_trainer_and_no_callback(tmp_path: Path, save_weights_only: bool) -> None:
    trainer, model, _ = grown(tmp_path)
    path = tmp_path / "file.ckpt"
    trainer.save_checkpoint(path, weights_only=save_weights_only)
    again = load_from_checkpoint(Classifier, path)
    assert again.hparams.hidden == 5
    assert torch.equal(again.eval()(X), model.eval()(X))


def test_load_from_checkpoint_of_a_plain_model_and_with_other_arguments(tmp_path: Path) -> None:
    model = classifier(hidden=5)
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, *loaders())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "plain.ckpt", dropout=0.7, map_location="cpu")
    assert same_bits(bits(again), bits(model))
    assert again.net[3].p == 0.7


def test_trainer_test_loads_a_grown_checkpoint_into_a_plain_model(file: tuple[Path, Classifier]) -> None:
    path, model = file
    fresh = classifier(hidden=5, seed=9)
    trainer = L.Trainer(callbacks=[quick()], **QUIET)
    scores = trainer.test(fresh, loaders()[1], ckpt_path=path, verbose=False)[0]
    assert same_bits(bits(fresh), bits(model))
    assert scores == trainer.test(model, loaders()[1], verbose=False)[0]


def test_trainer_test_after_a_fit_loads_an_older_smaller_one_and_leaves_the_history_alone(tmp_path: Path) -> None:
    dendrites = quick()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites, keep], **(QUIET | {"enable_checkpointing": True}))
    model = classifier()
    trainer.fit(model, *loaders())
    history, count = list(dendrites.history), len(bits(model))
    trainer.test(model, loaders()[1], ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert len(bits(model)) < count
    assert dendrites.history == history
    trainer.predict(
        model, torch.utils.data.DataLoader(X), ckpt_path=tmp_path / f"epoch={trainer.current_epoch - 1}.ckpt"
    )
    assert len(bits(model)) == count


def test_fit_resumes_into_a_plain_model(file: tuple[Path, Classifier]) -> None:
    """From a file that was saved after the fit: training is over, and the best model is in hand."""
    path, model = file
    fresh, dendrites = classifier(hidden=5, seed=9), quick()
    trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites], **QUIET)
    trainer.fit(fresh, *loaders(), ckpt_path=path)
    assert same_bits(bits(fresh), bits(model))
    assert dendrites.stop_reason


def test_a_fit_that_max_epochs_ended_goes_on_from_the_best_model(tmp_path: Path) -> None:
    """Saved after the fit, in the middle of a correlation phase and of a trial: both were given up, and it goes on."""
    for epochs in (3, 5):
        first = quick(max_correlation_epochs=3, base_epochs=2)
        trainer = L.Trainer(max_epochs=epochs, callbacks=[first], **QUIET)
        trainer.fit(classifier(), *loaders())
        trainer.save_checkpoint(tmp_path / "ended.ckpt")
        more = quick(max_correlation_epochs=3, base_epochs=2)
        trainer = L.Trainer(max_epochs=epochs + 9, callbacks=[more], **QUIET)
        trainer.fit(classifier(seed=3), *loaders(), ckpt_path=tmp_path / "ended.ckpt")
        assert more.history[: len(first.history)] == first.history
        assert more.num_dendrites > 0


def test_restore_structure_with_plain_torch(file: tuple[Path, Classifier]) -> None:
    path, model = file
    state_dict = torch.load(path, weights_only=True)["state_dict"]
    fresh = Classifier(hidden=5)
    restore_structure(fresh, state_dict)
    fresh.load_state_dict(state_dict)
    assert torch.equal(fresh.eval()(X), model(X))


def test_a_checkpoint_from_before_the_callback_was_added_is_a_start(tmp_path: Path) -> None:
    """Weights of a plain run go into a run with dendrites; a plain run takes the plain part back."""
    plain = classifier()
    trainer = L.Trainer(max_epochs=2, **QUIET)
    trainer.fit(plain, *loaders())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    dendrites, model = quick(), classifier(seed=4)
    trainer = L.Trainer(max_epochs=12, callbacks=[dendrites], **QUIET)
    trainer.fit(model, *loaders(), ckpt_path=tmp_path / "plain.ckpt")
    assert len(dendrites.history) > 2
    detach(model)
    classifier().load_state_dict(model.state_dict())


def test_everything_in_a_checkpoint_is_tensors_and_plain_values(file: tuple[Path, Classifier]) -> None:
    state = torch.load(file[0], weights_only=True)["callbacks"]
    (ours,) = [value for key, value in state.items() if "DendriteCallback" in key]
    assert ours["format"] == 3
    plain = (torch.Tensor, str, int, float, bool, type(None))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(type(key) in (str, int) for key in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert isinstance(value, plain)

    check(ours)
