"""The score: where the metric comes from, when it is read, and what a fit does that never sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from tests.models import Classifier, bits, classifier, loaders, quick, same_bits, train

# -- a metric of training, whenever it is logged ------------------------------------------------------------------


class Late(Classifier):
    """Computes its metric when an epoch ends, every so many epochs."""

    every = 1

    def on_train_epoch_end(self) -> None:
        if self.current_epoch % self.every == 0:
            self.log("late", float(self.current_epoch))


class LateCallback(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("late", float(trainer.current_epoch))


class Put(L.Callback):
    """Puts a value where callbacks read, past all logging."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        trainer.callback_metrics["late"] = torch.tensor(float(trainer.current_epoch))


def late(every: int = 1) -> Late:
    torch.manual_seed(0)
    model = Late()
    model.every = every
    return model


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("validations", [{}, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}], ids=str)
@pytest.mark.parametrize(
    ("make", "callbacks"),
    [(late, []), (classifier, [LateCallback()]), (classifier, [Put()])],
    ids=["by the model", "by a later callback", "past all logging"],
)
def test_it_is_that_of_the_epoch_which_ends(
    make: Callable[[], Classifier], callbacks: list[L.Callback], validations: dict[str, int], sanity: int
) -> None:
    dendrites = quick("late", mode="max", base_epochs=4, max_dendrites=0)
    model = make()
    train(model, dendrites, *callbacks, num_sanity_val_steps=sanity, **validations)
    assert dendrites.history[0]["scores"] == [0.0, 1.0, 2.0, 3.0]
    assert "on_train_epoch_end" not in vars(model)


def test_one_that_is_measured_in_some_epochs_is_read_in_those() -> None:
    dendrites = quick("late", mode="max", base_epochs=7, max_dendrites=0)
    train(late(every=3), dendrites, limit_val_batches=0, max_epochs=7)
    assert dendrites.history[0]["scores"] == [0.0, 3.0, 6.0]


