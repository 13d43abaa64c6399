"""Models that save a part of themselves, what they train, say: their checkpoints hold all that dendrites need."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from pl_dendrites import load_from_checkpoint, restore_structure
from tests.models import QUIET, Classifier, bits, loaders, quick, same_bits

X = torch.linspace(-2, 2, 20).reshape(5, 4)


class Whole(Classifier):
    """A frozen backbone, the same in each run, below what is trained."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        self.strict_loading = False
        self.backbone = nn.Linear(4, 4).requires_grad_(False)
        self.backbone.weight.copy_(torch.eye(4) + 0.1)
        self.backbone.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.backbone(x))

    def trained(self, state: dict[str, Any]) -> dict[str, Any]:
        left_out = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        return {name: value for name, value in state.items() if name not in left_out}


class ByStateDict(Whole):
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.trained(super().state_dict(*args, **kwargs))


class ByHook(Whole):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained(checkpoint["state_dict"])


class WithoutBuffers(Whole):
    """Of frozen dendrites it leaves nothing but the output weights."""

    def trained(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: state[name] for name, parameter in self.named_parameters() if parameter.requires_grad}

    on_save_checkpoint = ByHook.on_save_checkpoint


class SavesAnywhere(L.Callback):
    """Saves in hooks of some batches, amid one and the weights alone at its end; remembers what there was."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.then = folder, {}

    def save(self, trainer: L.Trainer, module: L.LightningModule, where: str, weights_only: bool = False) -> None:
        if trainer.global_step % 6 == 1:
            path = self.folder / f"{trainer.global_step}-{where}.ckpt"
            trainer.save_checkpoint(path, weights_only)
            self.then[path] = {k: v.clone() for k, v in nn.Module.state_dict(module).items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.save(trainer, pl_module, "start")

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.save(trainer, pl_module, "forward")

    def on_after_backward(self, trainer, pl_module) -> None:
        self.save(trainer, pl_module, "backward")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.save(trainer, pl_module, "weights", weights_only=True)


def made(kind: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        return kind()


def fit(kind: Any, tmp_path: Path, *others: L.Callback, ckpt_path: Any = None, **settings: Any) -> Any:
    model, dendrites = made(kind), quick(**settings)
    trainer = L.Trainer(callbacks=[dendrites, *others], **(QUIET | {"max_epochs": 7, "enable_checkpointing": True}))
    trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
    return model, dendrites, trainer


@pytest.mark.parametrize("kind", [ByStateDict, pytest.param(WithoutBuffers, marks=pytest.mark.long)])
def test_wherever_it_is_saved_a_checkpoint_has_what_is_trained_and_all_of_the_dendrites(
    kind: Any, tmp_path: Path
) -> None:
    anywhere, save = SavesAnywhere(tmp_path), functools.partial(ModelCheckpoint, tmp_path, save_top_k=-1)
    several = [
        save(filename="val-{step}", save_on_train_epoch_end=False),
        save(filename="epoch-{step}", save_on_train_epoch_end=True, monitor="val_loss"),
        save(filename="steps-{step}", every_n_train_steps=9),
    ]
    _, dendrites, trainer = fit(kind, tmp_path, anywhere, *several, max_dendrites=1, dirpath=tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert dendrites.history == fit(Whole, tmp_path, max_dendrites=1)[1].history
    plain = {name for name, parameter in made(kind).named_parameters() if parameter.requires_grad}
    grown = {key for key in nn.Module.state_dict(trainer.lightning_module) if ".dendrites." in key}
    files = list(tmp_path.glob("*.ckpt"))
    assert {path.stem.split("-")[0] for path in files} > {"val", "epoch", "steps", "best", "end"}
    for path in files:
        checkpoint = torch.load(path, weights_only=True)
        state = checkpoint["state_dict"]
        step = path.stem.split("-")[0]
        standing = step.isdigit() and 8 < int(step) <= 16  # amid a batch of a correlation phase, too
        then = anywhere.then.get(tmp_path / f"{step}-start.ckpt" if standing else path)
        own = {key for key in then if ".dendrites." in key} if then else {key for key in state if ".dendrites." in key}
        assert own in (set(), grown), path
        assert plain | own == {key for key in state if key in plain or ".dendrites." in key}, path
        assert not any(key.startswith("backbone") for key in state), path
        if then:
            assert all(torch.equal(then[key], value) for key, value in state.items()), path
        best = checkpoint.get("callbacks", {}).get("DendriteCallback", {}).get("best", {}).get("weights") or {}
        assert not any(key.startswith("backbone") for key in best), path
    assert len([path for path in anywhere.then if 8 < int(path.stem.split("-")[0]) <= 16]) >= 4  # correlation


def numbered(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)


@pytest.mark.parametrize("kind", [ByHook, pytest.param(ByStateDict, marks=pytest.mark.long)])
def test_it_resumes_to_the_same_bits_and_loads_without_a_trainer(kind: Any, tmp_path: Path) -> None:
    """In a correlation phase, and after growth; sets are rejected, so that the best network comes back."""
    whole, dendrites, trainer = fit(kind, tmp_path, numbered(tmp_path), min_delta=0.004)
    reference, plainly, _ = fit(Whole, tmp_path / "whole", min_delta=0.004)
    assert dendrites.history == plainly.history
    assert [record["phase"] for record in plainly.history][1] == "correlation"
    assert same_bits(nn.Module.state_dict(whole), bits(reference))
    for epoch in (2, 5):
        model, again, _ = fit(kind, tmp_path / "again", ckpt_path=tmp_path / f"epoch={epoch}.ckpt", min_delta=0.004)
        assert again.history == dendrites.history, epoch
        assert same_bits(nn.Module.state_dict(model), bits(reference)), epoch
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_from_checkpoint(kind, tmp_path / "end.ckpt")
    loaded.backbone = whole.backbone
    assert torch.equal(loaded.eval()(X), whole.eval()(X))
    fresh, state = made(kind, 3), torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    restore_structure(fresh, state)
    fresh.load_state_dict(state, strict=False)
    assert torch.equal(fresh.eval()(X), whole(X))


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 18:
            raise KeyError


def test_a_checkpoint_of_an_exception_has_dendrites_that_the_model_has_not_any_more(tmp_path: Path) -> None:
    """A new set is on trial; the model is back at the best network when the file is written."""
    with pytest.raises(KeyError):
        fit(WithoutBuffers, tmp_path, Stops(), OnExceptionCheckpoint(tmp_path, "end"), min_delta=9.0)
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert len([key for key in state if key.startswith("net.0.dendrites.0.")]) == 5
    assert {f"net.{layer}.dendrites.0.weights.0" for layer in (0, 4)} <= state.keys()


def test_dendrites_that_a_file_lost_are_an_error(tmp_path: Path) -> None:
    """Files from elsewhere, for ``strict_loading = False`` too."""
    _, _, trainer = fit(Whole, tmp_path, numbered(tmp_path))
    path = tmp_path / "epoch=5.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    whole = checkpoint["state_dict"]
    for lost in ([".dendrites."], [".nodes.", ".links", ".code"]):
        checkpoint["state_dict"] = {key: v for key, v in whole.items() if not any(part in key for part in lost)}
        torch.save(checkpoint, path)
        for load in (
            lambda: trainer.fit(made(Whole), *loaders(), ckpt_path=path),
            lambda: trainer.test(made(Whole), loaders()[1], ckpt_path=path, verbose=False),
            lambda: load_from_checkpoint(Whole, path),
        ):
            with pytest.raises(ValueError, match=r"(?s)'net.0'.*who saves a part of a model.*must save all"):
                load()


class Thaws(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module) -> None:
        pl_module.backbone.requires_grad_(trainer.current_epoch >= 5)


def test_the_best_network_is_whole_where_more_is_trained_later(tmp_path: Path) -> None:
    reference, plainly, _ = fit(Whole, tmp_path, Thaws(), min_delta=9.0)
    for path in (None, tmp_path / "epoch=3.ckpt"):
        model, dendrites, _ = fit(ByStateDict, tmp_path, Thaws(), numbered(tmp_path), ckpt_path=path, min_delta=9.0)
        assert dendrites.history == plainly.history
        assert same_bits(nn.Module.state_dict(model), bits(reference))
        assert torch.equal(model.backbone.weight, made(Whole).backbone.weight)
