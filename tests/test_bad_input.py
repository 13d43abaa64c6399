"""What bad input gets: an error that says what to do, or a warning and a model as good as before."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, Optimizer

from pl_dendrites import DendriteCallback, load_from_checkpoint
from tests.models import AVERAGING, QUIET, Classifier, bits, classifier, loaders, quick, same_bits, train


class Watch(L.Callback):
    """Keeps the model of every validation in a base phase, under its score, and counts batches by phase."""

    def __init__(self, dendrites: DendriteCallback, monitor: str = "val_loss") -> None:
        self.dendrites, self.monitor = dendrites, monitor
        self.batches = {"base": 0, "correlation": 0}
        self.seen: list[tuple[float, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches[self.dendrites.phase] += 1

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking and self.dendrites.phase == "base":
            self.seen.append((float(trainer.callback_metrics[self.monitor]), bits(pl_module)))

    @property
    def best(self) -> dict[str, Tensor]:
        return min(
            ((score, weights) for score, weights in self.seen if math.isfinite(score)), key=lambda pair: pair[0]
        )[1]


def assert_nothing_left(trainer: L.Trainer, model: nn.Module) -> None:
    """No trace of a correlation phase."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(".dendrites.0.nodes." in name or name.endswith(".dendrites.0.links") for name in frozen)
    assert all(getattr(layer, "candidates", None) is None for layer in model.modules())
    assert not {"optimizer_step", "backward"} & vars(trainer.strategy).keys()
    assert not any("_run_early_stopping_check" in vars(callback) for callback in trainer.callbacks)


# -- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ({"targets": ["encoder.*"]}, ["`targets`", "['encoder.*']", "can: 'net.0' (Linear), 'net.4' (Linear)"]),
        ({"targets": ["BatchNorm1d"]}, ["'net.1' (BatchNorm1d): it has no weight matrix"]),
        ({"exclude": ["net"]}, ["'net' (Sequential)", "write 'net.*'"]),
        ({"exclude": ["head"]}, ["`exclude`", "['head']", "can: 'net.0' (Linear)"]),
        ({"exclude": ["Linear"]}, ["`targets`", "without ['Linear']"]),
    ],
)
def test_no_layer_matches(patterns: dict[str, Any], says: list[str]) -> None:
    model, dendrites = classifier(), quick(**patterns)
    watch, before = Watch(dendrites), bits(model)
    with pytest.raises(ValueError, match="no layer can have dendrites") as error:
        train(model, dendrites, watch)
    assert all(text in str(error.value) for text in says), str(error.value)
    assert watch.batches == {"base": 0, "correlation": 0}
    assert same_bits(bits(model), before)
    assert not any("dendrites" in name for name, _ in model.named_modules())


# -- the monitor --------------------------------------------------------------------------------------------------


def test_a_validation_metric_that_is_never_logged() -> None:
    logged = r"by the end of an epoch\. Logged are: \['train_loss', 'val_acc', 'val_loss'\]"
    with pytest.raises(MisconfigurationException, match=rf"monitor='accuracy'.*{logged}"):
        train(classifier(), quick("accuracy"))


def test_a_training_metric_that_is_never_logged() -> None:
    with pytest.raises(MisconfigurationException, match=r"'loss'.*Logged are: \['train_loss'\].*`training_step`"):
        train(classifier(), quick("loss"), data=loaders()[:1])


def test_a_validation_metric_where_validation_is_off() -> None:
    with pytest.raises(MisconfigurationException, match=r"'val_loss'.*Logged are: \['train_loss'\]"):
        train(classifier(), quick("val_loss"), limit_val_batches=0)


def test_no_false_alarm_before_the_first_validation() -> None:
    dendrites = quick()
    train(classifier(), dendrites, check_val_every_n_epoch=2, max_epochs=5)
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    with pytest.raises(MisconfigurationException, match="'val_los'"):
        train(classifier(), quick("val_los"), check_val_every_n_epoch=2)


