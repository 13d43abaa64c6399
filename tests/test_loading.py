"""A grown model is loaded as Lightning loads any: the model, and libraries on top of it, see what they always see."""

from __future__ import annotations

import copy
import enum
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.modules import module as torch_module

from pl_dendrites import grow_on_load, load_from_checkpoint
from tests.models import Classifier, bits, classifier, loaders, quick, same_bits, train

pytestmark = pytest.mark.versions


class Mode(enum.Enum):
    FAST = 1


class Configured(Classifier):
    """Hyperparameters that are no plain values."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__(hidden=4)
        self.save_hyperparameters()


def saved(model: L.LightningModule, path: Path, **settings: Any) -> Path:
    """A checkpoint of a model that grew."""
    dendrites = quick(max_dendrites=1, **settings)
    trainer = train(model, dendrites)
    assert dendrites.num_dendrites == 1
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    model = classifier(hidden=5)
    return saved(model, tmp_path_factory.mktemp("grown") / "grown.ckpt"), model


@pytest.mark.parametrize(
    "extra",
    [Path("a/b"), Mode.FAST, functools.partial(torch.optim.Adam, lr=0.1), nn.ReLU, nn.Tanh()],
    ids=["path", "enum", "partial", "class", "module"],
)
def test_hyperparameters_that_are_no_plain_values(extra: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Configured(extra)
    path = saved(model, tmp_path / "file.ckpt")
    for arguments in ({}, {"weights_only": True}, {"weights_only": None}):
        with pytest.raises(
            ValueError, match=r"holds more than tensors .*: .*\. If you trust .*weights_only=False"
        ) as error:
            load_from_checkpoint(Configured, path, **arguments)
    name = getattr(extra, "__name__", type(extra).__name__) if not isinstance(extra, functools.partial) else "partial"
    assert name in str(error.value)
    again = load_from_checkpoint(Configured, path, weights_only=False)
    assert str(again.hparams.extra) == str(extra)
    assert same_bits(bits(again), bits(model))


def test_hyperparameters_that_the_user_declared_safe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = saved(Configured(Mode.FAST), tmp_path / "file.ckpt")
    with torch.serialization.safe_globals([Mode]):
        assert load_from_checkpoint(Configured, path).hparams.extra is Mode.FAST


class ReadsTwice(Classifier):
    """What a library does that has a configuration of its own in the checkpoint."""

    seen: list[Any]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> Any:
        first = torch.load(checkpoint_path, weights_only=True)
        cls.seen = [checkpoint_path, sorted(first["state_dict"])]
        return super().load_from_checkpoint(checkpoint_path, hidden=first["hyper_parameters"]["hidden"], **kwargs)


class LoadsItself(Classifier):
    """A library that does all of it by itself."""

    @classmethod
    def load_from_checkpoint(cls, path: Any, device: str = "cpu") -> Any:
        assert Path(path).is_file()
        checkpoint = torch.load(path, map_location=device)
        model = cls(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
        return model


@pytest.mark.parametrize("kind", [ReadsTwice, LoadsItself])
@pytest.mark.parametrize("of", [str, Path, lambda path: f"file://{path}", lambda path: f"memory://{path.name}"])
def test_a_model_class_that_loads_in_its_own_way_gets_a_file(
    kind: Any, of: Any, grown: tuple[Path, Classifier]
) -> None:
    path, model = grown
    if of(path).__class__ is str and of(path).startswith("memory"):
        import fsspec

        with fsspec.open(of(path), "wb") as file:
            file.write(path.read_bytes())
    again = load_from_checkpoint(kind, of(path))
    assert type(again) is kind
    assert same_bits(bits(again), bits(model))
    if kind is ReadsTwice:
        assert kind.seen[1] == sorted(model.state_dict())
        assert type(kind.seen[0]) is type(of(path))
        assert (str(kind.seen[0]) == str(path)) is not str(of(path)).startswith("memory")


# -- what the model makes of a checkpoint ------------------------------------------------------------------------------


class Backbone(Classifier):
    """A frozen part that is not saved, and put back when the rest is loaded."""

    def __init__(self) -> None:
        super().__init__(hidden=5)
        self.backbone = nn.Linear(4, 4).requires_grad_(False)
        nn.init.eye_(self.backbone.weight)
        nn.init.zeros_(self.backbone.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.backbone(x))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        entries = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {key: value for key, value in entries if not key.startswith("backbone.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key, value in self.backbone.state_dict().items():
            checkpoint["state_dict"].setdefault(f"backbone.{key}", value)


def with_new_names(state: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("net.", "model.", 1): value for key, value in state.items()}


class Renamed(L.LightningModule):
    """A later version, whose network has another name."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = classifier(hidden=hidden).net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class RenamedByHook(Renamed):
    loads = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loads += 1
        assert any(".dendrites." in key for key in checkpoint["state_dict"])
        checkpoint["state_dict"] = with_new_names(checkpoint["state_dict"])


class RenamedByPreHook(Renamed):
    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        for key in list(state):
            (new,) = with_new_names({key: None})
            state[new] = state.pop(key)


class RenamedInLoading(Renamed):
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(with_new_names(state_dict), strict, assign)


