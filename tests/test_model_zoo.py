"""Real models, each attached, trained for two cycles, stored, copied and detached."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_dendrites import DendriteCallback, attach, detach, load_from_checkpoint
from pl_dendrites.core import Dendrites
from tests.model_zoo import FROZEN, MISSING, MODELS, TIED, call, make, trainable
from tests.models import QUIET, bits, quick, same_bits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PyTorch's, of old styles

NAMES = [pytest.param(name, marks=pytest.mark.skipif(name in MISSING, reason=MISSING.get(name, ""))) for name in MODELS]


class Grown(NamedTuple):
    """A model of the table after two cycles of a fit."""

    name: str
    model: L.LightningModule
    batch: Any
    dendrites: DendriteCallback
    file: str

    def outputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        """What a model gives in inference, as Lightning runs it."""
        model.cpu().eval()
        with torch.inference_mode():
            return call(model, self.batch)

    def fresh(self, seed: int = 7) -> L.LightningModule:
        """The plain model with other weights."""
        return trainable(self.name, seed)


class Improving(L.Callback):
    """Logs a score that gets better with every validation, so that each set of dendrites is kept."""

    def __init__(self) -> None:
        self.validations = 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations += 1
        self.log("score", float(self.validations))


def loader(batch: Any, count: int = 1) -> DataLoader:
    """So many batches an epoch."""
    return DataLoader([batch] * count, batch_size=None)


@pytest.fixture(scope="module", params=NAMES)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return train(request.param, tmp_path_factory.mktemp("zoo"))


def train(name: str, directory: Path, **choice: Any) -> Grown:
    """Two cycles of a fit, a checkpoint of the best."""
    model, batch = trainable(name), make(name)[1]
    dendrites = quick("score", mode="max", base_epochs=1, max_correlation_epochs=1, **choice)
    keep = ModelCheckpoint(directory, monitor="score", mode="max")
    callbacks = [Improving(), dendrites, keep]
    settings = QUIET | {"enable_checkpointing": True, "num_sanity_val_steps": 0, "default_root_dir": directory}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(max_epochs=-1, callbacks=callbacks, **settings)
        trainer.fit(model, loader(batch, 2), loader(batch))
    return Grown(name, model, batch, dendrites, keep.best_model_path)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def traces(model: nn.Module) -> list[Any]:
    """All but its values that a user can see of a network: types, attributes, hooks, flags and keys."""
    modules = [
        (name, [kind.__name__ for kind in type(module).__mro__], _attributes(module), module.training)
        for name, module in model.named_modules()
    ]
    hooks = [
        (name, key, len(value))
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if "hooks" in key and value is not None
    ]
    flags = [(name, p.requires_grad, p.dtype, p.stride()) for name, p in model.named_parameters()]
    return [modules, hooks, flags, list(model.state_dict())]


def _attributes(module: nn.Module) -> list[Any]:
    own = sorted((key, type(value).__name__) for key, value in vars(module).items())
    return [] if isinstance(module, L.LightningModule) else own  # what a Trainer leaves there is its own affair


# -- before any growth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_attached_model_is_the_plain_one_and_detaching_leaves_no_trace(name: str, training: bool) -> None:
    model, batch = make(name)
    model.train(training)
    call(model, batch)  # some make their attributes in the first pass
    before, values, out = traces(model), bits(model), _seeded(model, batch)
    model.load_state_dict(values)
    attach(model)
    assert same_bits(bits(model), values)
    assert same(_seeded(model, batch), out)
    with pytest.raises(RuntimeError, match="attached already"):
        attach(model)
    model.load_state_dict(values, strict=True)
    make(name)[0].load_state_dict(model.state_dict(), strict=True)
    assert detach(model) is model
    assert traces(model) == before
    assert same(_seeded(model, batch), out)


def _seeded(model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
    # Without PyTorch's fused kernels for inference, which round otherwise: see the next test.
    torch.manual_seed(3)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return call(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", [name for name in MODELS if "Transformer" in name])
def test_a_fast_path_in_inference_gives_the_same(name: str) -> None:
    model, batch = make(name)
    model.eval()
    with torch.inference_mode():
        plain = call(model, batch)
        attach(model)
        attached = call(model, batch)
    for one, other, slow in zip(plain, attached, _seeded(model, batch), strict=True):
        torch.testing.assert_close(one, slow)
        torch.testing.assert_close(other, slow)


# -- after two cycles ---------------------------------------------------------------------------------------------


def test_two_sets_of_dendrites_are_kept(grown: Grown) -> None:
    base = [record for record in grown.dendrites.history if record["phase"] == "base"]
    assert [record["dendrites"] for record in base] == [0, 1, 2]
    assert [record["accepted"] for record in base] == [None, True, True]
    assert grown.dendrites.num_dendrites == 2
    assert not any("_orig_mod" in layer for layer in grown.dendrites.network.layers)
    assert all(value.isfinite().all() for value in bits(grown.model).values() if value.is_floating_point())


def test_dendrites_change_the_output_in_inference_as_they_do_in_training(grown: Grown) -> None:
    """PyTorch has fast paths in inference that would pass them by."""
    model = load_from_checkpoint(type(grown.model), grown.file).eval()
    before = grown.outputs(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Dendrites):
                for stack in module:
                    for weight in stack.weights:
                        weight.fill_(0.5)
    inference, slow = grown.outputs(model), call(model, grown.batch)
    for one, other in zip(inference, slow, strict=True):
        torch.testing.assert_close(one, other.detach())
    assert not same(inference, before)


def test_a_checkpoint_comes_back_with_and_without_a_trainer(grown: Grown) -> None:
    expected = grown.outputs(grown.model)
    again = load_from_checkpoint(type(grown.model), grown.file)
    assert same(grown.outputs(again), expected)
    assert same_bits(bits(again), bits(grown.model))
    fresh = grown.fresh()
    trainer = L.Trainer(callbacks=[quick("score")], **QUIET)
    scores = trainer.validate(fresh, loader(grown.batch), ckpt_path=grown.file, verbose=False)
    assert same(grown.outputs(fresh), expected)
    assert scores == trainer.validate(grown.model, loader(grown.batch), verbose=False)


def test_detached_it_is_the_plain_model_with_the_weights_that_were_trained(grown: Grown) -> None:
    detached = load_from_checkpoint(type(grown.model), grown.file)
    detach(detached)
    plain = grown.fresh()
    grown.outputs(plain), grown.outputs(detached)
    assert traces(detached) == traces(plain)
    plain.load_state_dict(detached.state_dict(), strict=True)
    assert same(grown.outputs(plain), grown.outputs(detached))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_give_the_same_output(grown: Grown, how: Callable[[nn.Module], nn.Module]) -> None:
    plain, expected = grown.fresh(), grown.outputs(grown.model)
    grown.outputs(plain)
    try:
        how(plain)
    except RuntimeError as refusal:  # PyTorch copies models with parametrizations by their state_dict alone
        with pytest.raises(RuntimeError, match=re.escape(str(refusal)[:40])):
            how(grown.model)
    else:
        assert same(grown.outputs(how(grown.model)), expected)
        attached = attach(plain).model
        assert same(grown.outputs(how(attached)), grown.outputs(attached))


# -- what is special about some -----------------------------------------------------------------------------------


def test_tied_weights_stay_one_parameter_and_one_storage(tmp_path: Path) -> None:
    grown = train(TIED, tmp_path)
    assert grown.model.net.output.dendrites.count == 2
    for model in (grown.model, load_from_checkpoint(type(grown.model), grown.file), copy.deepcopy(grown.model)):
        assert model.net.output.weight is model.net.embedding.weight
        shared: dict[int, list[str]] = {}
        for key, value in model.state_dict().items():
            if value.numel():
                shared.setdefault(value.untyped_storage().data_ptr(), []).append(key)
        assert [keys for keys in shared.values() if len(keys) > 1] == [["net.embedding.weight", "net.output.weight"]]


@pytest.mark.parametrize("targets", [None, ["*"]])
def test_frozen_parameters_stay_frozen_and_what_they_are(tmp_path: Path, targets: list[str] | None) -> None:
    """Dendrites grow on them where they are asked for, as adapters would."""
    grown = train(FROZEN, tmp_path, targets=targets)
    plain = trainable(FROZEN)
    backbone = dict(grown.model.net.backbone.named_parameters())
    assert any("dendrites" in name for name in backbone) == (targets is not None)
    for name, parameter in plain.net.backbone.named_parameters():
        assert torch.equal(backbone[name], parameter)
        assert not backbone[name].requires_grad
    assert grown.model.net.head.weight.requires_grad
    assert not torch.equal(grown.model.net.head.weight, plain.net.head.weight)
