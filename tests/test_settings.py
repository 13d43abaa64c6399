"""Under every setting of a Trainer dendrites grow, decisions come when they should, and the best model is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.combinations import Stream, half_precision, streamed, two_validations
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick, same_bits, train

PHASES = ["base", "correlation", "base"]


class Sized(Stream):
    """The usual data, read once through, with a length."""

    def __len__(self) -> int:
        return 128


def sized() -> tuple[DataLoader, DataLoader]:
    return DataLoader(Sized(), 32), DataLoader(Sized(), 32)


# What the Trainer is given: its settings, and the callback's, and the data.
GROWS: dict[str, tuple[dict[str, Any] | Callable[[], dict[str, Any]], dict[str, Any], Callable[[], Any]]] = {
    "two validations an epoch": ({"val_check_interval": 0.5}, {}, loaders),
    "validation beyond an epoch": (
        {"val_check_interval": 6, "check_val_every_n_epoch": None},
        {"base_epochs": 4},
        loaders,
    ),
    "validation in every other epoch": ({"check_val_every_n_epoch": 2}, {}, loaders),
    "overfit_batches": ({"overfit_batches": 2}, {}, loaders),
    "limited batches": ({"limit_train_batches": 3, "limit_val_batches": 1}, {}, loaders),
    "limited shares": ({"limit_train_batches": 0.5, "limit_val_batches": 0.5}, {}, loaders),
    "no sanity check": ({"num_sanity_val_steps": 0}, {}, loaders),
    "a whole sanity check": ({"num_sanity_val_steps": -1}, {}, lambda: loaders(16)),
    "max_epochs left alone": ({"max_epochs": None}, {}, loaders),
    "max_steps": ({"max_steps": 22}, {}, loaders),
    "a stream": ({}, {}, streamed),
    "streams with a length": ({}, {}, sized),
    "reloaded": ({"reload_dataloaders_every_n_epochs": 1}, {}, loaders),
    "clipped by norm": ({"gradient_clip_val": 0.1}, {}, loaders),
    "clipped by value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}, loaders),
    "anomalies": ({"detect_anomaly": True}, {}, loaders),
    "no inference mode": ({"inference_mode": False}, {}, loaders),
    "accumulation of 3 of 4": ({"accumulate_grad_batches": 3}, {}, loaders),
    "accumulation beyond an epoch": ({"accumulate_grad_batches": 10}, {}, loaders),
    "profiled": ({"profiler": "simple"}, {}, loaders),
    "deterministic": ({"deterministic": True}, {}, loaders),
    "64-true": ({"precision": "64-true"}, {}, loaders),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {}, loaders),
    "bf16-true": ({"precision": "bf16-true"}, {}, loaders),
    "16-mixed": (half_precision, {}, loaders),
}


@pytest.mark.parametrize("name", GROWS)
def test_dendrites_grow_and_the_best_model_is_left(name: str) -> None:
    settings, of_callback, data = GROWS[name]
    if callable(settings):
        settings = settings()
    dendrites, model = quick(max_dendrites=1, **of_callback), classifier()
    trainer = train(model, dendrites, data=data(), **settings)
    length = of_callback.get("base_epochs", 2)
    assert [record["phase"] for record in dendrites.history] == PHASES
    assert [record["epochs"] for record in dendrites.history] == [length, 2, length]
    assert dendrites.num_dendrites == 1
    assert dendrites.history[-1]["accepted"]
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "dendrites.0.weights" in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if "dendrites" not in name)
    score = trainer.validate(model, data()[1], verbose=False)[0]["val_loss"]
    assert score == dendrites.best_model_score


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"val_check_interval": 0.5}, [2, 2, 2]),
        ({"check_val_every_n_epoch": 2}, [8, 2, 8]),
        ({"val_check_interval": 6, "check_val_every_n_epoch": None}, [6, 2, 6]),
    ],
    ids=["twice an epoch", "every other epoch", "every six batches"],
)
def test_patience_counts_validations(settings: dict[str, Any], epochs: list[int]) -> None:
    """Four of them without improvement; nothing improves by so much but the first, which is the mark."""
    dendrites = quick(base_epochs=None, patience=3, min_delta=10.0, max_dendrites=1, max_tries=0)
    train(classifier(), dendrites, **settings)
    assert [record["epochs"] for record in dendrites.history] == epochs


@pytest.mark.parametrize(
    ("settings", "activation"),
    [
        ({}, "tanh"),
        ({"learning": "hybrid"}, "gelu"),
        ({"learning": "gradient"}, "gelu"),
        ({"activation": "relu"}, "relu"),
        ({"learning": "hybrid", "activation": "tanh"}, "tanh"),
    ],
)
def test_the_activation_is_the_one_asked_for_or_that_of_the_rule(settings: dict[str, Any], activation: str) -> None:
    dendrites = quick(max_dendrites=1, **settings)
    train(classifier(), dendrites)
    stacks = [stack for layer in dendrites.network.layers.values() for stack in layer]
    assert {stack.form.activation for stack in stacks} == {activation}


def test_several_validation_loaders() -> None:
    dendrites, model = quick("val_loss/dataloader_idx_1", max_dendrites=1), classifier()
    trainer = train(model, dendrites, data=two_validations())
    scores = trainer.validate(model, two_validations()[1], verbose=False)
    assert dendrites.num_dendrites == 1
    assert scores[1]["val_loss/dataloader_idx_1"] == dendrites.best_model_score


def test_no_validation_and_a_training_metric() -> None:
    dendrites = quick("train_loss", max_dendrites=1)
    train(classifier(), dendrites, data=loaders()[:1])
    assert dendrites.num_dendrites == 1
    assert dendrites.best_model_score == min(r["score"] for r in dendrites.history if r["phase"] == "base")


@pytest.mark.parametrize("batches", [True, 5])
def test_fast_dev_run_breaks_nothing(batches: int) -> None:
    dendrites, model = quick(), classifier()
    trainer = train(model, dendrites, fast_dev_run=batches)
    assert [record["phase"] for record in dendrites.history] == ["base"]
    assert trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"] == dendrites.best_model_score


def test_min_epochs_trains_on_after_growth_is_over() -> None:
    dendrites, model = quick(max_dendrites=1), classifier()
    trainer = train(model, dendrites, min_epochs=12)
    assert trainer.current_epoch == 12
    assert [record["epochs"] for record in dendrites.history] == [2, 2, 8]
    assert trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"] == dendrites.best_model_score


def test_barebones_is_refused() -> None:
    trainer = L.Trainer(barebones=True, callbacks=[quick()], max_epochs=2, accelerator="cpu")
    with pytest.raises(MisconfigurationException, match=r"barebones=True\) logs no metrics.*'val_loss'"):
        trainer.fit(classifier(), *loaders())


def test_what_is_shown_changes_nothing(tmp_path: Path) -> None:
    plain, shown = quick(), quick()
    one, other = classifier(), classifier()
    train(one, plain)
    logger = CSVLogger(tmp_path)
    train(other, shown, logger=logger, log_every_n_steps=1, enable_progress_bar=True, enable_model_summary=True)
    assert shown.history == plain.history
    assert same_bits(bits(one), bits(other))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts(backend: str) -> None:
    dendrites, model = quick(max_dendrites=1), classifier()
    model.net = torch.compile(model.net, backend=backend)
    trainer = train(model, dendrites)
    assert dendrites.num_dendrites == 1
    score = trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"]
    assert score == pytest.approx(dendrites.best_model_score)


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_second_fit_with_the_same_callback_goes_on(same_trainer: bool) -> None:
    dendrites, model = quick(max_dendrites=2, max_tries=0), classifier()
    trainer = train(model, dendrites, max_epochs=6)
    assert dendrites.num_dendrites == 1
    if same_trainer:
        trainer.fit_loop.max_epochs = 12
        trainer.fit(model, *loaders())
    else:
        trainer = train(model, dendrites)
    assert dendrites.history[0]["dendrites"] == 1
    assert dendrites.history[0]["cycle"] == 0
    assert trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"] == dendrites.best_model_score


def test_validate_test_and_predict_before_between_and_after(tmp_path: Path) -> None:
    dendrites, model = quick(max_dendrites=1), classifier()
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", mode="min", save_last=True)
    trainer = L.Trainer(callbacks=[dendrites, keep], **(QUIET | {"enable_checkpointing": True, "max_epochs": -1}))
    model.predict_step = lambda batch, batch_idx: model(batch[0])
    data = loaders()[1]
    for run in (trainer.validate, trainer.test):
        run(model, data, verbose=False)
    trainer.predict(model, data)
    assert dendrites.history == []
    trainer.fit(model, *loaders())
    history, weights = dendrites.history, bits(model)
    for path in (None, "best", "last"):
        for run in (trainer.validate, trainer.test):
            score = run(model, data, ckpt_path=path, verbose=False)[0]["val_loss"]
            assert path == "last" or score == dendrites.best_model_score
        assert len(trainer.predict(model, data, ckpt_path=path)) == 2
    trainer.validate(model, data, ckpt_path="best", verbose=False)
    assert same_bits(bits(model), weights)
    assert dendrites.history is history
    train(model, dendrites, max_epochs=2)
    assert dendrites.history[0]["dendrites"] == 1


@torch._dynamo.disable
def log(module: L.LightningModule, loss: Tensor) -> None:
    """Dynamo cannot trace Lightning's own, with or without dendrites."""
    module.log("val_loss", loss)