class MadeByHook(L.LightningModule):
    """It has no network before it sees the checkpoint, and makes one each time that it sees one."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hidden = len(checkpoint["state_dict"]["net.0.weight"])
        self.net.extend(classifier(hidden=hidden).net)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class MadeInConfigure(L.LightningModule):
    """Its layers come when it is configured."""

    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden, self.net = hidden, None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = classifier(hidden=self.hidden).net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


X = torch.linspace(-2, 2, 20).reshape(5, 4)


@pytest.mark.parametrize("kind", [RenamedByHook, RenamedByPreHook, RenamedInLoading, MadeByHook, MadeInConfigure])
def test_the_model_changes_what_it_loads_before_structure_is_read(kind: Any, grown: tuple[Path, Classifier]) -> None:
    path, model = grown
    again = load_from_checkpoint(kind, path)
    assert torch.equal(again.eval()(X), model.eval()(X))
    assert getattr(again, "loads", 1) == 1
    for other in (pickle.loads(pickle.dumps(again)), copy.deepcopy(again)):
        assert torch.equal(other(X), model(X))


def test_a_part_that_is_put_back_when_the_rest_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Backbone()
    path = saved(model, tmp_path / "part.ckpt")
    assert not any(key.startswith("backbone.") for key in torch.load(path, weights_only=True)["state_dict"])
    again = load_from_checkpoint(Backbone, path)
    assert same_bits(bits(again), bits(model))


def test_nothing_is_left_behind(grown: tuple[Path, Classifier], tmp_path: Path) -> None:
    hooks = [torch_module._global_module_registration_hooks, torch_module._global_parameter_registration_hooks]
    again = load_from_checkpoint(Classifier, grown[0])
    assert type(again) is Classifier
    assert "load_state_dict" not in vars(again)
    plain = tmp_path / "plain.ckpt"
    train(classifier(), max_epochs=1).save_checkpoint(plain)
    fresh = load_from_checkpoint(Classifier, plain)
    assert not fresh._load_state_dict_pre_hooks
    assert not any(hooks)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_from_checkpoint(Classifier, plain, hidden=9)
    assert not any(hooks)


class GrowsOnLoad(Classifier):
    def __init__(self, hidden: int = 6, dropout: float = 0.0) -> None:
        super().__init__(hidden, dropout)
        grow_on_load(self)


def test_a_model_that_grows_by_itself_stays_so(grown: tuple[Path, Classifier], tmp_path: Path) -> None:
    train(classifier(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    model = load_from_checkpoint(GrowsOnLoad, tmp_path / "plain.ckpt", hidden=6)
    assert len(model._load_state_dict_pre_hooks) == 1
    assert len(load_from_checkpoint(GrowsOnLoad, grown[0])._load_state_dict_pre_hooks) == 1


def test_a_model_that_does_not_load_strictly(grown: tuple[Path, Classifier]) -> None:
    path, model = grown
    again = load_from_checkpoint(Classifier, path, strict=False)
    assert same_bits(bits(again), bits(model))


# -- a Trainer's checkpoints are whole ---------------------------------------------------------------------------------


class Lenient(Classifier):
    def __init__(self, hidden: int = 6) -> None:
        super().__init__(hidden)
        self.strict_loading = False


def best_that_is_smaller(model: Callable[[], L.LightningModule], tmp_path: Path) -> tuple[Any, Any, Any]:
    """A fit whose last set is rejected, so that the best network is an older, smaller one."""
    torch.manual_seed(0)
    dendrites, network = quick(max_dendrites=2, max_tries=0, min_delta=9.0), model()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = train(network, dendrites, keep, enable_checkpointing=True)
    return trainer, network, dendrites


def test_the_best_network_comes_back_whatever_strict_loading_says(tmp_path: Path) -> None:
    """And a resume of an older structure shrinks: a checkpoint of a Trainer is of the whole model."""
    trainer, model, dendrites = best_that_is_smaller(Lenient, tmp_path)
    _, reference, _ = best_that_is_smaller(Classifier, tmp_path / "strict")
    assert dendrites.history[-1]["dendrites"] == 1
    assert dendrites.num_dendrites == 0
    assert same_bits(bits(model), bits(reference))
    last = max(tmp_path.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    trainer.test(model, loaders()[1], ckpt_path=last, verbose=False)
    assert any(".dendrites." in key for key in bits(model))
    trainer.test(model, loaders()[1], ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert not any(".dendrites." in key for key in bits(model))
    assert "load_model_state_dict" not in vars(trainer.strategy)


def test_after_a_trainer_a_part_of_a_state_is_a_part_again(grown: tuple[Path, Classifier]) -> None:
    path, model = grown
    fresh = classifier(hidden=5)
    trainer = L.Trainer(callbacks=[quick()], logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.test(fresh, loaders()[1], ckpt_path=path, verbose=False)
    assert fresh.net[0].dendrites.count == 1
    part = {key: value for key, value in classifier(hidden=5).state_dict().items()}
    missing = fresh.load_state_dict(part, strict=False).missing_keys
    assert missing == [key for key in model.state_dict() if ".dendrites." in key]
