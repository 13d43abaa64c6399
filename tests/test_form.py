"""Which form dendrites have where nobody says: what the first batch tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_dendrites import DendriteCallback, forming
from pl_dendrites.core import Soma
from pl_dendrites.core.growth.hooks import attached_layers
from pl_dendrites.training import attaching
from tests.models import QUIET, Classifier, bits, classifier, loaders, same_bits


class Whole(Classifier):
    """Calls one module for all that it knows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Direct(Whole):
    """Never calls itself."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Parts(Direct):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.forward(batch[0]), batch[1])


class Boxed(nn.Module):
    """What does the work is inside, and gets a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = mlp()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inside(batch["x"])


class InABox(Direct):
    def __init__(self) -> None:
        super().__init__(Boxed())

    def forward(self, x: Tensor) -> Tensor:
        return self.net({"x": x})

    training_step = Parts.training_step


class MeanOfPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x.unflatten(1, (2, 2))).mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2))


def fit(model: L.LightningModule, epochs: int = 6, **given: Any) -> DendriteCallback:
    dendrites = DendriteCallback(
        "val_loss", base_epochs=2, max_correlation_epochs=1, max_tries=0, verbose=False, **given
    )
    trainer = L.Trainer(callbacks=[dendrites], max_epochs=epochs, **QUIET)
    trainer.fit(model, *loaders())
    return dendrites


@pytest.mark.parametrize(
    ("model", "around", "reason"),
    [
        (lambda: Whole(mlp()), "", "the model itself maps 4 inputs to 2 outputs"),
        (lambda: Direct(mlp()), "net", "'net' maps 4 inputs to 2 outputs"),
        (lambda: Direct(nn.Linear(4, 2)), "net", "'net' maps"),
        (InABox, "net.inside", "'net.inside' maps"),
        (lambda: Direct(Soma(4, 2)), "net", "neuron bodies"),
        (Parts, None, "it calls 'net', 'head'"),
        (lambda: Direct(convolution()), None, "'net': it has a Conv1d"),
        (lambda: Direct(MeanOfPositions()), None, "no layer of it sees all 4"),
    ],
)
def test_shared_around_a_network_of_fully_connected_layers_and_private_elsewhere(
    model: Any, around: str | None, reason: str
) -> None:
    model = model()
    dendrites = fit(model, max_dendrites=1)
    record = dendrites.history[-1]
    assert record["form"] == ("private" if around is None else "shared")
    assert reason in record["form_reason"]
    assert dendrites.network is not None
    if around is not None:
        assert list(dendrites.network.layers) == [name for name, _ in attached_layers(model)] == [around]
    assert dendrites.num_dendrites > 0 or "did not help" in dendrites.stop_reason


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"form": "private"}, "private"),
        ({"targets": ["net.0"]}, "private"),
        ({"learning": "gradient"}, "private"),
        ({"learning": "correlation"}, "shared"),
        ({"max_parameters": 100}, "shared"),
        ({"around": ["net.3"]}, "shared"),
    ],
)
def test_what_is_said_wins(given: dict[str, Any], form: str) -> None:
    dendrites = fit(Direct(mlp()), 2, **given)
    assert dendrites.history[0]["form"] == form


def test_the_report_says_why(tmp_path: Path) -> None:
    dendrites = fit(Direct(mlp()), 2)
    dendrites.report(tmp_path / "report.md")
    said = "Dendrites are shared: 'net' maps 4 inputs to 2 outputs through fully connected layers."
    assert said in (tmp_path / "report.md").read_text().replace("\\", "")


def test_a_budget_for_which_there_is_no_place_ends_the_fit_with_the_reason() -> None:
    with pytest.raises(MisconfigurationException, match="have no place: 'net': it has a Conv1d"):
        fit(Direct(convolution()), max_parameters=100)


def test_a_model_that_is_called_for_its_steps_is_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP calls it with batches for losses."""
    for file in (forming, attaching):
        monkeypatch.setattr(file, "calls_for_steps", lambda trainer: True)
    record = fit(Whole(mlp()), 2).history[0]
    assert record["form"] == "private"
    assert "Let a module of the model be its network" in record["form_reason"]
    assert fit(Direct(mlp()), 2).history[0]["form"] == "shared"
    with pytest.raises(MisconfigurationException, match="'' cannot be, for this strategy calls the model"):
        fit(Whole(mlp()), 2, around=[""])


def assert_as_many_hooks_as_where_nobody_watches(model: nn.Module) -> None:
    plain = Whole(convolution())
    fit(plain, 1, max_dendrites=0, form="private")
    for own, other in zip(model.modules(), plain.modules(), strict=True):
        assert len(own._forward_hooks) == len(other._forward_hooks)
        assert len(own._forward_pre_hooks) == len(other._forward_pre_hooks)


def test_nothing_is_left_of_watching_the_first_batch() -> None:
    model = Whole(convolution())
    fit(model, 1, max_dendrites=0)
    assert_as_many_hooks_as_where_nobody_watches(model)


def test_nothing_is_left_where_the_first_batch_fails() -> None:
    class Fails(Whole):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("out of data")

    model = Fails(convolution())
    with pytest.raises(RuntimeError, match="out of data"):
        fit(model, 1, max_dendrites=0)
    assert_as_many_hooks_as_where_nobody_watches(model)


def test_nothing_is_left_where_a_first_batch_is_skipped() -> None:
    class Skips(Whole):
        def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 else None

    model = Skips(convolution())
    fit(model, 2, max_dendrites=0)
    assert_as_many_hooks_as_where_nobody_watches(model)


def test_a_resumed_fit_takes_over_what_the_model_has(tmp_path: Path) -> None:
    """Saved by a callback that was told where dendrites hang, it does not say why."""
    model = classifier()
    told = DendriteCallback("val_loss", base_epochs=2, max_parameters=120, sets=1, around=["net"], verbose=False)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = QUIET | {"enable_checkpointing": True}
    L.Trainer(callbacks=[told, saver], max_epochs=4, **settings).fit(model, *loaders())
    again = DendriteCallback("val_loss", base_epochs=2, max_parameters=120, sets=1, verbose=False)
    L.Trainer(callbacks=[again], max_epochs=4, **QUIET).fit(
        classifier(), *loaders(), ckpt_path=tmp_path / "epoch=2.ckpt"
    )
    assert again.network is not None
    assert list(again.network.layers) == ["net"]
    assert again.history[-1]["form_reason"] == "the model has shared dendrites"


def test_watching_changes_nothing_that_is_trained() -> None:
    trained = []
    for form in (None, "private"):
        torch.manual_seed(0)
        model = Whole(mlp())
        fit(model, 2, max_dendrites=0, form=form)
        trained.append(bits(model))
    assert same_bits(*trained)
