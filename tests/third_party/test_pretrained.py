"""Networks of transformers and timm grow frozen, by every form, and what grew comes back; so with peft and after FTS.

Run by ``make test-pretrained``, which installs these into an environment of their own.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from pl_dendrites import (
    dendrites_state_dict,
    detach,
    fuse,
    growing,
    load_dendrites,
    load_from_checkpoint,
    select_targets,
)
from tests.models import QUIET, bits, quick, same_bits
from tests.test_unreached import Gradients

if TYPE_CHECKING:
    from tests.third_party.networks import Network

networks = pytest.importorskip("tests.third_party.networks")
NETWORKS, Text, counted = networks.NETWORKS, networks.Text, networks.counted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "frozen.md"
PRIVATE = {"targets": "frozen", "fan_in": 4}
FORMS: dict[str, dict[str, Any]] = {
    "hybrid": PRIVATE | {"learning": "hybrid"},
    "gradient": PRIVATE | {"learning": "gradient"},
    "correlation": {"targets": "frozen"},
    "shared": {"fan_in": 4},
    "placed": {"targets": "frozen", "max_parameters": 1_000_000},
}


def growth(network: Network, form: str, **settings: Any) -> Any:
    where = {"around": network.around} if form == "shared" else {}
    short = {"base_epochs": 1, "max_correlation_epochs": 1, "max_dendrites": 1}
    return quick("falls", **(short | FORMS[form] | where | settings))


def fit(model: L.LightningModule, network: Network, *callbacks: Any, ckpt_path: Any = None, **settings: Any) -> Any:
    trainer = L.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": -1} | settings))
    trainer.fit(model, network.data(), network.data(), ckpt_path=ckpt_path)
    return trainer


@torch.no_grad()
def output(model: Text, network: Network) -> Tensor:
    model.eval()
    return model.answer(next(iter(network.data())))[0]


def check(network: Network, form: str, frozen_whole: bool = False, prepare: Any = None, **settings: Any) -> Text:
    """Let one grow; all dendrites learn, nothing that is frozen moves, and what grew goes on and off."""

    def fresh() -> Text:
        model = network.module(frozen_whole, training=prepare is not None)
        if prepare is not None:
            prepare(model)
        return model

    model, dendrites, gradients = fresh(), growth(network, form), Gradients()
    precise = fit(model, network, dendrites, gradients, **settings).precision
    before = bits(fresh().to(torch.bfloat16) if precise == "bf16-true" else fresh())
    assert dendrites.num_dendrites == 1
    layers = dendrites.network.layers
    unused = set() if form == "shared" else layers.keys() & {*network.unused}
    assert {name for name, own in layers.items() if not own.size} == unused
    assert gradients.had == gradients.learn != set()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad} | {
        n for n, _ in model.named_buffers()
    }
    after = bits(model)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & frozen)
    grown, again = output(model, network), fresh().to(next(model.parameters()).dtype)
    load_dendrites(again, dendrites_state_dict(model, with_trainable=True))
    assert torch.equal(output(again, network), grown)
    detach(again)
    assert not torch.equal(output(again, network), grown)
    assert bits(again).keys() == before.keys()
    assert all(torch.equal(again.state_dict()[name], before[name]) for name in before.keys() & frozen)
    return model


@pytest.mark.parametrize("form", ["hybrid", "shared", "placed"])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_grows(name: str, form: str) -> None:
    check(NETWORKS[name], form)


@pytest.mark.parametrize("form", ["gradient", "correlation"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2, classes", "BEiT", "ConvNeXt", "T5"])
def test_it_grows_by_the_other_rules_with_nothing_else_trainable(name: str, form: str) -> None:
    check(NETWORKS[name], form, frozen_whole=True)


def test_the_guide_lists_what_is_found() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in GUIDE.read_text().splitlines() if "|" in line]
    told = {cells[0]: cells[1] for cells in rows}
    for name, network in NETWORKS.items():
        chosen = select_targets(network.module(frozen_whole=True), "frozen").chosen
        assert told[name] == counted({n: layer for n, layer in chosen.items() if n not in network.unused})


@pytest.mark.parametrize("form", ["hybrid", "shared", "gradient", "placed"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_in_half_precision(precision: str, form: str) -> None:
    for name in ("BERT", "Llama", "ViT"):
        check(NETWORKS[name], form, precision=precision)


@pytest.mark.parametrize("form", ["hybrid", "shared", "gradient", "placed"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["BERT", "DeBERTa-v2", "GPT-2, text", "Llama", "T5"])
def test_in_activation_checkpoints(name: str, reentrant: bool, form: str) -> None:
    def prepare(model: Text) -> None:
        model.net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    check(NETWORKS[name], form, prepare=prepare)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("BERT", "shared"),
        ("GPT-2, classes", "correlation"),
        ("Llama, tied", "hybrid"),
        ("ResNet", "hybrid"),
        ("GPT-2, text", "placed"),
        ("ConvNeXt", "placed"),
    ],
)
def test_a_resumed_fit_ends_with_the_same_bits(name: str, form: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    keeps = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = network.module()
    fit(whole, network, growth(network, form), keeps, enable_checkpointing=True)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths[:2]:
        resumed = network.module()
        fit(resumed, network, growth(network, form), ckpt_path=path)
        assert same_bits(bits(resumed), bits(whole))


# -- what comes after ------------------------------------------------------------------------------------------------


class Called(nn.Module):
    """A network as ``torch.export`` wants it: tensors in and out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **given: Tensor) -> Tensor:
        if "images" in given:
            return self.net(given["images"])
        return self.net(**given, **({} if "decoder_input_ids" in given else {"use_cache": False})).logits