# -- what is not finite -------------------------------------------------------------------------------------------


class Poisoned(Classifier):
    """Has a value of its own choice in the place of a score or a loss while a certain phase of a cycle runs."""

    score = loss = 1.0
    nan_input = False
    where: tuple[str, int] = ("base", 1)
    only_batch: int | None = None
    dendrites: DendriteCallback

    def spoiled(self, batch_idx: int) -> bool:
        here = (self.dendrites.phase, self.dendrites.cycle) == self.where
        return here and self.only_batch in (None, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, spoiled = batch[0].clone(), self.spoiled(batch_idx)
        if self.nan_input and spoiled:
            x[3] = torch.nan
        return super().training_step((x, batch[1]), batch_idx) * (self.loss if spoiled else 1.0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("score", loss * (self.score if self.spoiled(batch_idx) else 1.0))


def poisoned(dendrites: DendriteCallback, **settings: Any) -> Poisoned:
    torch.manual_seed(0)
    model = Poisoned()
    model.dendrites = dendrites
    for name, value in settings.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{"base_epochs": 2}, {"base_epochs": None, "patience": 2}])
def test_a_set_whose_score_is_not_finite_is_discarded(value: float, settings: dict[str, Any]) -> None:
    dendrites = quick("score", max_tries=0, **settings)
    model = poisoned(dendrites, score=value)
    watch = Watch(dendrites, "val_loss")
    train(model, dendrites, watch)
    record = dendrites.history[-1]
    assert (record["phase"], record["cycle"], record["accepted"], record["score"]) == ("base", 1, False, None)
    assert record["dendrites"] == 1
    assert "the set did not help" in dendrites.stop_reason
    assert dendrites.num_dendrites == 0
    first = [pair for pair in watch.seen if not any("dendrites" in key for key in pair[1])]
    assert same_bits(bits(model), min(first, key=lambda pair: pair[0])[1])


@pytest.mark.parametrize("restart", [True, False])
def test_a_set_that_makes_the_loss_nan_is_discarded_and_the_next_one_learns(restart: bool) -> None:
    dendrites = quick("score", restart=restart, max_tries=1, max_dendrites=1)
    model = poisoned(dendrites, loss=float("nan"))
    train(model, dendrites)
    base = [record for record in dendrites.history if record["phase"] == "base"]
    assert [record["accepted"] for record in base] == [None, False, True]
    assert all(value.isfinite().all() for value in bits(model).values())


@pytest.mark.parametrize("what", [{"loss": float("nan")}, {"loss": float("inf")}, {"nan_input": True}])
def test_a_loss_that_is_nan_in_a_batch_of_a_correlation_phase_spoils_no_candidate(what: dict[str, Any]) -> None:
    dendrites = quick("score", max_correlation_epochs=3, max_dendrites=1)
    model = poisoned(dendrites, where=("correlation", 1), only_batch=1, **what)
    finite: list[bool] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            finite.extend(bool(p.isfinite().all()) for p in dendrites.network.candidate_parameters())

    train(model, dendrites, Look())
    assert finite
    assert all(finite)
    correlation, base = dendrites.history[1:3]
    assert all(0 < figures["mean"] <= 1 for figures in correlation["correlation"].values())
    assert base["accepted"]
    assert all(value.isfinite().all() for value in bits(model).values())


@pytest.mark.parametrize("settings", [{"base_epochs": 2}, {"base_epochs": None, "patience": 3}])
def test_a_first_base_phase_without_a_finite_score(settings: dict[str, Any]) -> None:
    dendrites = quick("score", **settings)
    model = poisoned(dendrites, score=float("nan"), where=("base", 0))
    with pytest.raises(ValueError, match="the first base phase is over and 'score' was never finite"):
        train(model, dendrites)
    assert dendrites.num_dendrites == 0


# -- arguments ----------------------------------------------------------------------------------------------------