class LogsUncompiled(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        log(self, self.training_step(batch, batch_idx))


def test_a_whole_module_that_is_compiled_grows_as_one_that_is_not() -> None:
    histories = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model: Any = LogsUncompiled()
        dendrites = quick(max_dendrites=1)
        train(torch.compile(model, backend="eager") if compiled else model, dendrites)
        histories.append(dendrites.history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_candidates_of_half_precision_learn_with_a_step_computed_in_single(dtype: torch.dtype) -> None:
    """Squares of small gradients are zero in float16, and Adam divides by their root."""
    model = classifier().to(dtype)
    data = [DataLoader([(x.to(dtype), y) for x, y in loader], batch_size=None) for loader in loaders()]
    steps: list[Tensor] = []
    dendrites = quick(max_dendrites=1, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if dendrites.phase == "correlation":
                steps.append(torch.cat([p.detach().flatten() for p in dendrites.network.candidate_parameters()]))

    model.optimizers_of = lambda model: torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, dendrites, Watch(), data=data)
    assert {step.dtype for step in steps} == {dtype}
    assert all(step.isfinite().all() for step in steps)
    moved = (steps[1].float() - steps[0].float()).abs()
    assert 0.001 < moved.max() < 0.02, "Adam moves each parameter by about its learning rate"
    assert all(value.isfinite().all() for value in bits(model).values())


def test_candidates_step_once_in_so_many_batches_with_the_gradients_of_all() -> None:
    """And with those that are left at the end of an epoch."""

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            steps.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])

    found = {}
    for batches in (1, 3):
        steps: list[list[torch.Tensor]] = []
        found[batches] = steps
        dendrites = quick(
            candidate_batches=batches, optimizer=lambda p: Watched(p, lr=1.0), max_dendrites=1, max_tries=0
        )
        train(classifier(), dendrites)
    every, (first, rest) = found[1], found[3][:2]
    assert (len(every), len(found[3])) == (8, 4)
    for parameter, (together, left) in enumerate(zip(first, rest, strict=True)):
        gradients = [step[parameter] for step in every]
        torch.testing.assert_close(together, gradients[0] + gradients[1] + gradients[2])
        torch.testing.assert_close(left, gradients[3])