@pytest.mark.parametrize("form", ["hybrid", "shared", "placed"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2, classes", "T5", "ViT", "ResNet"])
def test_it_is_exported(name: str, form: str) -> None:
    network = NETWORKS[name]
    model = network.module()
    fit(model, network, growth(network, form))
    batch = next(iter(network.data()))
    given = {key: value for key, value in batch.items() if key != "labels"}
    if name == "T5":
        given["decoder_input_ids"] = batch["input_ids"]
    called = Called(model.net).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(called, (), given).module()(**given), called(**given))


FUSIBLE = ["BERT", "DeBERTa-v2", "GPT-2, text", "Llama", "T5", "ViT", "Swin", "ResNet", "ConvNeXt"]


@pytest.mark.parametrize("form", ["hybrid", "placed"])
@pytest.mark.parametrize("name", FUSIBLE)
def test_it_is_fused(name: str, form: str) -> None:
    network = NETWORKS[name]
    model = network.module()
    read = {"exclude": ["*.wo"]} if name == "T5" else {}  # it reads the weight of these
    fit(model, network, growth(network, form, **read))
    grown = output(model, network)
    torch.testing.assert_close(output(fuse(model), network), grown)


def test_around_a_module_that_takes_any_arguments_it_is_not_fused() -> None:
    network = NETWORKS["BERT"]
    model = network.module()
    fit(model, network, growth(network, "shared"))
    with pytest.raises(ValueError, match="does not name its arguments one by one"):
        fuse(model)


def test_it_writes_text_with_a_cache_and_goes_through_from_pretrained(tmp_path: Path) -> None:
    network = NETWORKS["GPT-2, text"]
    model = network.module()
    fit(model, network, growth(network, "hybrid"))
    start = next(iter(network.data()))["input_ids"][:2, :4]
    told = {"max_new_tokens": 5, "do_sample": False}
    net = model.net.eval()
    assert torch.equal(net.generate(start, use_cache=True, **told), net.generate(start, use_cache=False, **told))
    net.save_pretrained(tmp_path)
    with growing():
        back = type(net).from_pretrained(tmp_path)
    assert same_bits(bits(back), bits(net))


# -- where it does not go --------------------------------------------------------------------------------------------


def test_shared_dendrites_need_their_neurons_in_the_last_dimension() -> None:
    network, around = NETWORKS["ConvNeXt"], "net.stages.1.blocks.0.mlp"
    dendrites = quick("falls", around=[around, "net.head.fc"], base_epochs=1, max_dendrites=1)
    fit(network.module(), network, dendrites)
    assert "shared dendrites need them in the last" in dendrites.network.skipped[around]
    assert dendrites.num_dendrites == 1


def test_a_reentrant_checkpoint_that_no_gradient_passes_is_told() -> None:
    network = NETWORKS["ViT"]
    model = network.module(training=True)
    timm = pytest.importorskip("timm")
    model.net.set_grad_checkpointing()
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.warns(UserWarning, match="use_reentrant=False"):
            fit(model, network, growth(network, "hybrid"))
    finally:
        timm.layers.set_reentrant_ckpt(False)


# -- beside others ---------------------------------------------------------------------------------------------------


def test_beside_lora(tmp_path: Path) -> None:
    """LoRA on some layers, dendrites on others; one file has both, and peft's merge leaves the dendrites alone."""
    peft = pytest.importorskip("peft")
    network = NETWORKS["BERT"]

    def adapted() -> Text:
        model = network.module(frozen_whole=True)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
        model.net = peft.get_peft_model(model.net, config)
        return model

    model, dendrites, gradients = adapted(), growth(network, "hybrid"), Gradients()
    before = bits(model)
    fit(model, network, dendrites, gradients)
    assert dendrites.num_dendrites == 1
    assert gradients.had == gradients.learn
    assert not any("query" in name or "value" in name or "lora" in name for name in gradients.learn)
    moved = {name for name, value in bits(model).items() if name in before and not torch.equal(value, before[name])}
    assert {"lora_" in name or "modules_to_save" in name for name in moved} == {True}
    grown, again = output(model, network), adapted()
    load_dendrites(again, dendrites_state_dict(model, with_trainable=True))
    assert torch.equal(output(again, network), grown)
    again.net = again.net.merge_and_unload()
    torch.testing.assert_close(output(again, network), grown)
    torch.testing.assert_close(output(fuse(again), network), grown)


class Scheduled(Text):
    """One that checkpoints load into."""

    def __init__(self) -> None:
        super().__init__(NETWORKS["BERT"].module().net)


def finetuning(tmp_path: Path) -> list[Any]:
    fts = pytest.importorskip("finetuning_scheduler")
    phases = ["net.classifier.*", "net.bert.pooler.*", "net.bert.encoder.layer.1.*"]
    schedule = {n: {"params": [name], "max_transition_epoch": n + 1} for n, name in enumerate(phases)}
    saves = fts.FTSCheckpoint(tmp_path / "fts", monitor="val_loss", save_top_k=2)
    return [fts.FinetuningScheduler(schedule, epoch_transitions_only=True), saves]


def test_a_finetuning_schedule_in_the_same_fit_is_refused(tmp_path: Path) -> None:
    for order in (1, -1):
        callbacks = [*finetuning(tmp_path), growth(NETWORKS["BERT"], "hybrid")][::order]
        with pytest.raises(MisconfigurationException, match=r"FinetuningScheduler thaws .* Finetune in a first fit"):
            fit(Scheduled(), NETWORKS["BERT"], *callbacks, enable_checkpointing=True)


def test_a_finetuning_schedule_in_a_fit_before(tmp_path: Path) -> None:
    network, dendrites = NETWORKS["BERT"], growth(NETWORKS["BERT"], "hybrid")
    trainer = fit(Scheduled(), network, *finetuning(tmp_path), max_epochs=4, enable_checkpointing=True)
    model = Scheduled.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, weights_only=False)
    before = bits(model.requires_grad_(False).eval())
    fit(model, network, dendrites)
    assert dendrites.num_dendrites == 1
    detach(model)
    assert same_bits(bits(model), before)


def test_a_finetuning_schedule_in_a_fit_after(tmp_path: Path) -> None:
    """Its phases thaw dendrites with their layers, and the checkpoints that it goes back to hold them."""
    network, model = NETWORKS["BERT"], Scheduled().requires_grad_(False)
    fit(model, network, growth(network, "hybrid"))
    before = copy.deepcopy(model)
    trainer = fit(model, network, *finetuning(tmp_path), max_epochs=5, enable_checkpointing=True)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {f"net.bert.encoder.layer.{n}" for n in (0, 1) if any(f"layer.{n}." in m for m in moved)} == {
        "net.bert.encoder.layer.1"
    }
    assert any(".dendrites." in name for name in moved)
    back = load_from_checkpoint(Scheduled, trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert bits(back).keys() == bits(model).keys()