INTEGERS_FROM_1 = ["candidates", "candidate_batches", "patience", "base_epochs", "correlation_patience"]
INTEGERS_FROM_1 += ["max_correlation_epochs"]
INTEGERS_FROM_0 = ["max_dendrites", "max_tries"]
NUMBERS = ["min_delta", "correlation_min_delta"]
BOOLEANS = ["skip_validation", "stop_on_overfit", "restart", "verbose"]
NAN, INF = float("nan"), float("inf")
ARGUMENTS = [
    *[
        ("fan_in", value, "a positive number of inputs or a share of them up to 1.0")
        for value in (0, -1, 0.0, 1.5, True, "3", NAN)
    ],
    *[("share", value, "a number above 0 and up to 1") for value in (0, -0.5, 1.5, True, "3", NAN, None)],
    *[(name, value, "an integer of at least 1") for name in INTEGERS_FROM_1 for value in (0, 1.0, True, "3", NAN)],
    *[(name, value, "an integer of at least 0") for name in INTEGERS_FROM_0 for value in (-1, 2.0, False, None, INF)],
    *[(name, value, "a number of at least 0") for name in NUMBERS for value in (-0.1, NAN, INF, True, "0.1")],
    ("correlation_min_delta", None, "a number of at least 0"),
    *[("mode", value, "one of ['min', 'max']") for value in ("maximum", "", None, 1)],
    *[("min_delta_mode", value, "one of ['abs', 'rel']") for value in ("relative", None)],
    *[("learning", value, "one of ['correlation'") for value in ("perforated", 7)],
    *[("activation", value, "one of ['tanh', 'sigmoid', 'relu', 'gelu'") for value in ("swish", "", torch.tanh)],
    *[("targets", value, "a list of names or patterns") for value in ("net.*", [""], [nn.Linear], {"net"}, 3)],
    *[("exclude", value, "a list of names or patterns") for value in ("net.*", [None], None)],
    *[("monitor", value, "the name of a metric") for value in ("", None, 3, ["val_loss"])],
    *[("optimizer", value, "a callable") for value in ("Adam", 0.01)],
    *[(name, value, "true or false") for name in BOOLEANS for value in ("no", None, 1)],
    *[("dirpath", value, "a path") for value in (3, True, "")],
]


