"""Callbacks and models that libraries copy and pickle, before, during and after a fit."""

from __future__ import annotations

import copy
import enum
import io
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from pl_dendrites import DendriteCallback
from tests.models import QUIET, Classifier, classifier, loaders, quick, same_bits, train

X = torch.linspace(-2, 2, 20).reshape(5, 4)


class Classes(pickle.Unpickler):
    """Notes what a pickle is made of."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.modules: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.modules.add(module)
        return super().find_class(module, name)


def saved_whole(model: Classifier) -> Classifier:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again: Classifier = torch.load(file, weights_only=False)
    return again


def check_callback(callback: DendriteCallback) -> None:
    """A copy tells what the original does, and holds the best network and nothing else that is large."""
    data = pickle.dumps(callback)
    reader = Classes(data)
    for again in (reader.load(), copy.deepcopy(callback)):
        assert again.summary() == callback.summary()
        for name in ("history", "phase", "cycle", "num_dendrites", "best_model_score", "stop_reason", "monitor"):
            assert getattr(again, name) == getattr(callback, name), name
        assert again.network is None
        own, copied = (c.state_dict().get("best", {}).get("weights") or {} for c in (callback, again))
        assert same_bits(own, copied)
    assert not any(name.startswith(("lightning", "tests", "torch.nn")) for name in reader.modules), reader.modules
    state = io.BytesIO()
    torch.save(callback.state_dict(), state)
    assert len(data) < 1500 + 2 * len(state.getvalue())


def check_model(model: Classifier, make_copy: Callable[[Any], Any]) -> None:
    again, mode = make_copy(model), model.training
    assert again._trainer is None
    assert again.training_step.__self__ is again
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(again.eval()(X), model.eval()(X))
    model.train(mode)


class Copies(L.Callback):
    """Copies after some batches."""

    def __init__(self, of: DendriteCallback) -> None:
        self.of, self.phases = of, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in (3, 11, 18):
            self.phases.append((self.of.phase, self.of.num_dendrites))
            check_callback(self.of)
            for make_copy in (saved_whole, copy.deepcopy):
                check_model(pl_module, make_copy)


def test_copies_and_pickles_before_during_and_after_a_fit() -> None:
    dendrites, model = quick(max_dendrites=1), classifier(hidden=5)
    check_callback(dendrites)
    copies = Copies(dendrites)
    train(model, dendrites, copies)
    assert copies.phases == [("base", 0), ("correlation", 0), ("base", 1)]
    check_callback(dendrites)
    for make_copy in (saved_whole, copy.deepcopy):
        check_model(model, make_copy)
    again = pickle.loads(pickle.dumps(dendrites))
    train(classifier(hidden=5), again)
    assert again.history == dendrites.history


def test_a_callback_that_was_copied_before_the_fit_says_where_to_look() -> None:
    """NeuralForecast fits with a deep copy of the Trainer's arguments."""
    dendrites = quick(max_dendrites=1)
    settings = {"callbacks": [dendrites], "max_epochs": 3, **QUIET}
    trainer = L.Trainer(**copy.deepcopy(settings))
    trainer.fit(classifier(), *loaders())
    assert "never saw a fit" in dendrites.summary()
    assert "trainer.callbacks" in dendrites.summary()
    with pytest.raises(ValueError, match="never saw a fit"):
        dendrites.report("report.md")
    (fitted,) = (callback for callback in trainer.callbacks if isinstance(callback, DendriteCallback))
    assert fitted.summary().startswith("cycle")


class Mode(str, enum.Enum):
    MIN = "min"


def test_arguments_of_numpy_and_of_derived_types_are_plain_values() -> None:
    """They go into checkpoints, which are read with ``weights_only=True``."""
    given = {
        "monitor": np.str_("val_loss"),
        "mode": Mode.MIN,
        "targets": np.array(["Linear"]),
        "exclude": (np.str_("net.4"),),
        "max_dendrites": np.int64(2),
        "fan_in": np.float32(0.5),
        "share": np.float64(0.5),
        "patience": np.int32(3),
        "min_delta": np.float32(0.25),
        "restart": np.bool_(False),
        "activation": np.str_("relu"),
        "dirpath": np.str_("best"),
    }
    dendrites = DendriteCallback(**given)
    plain = DendriteCallback(**{name: getattr(value, "tolist", lambda v=value: v)() for name, value in given.items()})
    own, other = vars(dendrites._settings), vars(plain._settings)
    assert own == other
    waiting: list[Any] = [dendrites.monitor, dendrites.mode, *own.values()]
    while waiting:
        value = waiting.pop()
        assert type(value) in (str, int, float, bool, list, tuple, dict, type(None)), value
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [])
    with pytest.raises(ValueError, match="`patience` must be an integer of at least 1, got 0"):
        DendriteCallback("val_loss", patience=np.int64(0))