def test_an_error_between_leaves_the_model_as_it_was() -> None:
    class Boom(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            raise RuntimeError("boom")

    model = late()
    with pytest.raises(RuntimeError, match="boom"):
        train(model, quick("late"), Boom())
    assert "on_train_epoch_end" not in vars(model)


# -- one name for two metrics -------------------------------------------------------------------------------------


class OneName(L.LightningModule):
    """Learns noise by heart: the training loss falls, that of validation rises, and both have one name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))

    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.step(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Validations(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["loss"]))
            self.weights.append(bits(pl_module))


def noise(seed: int) -> torch.utils.data.DataLoader:
    g = torch.Generator().manual_seed(seed)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8, generator=g), torch.randn(64, 1, generator=g))
    return torch.utils.data.DataLoader(data, 16)


@pytest.mark.parametrize("settings", [{"base_epochs": 12}, {"base_epochs": None, "patience": 3}, {"base_epochs": 1}])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_validation_decides_from_the_first_time_that_it_logs_the_name(
    every: int, sanity: int, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, seen, dendrites = OneName(), Validations(), quick("loss", max_dendrites=0, **settings)
    data = noise(0), noise(1)
    train(model, seen, dendrites, data=data, check_val_every_n_epoch=every, num_sanity_val_steps=sanity)
    assert dendrites.history[0]["scores"] == pytest.approx(seen.losses)
    assert dendrites.best_model_score == pytest.approx(min(seen.losses))
    best = seen.weights[seen.losses.index(min(seen.losses))]
    assert same_bits(bits(model), best)


def test_no_set_grows_by_scores_of_training_that_will_not_decide() -> None:
    torch.manual_seed(0)
    model, dendrites = OneName(), quick("loss", base_epochs=2)
    train(model, dendrites, data=(noise(0), noise(1)), check_val_every_n_epoch=5, num_sanity_val_steps=0, max_epochs=12)
    assert [record["epochs"] for record in dendrites.history[:2]] == [5, 2]


# -- a metric that never comes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"base_epochs": 2}, {"base_epochs": None, "patience": 1}])
@pytest.mark.parametrize("sanity", [0, 2])
def test_one_that_is_never_logged_in_time_is_an_error_with_what_is_logged(
    sanity: int, settings: dict[str, Any]
) -> None:
    logged = r"by the end of training\. Logged are: \['train_loss'\].*`check_val_every_n_epoch`"
    dendrites, model = quick("val_los", **settings), classifier()
    with pytest.raises(MisconfigurationException, match=rf"monitor='val_los'.*{logged}"):
        train(model, dendrites, check_val_every_n_epoch=9, max_epochs=4, num_sanity_val_steps=sanity)
    assert all(p.requires_grad for p in model.parameters())


def test_one_that_a_validation_would_have_logged_is_none() -> None:
    dendrites = quick()
    with pytest.warns(UserWarning, match="the model has no dendrites"):
        train(classifier(), dendrites, check_val_every_n_epoch=9, max_epochs=4)
    assert dendrites.history[0]["scores"] == []


@pytest.mark.parametrize(("base_epochs", "every", "expected"), [(1, 3, 3), (2, 3, 3), (2, 5, 5), (4, 3, 4)])
def test_a_base_phase_without_a_score_waits_for_one(base_epochs: int, every: int, expected: int) -> None:
    dendrites = quick(base_epochs=base_epochs, max_dendrites=1)
    train(classifier(), dendrites, check_val_every_n_epoch=every)
    base = [record for record in dendrites.history if record["phase"] == "base"]
    assert base[0]["epochs"] == expected
    assert all(record["scores"] for record in base)


# -- a resume with another metric ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.ckpt"
    train(classifier(), quick(), max_epochs=5).save_checkpoint(path)
    return path


@pytest.mark.parametrize("other", [{"monitor": "val_acc", "mode": "max"}, {"monitor": "train_loss"}, {"mode": "max"}])
@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_of_another_metric_is_refused(
    other: dict[str, str], old: bool, saved: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(saved, weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    assert (state["monitor"], state["mode"]) == ("val_loss", "min")
    if old:
        del state["monitor"], state["mode"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    says = r"those of monitor='val_loss', mode='min', and this callback has .*`load_from_checkpoint\("
    with pytest.raises(MisconfigurationException, match=says):
        train(classifier(), quick(**other), ckpt_path=tmp_path / "a.ckpt")
    dendrites = quick()
    train(classifier(), dendrites, ckpt_path=tmp_path / "a.ckpt")
    assert dendrites.stop_reason


def test_a_state_that_does_not_tell_is_read(saved: Path) -> None:
    (state,) = torch.load(saved, weights_only=True)["callbacks"].values()
    state = {key: value for key, value in state.items() if key not in ("monitor", "mode", "running")}
    for record in state["history"]:
        for key in ("monitor", "mode", "learning"):
            del record[key]
    dendrites = quick("val_acc", mode="max")
    dendrites.load_state_dict(state)
    assert dendrites.best_model_score == state["machine"]["best"]


def test_the_network_that_is_kept_is_that_of_the_epoch() -> None:
    """What is measured when an epoch ends comes with the weights of that epoch: nothing is trained between."""
    seen = []

    class Watch(Late):
        def on_train_epoch_end(self) -> None:
            self.log("late", float(self.net[0].weight.detach().square().sum()))
            seen.append(float(self.net[0].weight.detach().square().sum()))

    torch.manual_seed(0)
    dendrites = quick("late", mode="max", base_epochs=3, max_dendrites=0)
    model = Watch()
    train(model, dendrites, data=loaders()[:1])
    assert dendrites.history[0]["scores"] == pytest.approx(seen)
    assert float(model.net[0].weight.detach().square().sum()) == pytest.approx(max(seen))
