"""A pretrained network of which nothing is trainable: it is scored once as it is, and then grows."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from pl_dendrites import DendriteCallback
from pl_dendrites.training.empty_optimizers import empty_optimizers
from tests.combinations import EPOCHS, Combination, half_precision
from tests.models import QUIET, Classifier, Rates, bits, loaders, quick, same_bits, toggled, train
from tests.test_resume import assert_same, fit


def filtered(model: nn.Module) -> Any:
    """Over what is trainable, as everybody writes it for an adapter: nothing here."""
    optimizer = AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=0.03, weight_decay=0.2)
    return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)]


def everything(model: nn.Module) -> Any:
    return AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


def pretrained(optimizers_of: Any = filtered) -> Classifier:
    """Trained for some steps, then frozen whole; its BatchNorm is in evaluation mode."""
    torch.manual_seed(0)
    model = Classifier()
    x, y = next(iter(loaders(128)[0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.optimizers_of = optimizers_of
    return model.requires_grad_(False).eval()


LAYERS = {"targets": ["net.0", "net.4"]}
FORMS: dict[str, dict[str, Any]] = {
    "correlation": LAYERS,
    "gradient": LAYERS | {"learning": "gradient"},
    "sparse, hybrid": LAYERS | {"learning": "hybrid", "fan_in": 2},
    "sparse, gradient": {"targets": "frozen", "learning": "gradient", "fan_in": 2},
    "placed": {"targets": "frozen", "max_parameters": 60},
    "shared": {"around": ["net"], "fan_in": 2},
    "shared, with a budget": {"around": ["net"], "fan_in": 2, "max_parameters": 200, "growth_epochs": 1, "sets": 2},
}


def own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if ".dendrites." not in name}


@pytest.mark.parametrize(
    ("form", "optimizers_of"),
    [*((form, filtered) for form in FORMS), ("correlation", everything), ("shared", everything)],
)
def test_it_is_scored_as_it_is_and_then_grows_and_nothing_of_it_changes(form: str, optimizers_of: Any) -> None:
    settings = FORMS[form]
    model, dendrites = pretrained(optimizers_of), quick(**settings)
    before, plain = bits(model), L.Trainer(**QUIET)
    (scores,) = plain.validate(copy.deepcopy(model), loaders()[1], verbose=False)
    trainer = train(model, dendrites)
    first, second = dendrites.history[:2]
    assert (first["phase"], first["epochs"], first["dendrites"]) == ("base", 0, 0)
    assert first["score"] == first["best_score"] == pytest.approx(scores["val_loss"], abs=1e-6)
    assert first["reason"] == "nothing is trained before it grows"
    assert second["phase"] == ("base" if settings.get("learning") == "gradient" else "correlation")
    assert dendrites.best_model_score < first["score"]
    assert dendrites.num_dendrites > 0
    assert same_bits(own(bits(model)), before)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(own(flags).values())
    assert any(flags.values())
    assert not any(module.training for module in (model.net, *model.net))
    assert trainer.current_epoch == sum(record["epochs"] for record in dendrites.history)


def test_what_grew_joins_the_group_that_the_user_made_for_nothing() -> None:
    model, dendrites = pretrained(), quick(**LAYERS, base_epochs=3)
    rates = Rates(dendrites)
    trainer = train(model, dendrites, rates, max_epochs=5)  # ends amid the first cycle
    (group,) = trainer.optimizers[0].param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (0.03, 0.2)
    held = {id(parameter) for parameter in group["params"]}
    assert held == {id(weight) for weight, _ in dendrites.network.trained_parameters()}
    # The schedule begins with the first epoch in which there is something to train.
    assert ("base", 0) not in rates.seen
    assert rates.seen["base", 1][::4] == pytest.approx([0.03, 0.0225, 0.0075])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no optimizer of matrices alone")
def test_an_optimizer_over_nothing_that_takes_matrices_alone_is_refused_at_the_start() -> None:
    model = pretrained(lambda model: torch.optim.Muon([p for p in model.parameters() if p.requires_grad]))
    with pytest.raises(MisconfigurationException, match="takes in a vector"):
        train(model, quick(**LAYERS))


class Toggled(Classifier):
    """Two optimizers that take turns, over what of the two layers each is given; or one."""

    def __init__(self, optimizers_of: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizers_of = optimizers_of
        self.load_state_dict(pretrained().state_dict())
        self.requires_grad_(False).eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            with toggled(self, optimizer):
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()


def of_each_layer(model: nn.Module) -> list[Any]:
    return [SGD(model.net[place].parameters(), lr=0.1) for place in (0, 4)]


@pytest.mark.parametrize("form", ["correlation", "sparse, gradient", "shared"])
def test_where_losses_take_turns_what_grows_on_a_frozen_layer_is_its_optimizers_or_the_only_ones(
    form: str,
) -> None:
    settings = FORMS[form] | {"max_dendrites": 1}
    dendrites = quick(**settings)
    train(Toggled(lambda model: filtered(model)[0]), dendrites)
    assert dendrites.best_model_score < dendrites.history[0]["score"]
    if "around" not in settings:
        trainer = train(model := Toggled(of_each_layer), dendrites := quick(**settings))
        assert max(record["dendrites"] for record in dendrites.history) == 1
        for optimizer, layer in zip(trainer.optimizers, (model.net[0], model.net[4]), strict=True):
            assert {*optimizer.param_groups[0]["params"]} == {*layer.parameters(recurse=False)} | {
                *layer.dendrites.trained_parameters()
            }


def test_which_of_several_optimizers_over_nothing_takes_what_grows_nobody_knows() -> None:
    model = Toggled(lambda model: [filtered(model)[0][0], filtered(model)[0][0]])
    with pytest.raises(MisconfigurationException, match="2 of the model's 2 optimizers hold no parameters"):
        train(model, quick(**LAYERS))


@pytest.mark.parametrize("settings", [{"form": "shared"}, {"max_parameters": 200}], ids=str)
def test_where_shared_dendrites_hang_on_a_frozen_network_is_to_be_named(settings: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"nothing of the model is trainable.*Name the modules"):
        train(pretrained(), quick(**{"form": None} | settings))


def test_an_optimizer_over_nothing_is_refused_everywhere_else() -> None:
    refused = []

    def elsewhere() -> None:
        with pytest.raises(ValueError, match="empty parameter list"):
            SGD([], lr=0.1)
        refused.append(True)

    def also_elsewhere(model: nn.Module) -> Any:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return filtered(model)

    before = torch.optim.Optimizer.__init__
    model = pretrained(also_elsewhere)
    train(model, quick(**LAYERS), max_epochs=1)
    assert torch.optim.Optimizer.__init__ is before
    elsewhere()
    assert len(refused) == 2
    trainable = pretrained(lambda model: SGD(model.net[0].bias[:0], lr=0.1))
    trainable.net[4].requires_grad_(True)
    trainable.optimizers_of = lambda model: SGD([], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        train(trainable, quick(**LAYERS), max_epochs=1)


@pytest.mark.parametrize("precision", [dict, half_precision], ids=["single", "fp16"])
@pytest.mark.parametrize("settings", [LAYERS, FORMS["gradient"]], ids=["correlation", "gradient"])
def test_a_metric_of_training_is_read_in_an_epoch_in_which_nothing_moves(
    settings: dict[str, Any], precision: Any
) -> None:
    model, dendrites = pretrained(), quick("train_loss", **settings)
    with torch.no_grad():
        expected = sum(float(nn.functional.cross_entropy(model(x), y)) for x, y in loaders()[0]) / 4
    before, rates = bits(model), Rates(dendrites)
    train(model, dendrites, rates, data=loaders()[:1], **precision())
    assert (dendrites.history[0]["phase"], dendrites.history[0]["epochs"]) == ("base", 1)
    assert dendrites.history[0]["score"] == pytest.approx(expected, abs=1e-2 if precision() else 1e-6)
    assert dendrites.best_model_score < dendrites.history[0]["score"]
    assert same_bits(own(bits(model)), before)
    assert rates.seen["base", 0] == [0.03] * 4
    assert rates.seen["base", 1][0] == 0.03


class Counts(Callback):
    """Validations, in which batches were the last ones before them, and random numbers after the first."""

    def __init__(self) -> None:
        self.after: list[int] = []
        self.batches, self.drawn = 0, -1.0

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.after.append(self.batches)
            torch.rand(3)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not self.batches:
            self.drawn = float(torch.rand(()))
        self.batches += 1


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_there_is_one_validation_before_the_first_batch_and_no_trace_of_it(bar: type[Callback]) -> None:
    model, counts, plain = pretrained(), Counts(), Counts()
    train(model, quick(**LAYERS, max_dendrites=1), counts, bar(), enable_progress_bar=True, num_sanity_val_steps=0)
    assert counts.after == [0, 4, 8, 12, 16]
    torch.manual_seed(5)
    train(pretrained(), quick(**LAYERS), counts := Counts(), max_epochs=1)
    torch.manual_seed(5)
    thawed = pretrained(lambda model: SGD(model.parameters(), lr=0.1))
    train(thawed.requires_grad_(True), quick(**LAYERS), plain, max_epochs=1)
    assert counts.drawn == plain.drawn


def test_where_nothing_may_grow_it_ends_at_once() -> None:
    model, dendrites = pretrained(), quick(**LAYERS, max_dendrites=0)
    trainer = train(model, dendrites)
    assert trainer.global_step == 0
    assert "max_dendrites=0 is reached" in dendrites.stop_reason


def test_a_set_that_does_not_help_leaves_the_pretrained_network() -> None:
    model, dendrites = pretrained(), quick(**LAYERS, min_delta=10.0, max_tries=1)
    before = bits(model)
    with pytest.warns(UserWarning, match="the model has no dendrites"):
        train(model, dendrites)
    assert [record["accepted"] for record in dendrites.history] == [None, None, False, None, False]
    assert same_bits(bits(model), before)


def test_what_would_grow_and_its_cost_are_told_before_and_in_the_report(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, dendrites = pretrained(), quick(targets="frozen", fan_in=3, verbose=True, max_dendrites=1)
    with caplog.at_level("INFO", "lightning.pytorch"):
        train(model, dendrites)
    (table,) = [r.getMessage() for r in caplog.records if "of the frozen layers these grow" in r.getMessage()]
    rows = [line.split() for line in table.splitlines()[1:]]
    whole = sum(p.numel() for p in pretrained().parameters())
    costs = {name: n * (3 + 1 + 1) for name, n in {"net.0": 6, "net.4": 2}.items()}
    assert rows[1:3] == [["net.0", "Linear", "6", "30"], ["net.4", "Linear", "2", "10"]]
    assert rows[3] == ["all", "40,", f"{40 / whole:.1%}", "of", "the", "model"]
    assert {name: layer["next"] for name, layer in dendrites.history[0]["layers"].items()} == costs
    assert {name: sum(p.numel() for p in model.get_submodule(name).dendrites.parameters()) for name in costs} == costs
    dendrites.report(tmp_path / "report.md")
    assert "of one more on each neuron" in (tmp_path / "report.md").read_text()


def test_what_a_set_of_shared_dendrites_takes_at_most_is_told_before(caplog: pytest.LogCaptureFixture) -> None:
    """A whole network's inputs are not known before it runs: then as many as a unit may see."""
    model, dendrites = pretrained(), quick(around=["net", "net.0"], fan_in=3, verbose=True, max_dendrites=1)
    with caplog.at_level("INFO", "lightning.pytorch"):
        train(model, dendrites)
    (table,) = [r.getMessage() for r in caplog.records if "around these frozen modules" in r.getMessage()]
    rows = {name: line.split()[1:] for line in table.splitlines()[2:] for name in line.split()[:1]}
    taken = {n: sum(p.numel() for p in model.get_submodule(n).dendrites.parameters()) for n in ("net", "net.0")}
    assert rows["net.0"] == ["Linear", "16", f"{taken['net.0']}"]
    assert rows["net"][:2] == ["Sequential", "16"]
    assert int(rows["net"][2]) == 16 * (3 + 1 + 16) > taken["net"] > 0
    assert rows["all"][0] == f"{int(rows['net'][2]) + taken['net.0']},"


