"""``pytorch_lightning`` has classes of its own, and its users are served too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as its
import torch
from pytorch_lightning.callbacks import EarlyStopping as ItsEarlyStopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pl_dendrites import load_from_checkpoint
from tests.models import Classifier, bits, classifier, loaders, quick, same_bits, train

pytestmark = pytest.mark.versions


class Model(its.LightningModule):
    """As the classifier of the other tests, in the other tree."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = Classifier(hidden).net

    forward = Classifier.forward
    training_step = Classifier.training_step
    validation_step = Classifier.validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def fit(model: Model, *callbacks: Any, ckpt_path: Any = None, **settings: Any) -> its.Trainer:
    defaults = {"max_epochs": -1, "accelerator": "cpu", "enable_model_summary": False, "enable_progress_bar": False}
    trainer = its.Trainer(callbacks=list(callbacks), **(defaults | settings))
    trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
    return trainer


def test_two_cycles_as_in_the_other_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dendrites = Model(), quick(verbose=True, dirpath=str(tmp_path))
    bar = its.callbacks.TQDMProgressBar()
    logger = its.loggers.TensorBoardLogger(tmp_path)
    fit(model, dendrites, bar, logger=logger, enable_progress_bar=True)
    other, expected = classifier(), quick()
    train(other, expected)
    assert [record["phase"] for record in dendrites.history] == ["base", *["correlation", "base"] * 2]
    assert dendrites.history == expected.history
    assert same_bits(bits(model), bits(other))

    assert "phase=correlation, dendrites=1" in capsys.readouterr().out
    assert "get_metrics" not in vars(bar)
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["dendrites/growth"]
    assert "dendrites/decisions/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/experiment" in events.PluginTagToContent("hparams")

    loaded = load_from_checkpoint(Model, tmp_path / "best.ckpt")
    assert loaded.net[0].dendrites.count == model.net[0].dendrites.count > 0


def test_a_resumed_fit_ends_in_the_same_bits() -> None:
    whole, model = Model(), Model()
    fit(whole, quick(max_dendrites=1), logger=False, enable_checkpointing=False)
    trainer = fit(model, quick(max_dendrites=1), logger=False, max_epochs=3)  # in a correlation phase
    resumed = Model()
    fit(resumed, quick(max_dendrites=1), ckpt_path=trainer.checkpoint_callback.best_model_path, logger=False)
    assert same_bits(bits(resumed), bits(whole))


def test_its_early_stopping_is_known() -> None:
    with pytest.raises(Exception, match=r"EarlyStopping.*would end training at the first plateau"):
        fit(Model(), quick(), ItsEarlyStopping("val_loss"), logger=False)
    dendrites = quick(max_dendrites=1, max_correlation_epochs=3)
    fit(Model(), dendrites, ItsEarlyStopping("val_acc", mode="max", patience=2, min_delta=-1), logger=False)
    assert dendrites.stop_reason