@pytest.mark.parametrize(("argument", "value", "allowed"), ARGUMENTS)
def test_an_argument_out_of_range(argument: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be") as error:
        DendriteCallback(**({"monitor": "val_loss"} | {argument: value}))
    assert allowed in str(error.value)
    assert repr(value) in str(error.value)


# -- layers without an error --------------------------------------------------------------------------------------


class HalfUsed(Classifier):
    """One layer is never used, of another only the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.bypassed = nn.Linear(4, 4)
        self.trained = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.linear(x * self.trained, self.bypassed.weight))


@pytest.mark.parametrize("learning", ["correlation", "hybrid", "gradient"])
def test_a_layer_without_an_error_gets_no_dendrites_and_a_warning(
    learning: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One, however many cycles follow. Of a layer whose weight the model uses by itself it would not be true."""
    torch.manual_seed(0)
    model, dendrites = HalfUsed(), quick(max_dendrites=2, max_tries=2, learning=learning, verbose=True)
    with pytest.warns(UserWarning, match="never had") as warnings, caplog.at_level("INFO", "lightning.pytorch"):
        train(model, dendrites, max_epochs=12)
    said = [str(warning.message) for warning in warnings if "never had an error" in str(warning.message)]
    assert said == ["'unused' never had an error and gets no dendrites: it is not used in training."]
    bypassed = [record.getMessage() for record in caplog.records if "'bypassed'" in record.getMessage()]
    assert len(bypassed) == 1
    assert "the model uses its weights without calling it" in bypassed[0]
    assert "without calling it" in dendrites.network.skipped["bypassed"]
    assert sum(record["phase"] == "base" for record in dendrites.history) > 2
    for name in ("unused", "bypassed"):
        assert dendrites.network.layers[name].count == 0
        assert not any(key.startswith(f"{name}.dendrites") for key in [*bits(model), *dict(model.named_parameters())])


class TwoUnused(Classifier):
    """Two layers are never used, and of one it is not to be told where its neurons are."""

    class Flat(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.flat = nn.Linear(4, 4), nn.Linear(4, 4), self.Flat(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.flat(x))


@pytest.mark.parametrize("learning", ["correlation", "gradient"])
def test_layers_that_are_left_alone_are_told_together_and_once(learning: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, dendrites = TwoUnused(), quick(max_dendrites=2, max_tries=2, learning=learning, verbose=True)
    with pytest.warns(UserWarning, match="never had") as warnings, caplog.at_level("INFO", "lightning.pytorch"):
        train(model, dendrites, max_epochs=12)
    said = [str(warning.message) for warning in warnings if "never had an error" in str(warning.message)]
    assert said == ["'one', 'two' never had an error and get no dendrites: they are not used in training."]
    left = [record.getMessage() for record in caplog.records if "its neurons cannot be told" in record.getMessage()]
    assert len(left) == 1
    assert "'flat'" in left[0]


def test_a_model_none_of_whose_target_layers_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model, dendrites = HalfUsed(), quick(targets=["unused", "bypassed"], learning="gradient")
    with pytest.warns(UserWarning, match=r"the model has no dendrites\..*no target layer was ever used"):
        trainer = train(model, dendrites)
    assert [record["phase"] for record in dendrites.history] == ["base"]
    assert_nothing_left(trainer, model)


@pytest.mark.parametrize("targets", [["unused"], ["unused", "bypassed"]])
def test_a_model_none_of_whose_target_layers_has_an_error(targets: list[str]) -> None:
    torch.manual_seed(0)
    model, dendrites = HalfUsed(), quick(targets=targets)
    watch = Watch(dendrites)
    with pytest.warns(UserWarning, match=r"the model has no dendrites\..*no target layer ever had a finite error"):
        trainer = train(model, dendrites, watch)
    assert dendrites.stop_reason == "no target layer ever had a finite error"
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation"]
    assert dendrites.history[-1]["epochs"] == 2
    assert same_bits(bits(model), watch.best)
    assert_nothing_left(trainer, model)


# -- what the host cannot do --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "averaging", [*(kind() for kind in AVERAGING), StochasticWeightAveraging(swa_lrs=0.1)], ids=type
)
def test_averages_of_weights(averaging: L.Callback) -> None:
    model, dendrites = classifier(), quick()
    watch = Watch(dendrites)
    with pytest.raises(MisconfigurationException, match=rf"{type(averaging).__name__} averages .* Remove it"):
        train(model, dendrites, averaging, watch)
    assert watch.batches["base"] == 0


def test_lbfgs() -> None:
    dendrites = quick()
    watch = Watch(dendrites)
    with pytest.raises(MisconfigurationException, match=r"LBFGS .* Use another optimizer"):
        train(classifier(lambda model: LBFGS(model.parameters())), dendrites, watch)
    assert watch.batches["base"] == 0


def test_an_optimizer_that_is_dealt_out() -> None:
    dealt_out = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})
    with pytest.raises(MisconfigurationException, match=r"ZeroRedundancyOptimizer deals out .* Use another optimizer"):
        train(classifier(lambda model: dealt_out(model.parameters(), lr=0.1)), quick())


def test_early_stopping_on_the_same_monitor() -> None:
    dendrites = quick()
    watch = Watch(dendrites)
    with pytest.raises(MisconfigurationException, match=r"EarlyStopping\(monitor='val_loss'\) .* Remove it"):
        train(classifier(), dendrites, EarlyStopping("val_loss"), watch)
    assert watch.batches["base"] == 0