def test_with_something_trainable_it_trains_that_first_as_ever() -> None:
    model, dendrites = pretrained(), quick(**LAYERS)
    model.net[4].bias.requires_grad_(True)
    train(model, dendrites, max_epochs=3)
    assert [(record["phase"], record["epochs"]) for record in dendrites.history[:1]] == [("base", 2)]


class Headed(Classifier):
    """A transformer that is frozen, dropout and all, below a head that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.Sequential(nn.Linear(1, 8), nn.TransformerEncoder(layer, 1)).requires_grad_(False)
        self.net = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(x[..., None]).mean(1))


def test_below_a_head_that_learns_the_frozen_layers_alone_grow() -> None:
    model, dendrites = Headed(), quick("train_loss", targets="frozen", fan_in=4, max_dendrites=1)
    model.encoder[1].eval()
    before = bits(model.encoder)
    train(model, dendrites)
    linear = ("linear1", "linear2")
    assert list(dendrites.network.layers) == ["encoder.0", *(f"encoder.1.layers.0.{name}" for name in linear)]
    assert dendrites.history[0]["epochs"] == 2
    assert dendrites.num_dendrites == 1
    assert same_bits(own(bits(model.encoder)), before)
    assert not any(module.training for module in model.encoder[1].modules())
    assert model.encoder[0].training
    flags = {name for name, p in model.named_parameters() if p.requires_grad and ".dendrites." not in name}
    assert flags == {"net.weight", "net.bias"}


def test_what_others_put_in_the_place_of_an_optimizers_method_meanwhile_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Optimizer, "__init__", Optimizer.__init__)  # what comes back after the test
    with empty_optimizers():
        before = Optimizer.__init__

        def theirs(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            before(self, *args, **kwargs)

        monkeypatch.setattr(Optimizer, "__init__", theirs)
    assert Optimizer.__init__ is theirs
    with pytest.raises(ValueError, match="empty parameter list"):
        SGD([], lr=0.1)


# -- resuming ---------------------------------------------------------------------------------------------------------


def manual(model: nn.Module) -> Any:
    return SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=0.1, momentum=0.9)


class Backbone(Classifier):
    """Pretrained, and frozen whole."""

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(pretrained().state_dict())
        self.requires_grad_(False).eval()


class Manual(Backbone):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Part(Backbone):
    """Checkpoints have nothing that is frozen by the user; that is made anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}