class Counting(Classifier):
    """Logs how often its optimizer stepped, which stands still in a correlation phase, and a value that never moves."""

    steps = 0

    def configure_optimizers(self) -> Optimizer:
        def count(*_: Any) -> None:
            self.steps += 1

        optimizer = SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(count)
        return optimizer

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log_dict({"steps": float(self.steps), "constant": 1.0})


def test_early_stopping_on_another_monitor_does_not_count_correlation_epochs() -> None:
    stopper = EarlyStopping("steps", mode="max", patience=2)
    dendrites = quick(max_correlation_epochs=4, max_dendrites=1)
    trainer = train(Counting(), dendrites, stopper)
    assert [record["phase"] for record in dendrites.history[:3]] == ["base", "correlation", "base"]
    assert dendrites.history[1]["epochs"] == 4
    assert dendrites.stop_reason
    assert stopper.stopped_epoch == stopper.wait_count == 0
    assert_nothing_left(trainer, Counting())


def test_early_stopping_on_another_monitor_still_stops_training() -> None:
    dendrites = quick(max_correlation_epochs=4)
    trainer = train(Counting(), dendrites, EarlyStopping("constant", patience=3))
    # The first epoch sets the mark; the second, and the two after the correlation phase of four, are waited.
    assert trainer.current_epoch == 2 + 4 + 2
    assert not dendrites.stop_reason
    assert dendrites.history[-1]["reason"] == "training ended"


# -- training ends inside a correlation phase ---------------------------------------------------------------------


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Lightning ignores SIGINT from the first one on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class InCorrelation(L.Callback):
    """Does something in the second batch of a correlation phase."""

    def __init__(self, dendrites: DendriteCallback, act: Any) -> None:
        self.dendrites, self.act = dendrites, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.dendrites.phase == "correlation" and batch_idx == 1:
            self.act()


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps", "max_time", "interrupt"])
@pytest.mark.parametrize("cycle", [1, 2])
def test_training_ends_inside_a_correlation_phase(limit: str, cycle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dendrites = quick(max_correlation_epochs=3)
    epochs = 3 if cycle == 1 else 8
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)

    def late() -> None:
        if dendrites.cycle == cycle:
            clock.now += 3600.0

    def interrupted() -> None:
        if dendrites.cycle == cycle:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {
        "max_epochs": {"max_epochs": epochs},
        "max_steps": {"max_steps": 4 * epochs - 2},
        "max_time": {"max_time": {"minutes": 30}},
        "interrupt": {},
    }[limit]
    watch = Watch(dendrites)
    act = InCorrelation(dendrites, {"max_time": late, "interrupt": interrupted}.get(limit, lambda: None))
    stopper = EarlyStopping("val_acc", mode="max", patience=100)
    model = classifier()
    trainer = L.Trainer(callbacks=[dendrites, stopper, watch, act], **(QUIET | {"max_epochs": -1} | settings))
    if limit == "interrupt":
        with pytest.raises(SystemExit):
            trainer.fit(model, *loaders())
    else:
        trainer.fit(model, *loaders())
    last = dendrites.history[-1]
    assert (last["phase"], last["cycle"]) == ("correlation", cycle)
    assert last["reason"] == ("interrupted by KeyboardInterrupt" if limit == "interrupt" else "training ended")
    assert last["accepted"] is None
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation"] * cycle
    assert same_bits(bits(model), watch.best)
    assert dendrites.phase == "base"
    assert dendrites.stop_reason == ""
    assert_nothing_left(trainer, model)


# -- no dendrite by the end ---------------------------------------------------------------------------------------


def test_no_dendrite_by_the_end_because_training_was_short() -> None:
    with pytest.warns(UserWarning, match=r"no dendrites\. Sets tried: 0; .* because: training ended\."):
        train(classifier(), quick(), max_epochs=1)