ALIKE = ("sparse, gradient", "shared")  # others are like them
RESUMED = {
    **{name: Combination(filtered, callback=FORMS[name], model=pretrained) for name in FORMS if name not in ALIKE},
    "no restart": Combination(everything, callback=LAYERS | {"restart": False}, model=pretrained),
    "accumulation": Combination(filtered, {"accumulate_grad_batches": 3}, callback=LAYERS, model=pretrained),
    "metric of training": Combination(filtered, callback=LAYERS | {"monitor": "train_loss"}, model=pretrained),
    "manual": Combination(manual, callback=LAYERS, model=Manual),
    "fp16": Combination(filtered, half_precision, callback=LAYERS | {"learning": "hybrid"}, model=pretrained),
    "a part is saved": Combination(filtered, callback=LAYERS | {"learning": "hybrid"}, model=Part),
}
LONG = ("no restart", "accumulation", "fp16")


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("number", "name"),
    [pytest.param(i, name, marks=[pytest.mark.long] * (name in LONG)) for i, name in enumerate(RESUMED)],
)
def test_resumed_from_any_epoch_it_ends_with_the_same_bits(number: int, name: str, every: int, tmp_path: Path) -> None:
    combination = RESUMED[name]

    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    whole = fit(combination, saver("whole"))
    paths = sorted((tmp_path / "whole").iterdir(), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(paths) >= 4
    for path in paths[number % every :: every] or paths[-2:]:
        saved = torch.load(path, weights_only=True)
        (state,) = (state for state in saved["callbacks"].values() if "best" in state)
        for weights in (saved["state_dict"], state["best"]["weights"]):
            assert ("net.0.weight" in weights) == (combination.model is not Part)
        assert_same(fit(combination, saver(f"from {path.stem}"), path), whole, path)


def test_resumed_from_the_pretrained_network_as_the_best(tmp_path: Path) -> None:
    """It is written before the first batch."""
    whole, again = quick(**LAYERS, dirpath=tmp_path / "one"), quick(**LAYERS, dirpath=tmp_path / "two")

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 0:
                (tmp_path / "first.ckpt").write_bytes((tmp_path / "one" / "best.ckpt").read_bytes())

    model, resumed = pretrained(), pretrained()
    train(model, whole, Keep(), max_epochs=EPOCHS)
    train(resumed, again, max_epochs=EPOCHS, ckpt_path=tmp_path / "first.ckpt")
    assert again.history == whole.history
    assert same_bits(bits(resumed), bits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_parameters": 2.5},
        {"fan_in": 0.5},
        {"share": 0.5},
        {"learning": "gradient"},
        {"activation": "relu"},
        {"form": "shared"},
        {"around": ["net"]},
    ],
    ids=str,
)
def test_what_placed_dendrites_cannot_be_is_refused_with_what_they_are(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"by which dendrites are placed|where dendrites are shared"):
        DendriteCallback("val_loss", **{"targets": "frozen", "max_parameters": 100} | settings)


@pytest.mark.parametrize("growth_epochs", [None, 2])
def test_a_budget_is_what_is_trainable_in_the_end_a_head_included(growth_epochs: int | None) -> None:
    """The head has 14 of the 40. It is trained before anything grows where somebody says for how long."""
    model = pretrained()
    model.net[4].requires_grad_(True)
    before = bits(model.net[4])
    dendrites = quick(targets="frozen", max_parameters=40, growth_epochs=growth_epochs)
    untouched = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            if dendrites.phase == "correlation":
                untouched.append(same_bits(own(bits(model.net[4])), before))

    train(model, dendrites, Look())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 40 - 13 < trainable <= 40
    phases = [(record["phase"], record["dendrites"]) for record in dendrites.history]
    assert phases == [("base", 0), ("correlation", 0), ("base", 1)]
    assert dendrites.history[0]["epochs"] == (growth_epochs or 0)
    assert set(untouched) == {growth_epochs is None}
    assert not same_bits(own(bits(model.net[4])), before)