def test_no_dendrite_by_the_end_because_no_set_helped() -> None:
    with pytest.warns(UserWarning, match=r"no dendrites\. Sets tried: 2; .* 2 sets in a row did not help\."):
        train(classifier(), quick(min_delta=10.0, max_tries=1))


@pytest.mark.filterwarnings("error:DendriteCallback")
def test_no_dendrite_by_the_end_because_none_was_wanted() -> None:
    dendrites = quick(max_dendrites=0)
    train(classifier(), dendrites)
    assert dendrites.stop_reason == "2 epochs are over; max_dendrites=0 is reached"


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model with a dendrite on each layer."""
    directory = tmp_path_factory.mktemp("grown")
    keep = ModelCheckpoint(directory, filename="last", save_on_train_epoch_end=True)
    train(classifier(), quick(), keep, max_epochs=5, enable_checkpointing=True)
    return directory / "last.ckpt"


MISFIT = r"(?s)does not fit the model:\n  'net\.0': dendrites\..*'net\.4': dendrites\."


def test_a_state_dict_that_does_not_fit(grown: Path) -> None:
    model = classifier(hidden=5)
    train(model, quick(), max_epochs=1)
    before = bits(model)
    with pytest.raises(ValueError, match=MISFIT):
        model.load_state_dict(torch.load(grown, weights_only=True)["state_dict"])
    assert same_bits(bits(model), before)


def test_a_resume_from_a_checkpoint_that_does_not_fit(grown: Path) -> None:
    model, dendrites = classifier(hidden=5), quick()
    watch, before = Watch(dendrites), bits(model)
    with pytest.raises(ValueError, match=MISFIT):
        train(model, dendrites, watch, ckpt_path=grown)
    assert watch.batches["base"] == 0
    assert same_bits(bits(model), before)


def test_load_from_checkpoint_of_another_model(grown: Path) -> None:
    class Elsewhere(Classifier):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.net = nn.Sequential(nn.Linear(4, 3), *list(self.net)[1:])

    for strict in (None, False):
        with pytest.raises((ValueError, RuntimeError), match=r"net\.0"):
            load_from_checkpoint(Elsewhere, grown, strict=strict)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "net.0.dendrites.0.nodes.weight",
            torch.zeros(7, 4),
            r"dendrites\.0\.nodes\.weight must have the shape \(6, 4\)",
        ),
        ("net.0.dendrites.0.weights.0", None, r"incomplete: .*missing \['weights\.0'\]"),
        ("net.0.dendrites.0.code", torch.tensor([9, 0]), "code must hold integers below 5, got 0 to 9"),
        ("net.7.dendrites.0.links", torch.zeros(0, 6), "the model has no such layer"),
        ("net.1.dendrites.0.links", torch.zeros(0, 6), "a BatchNorm1d cannot have any"),
    ],
)
def test_load_from_checkpoint_of_damaged_dendrites(
    key: str, value: Tensor | None, says: str, grown: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(grown, weights_only=True)
    if value is None:
        del checkpoint["state_dict"][key]
    else:
        checkpoint["state_dict"][key] = value
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    layer = key.partition(".dendrites")[0]
    with pytest.raises(ValueError, match=rf"(?s)does not fit the model:\n  '{layer}': .*{says}"):
        load_from_checkpoint(Classifier, tmp_path / "damaged.ckpt")


@pytest.mark.parametrize("number", [0, 2, 4, None, "3"])
def test_a_state_of_an_unknown_format(number: Any, grown: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(grown, weights_only=True)
    checkpoint["callbacks"]["DendriteCallback"]["format"] = number
    torch.save(checkpoint, tmp_path / "other.ckpt")
    dendrites = quick()
    watch = Watch(dendrites)
    with pytest.raises(MisconfigurationException, match=rf"format {number!r}; this version .* reads format 3"):
        train(classifier(), dendrites, watch, ckpt_path=tmp_path / "other.ckpt")
    assert watch.batches["base"] == 0
    assert dendrites.history == []
