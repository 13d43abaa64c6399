"""The whole cycle: base phase to its plateau, candidates, a set on trial, accept or reject, stop, best in hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback
from tests.core.helpers import TORCH
from tests.models import QUIET, Classifier, bits, classifier, loaders, optimizer_bits, quick, same_bits

pytestmark = pytest.mark.versions


def fit(dendrites: DendriteCallback, model: L.LightningModule | None = None, **settings: Any) -> L.Trainer:
    others = settings.pop("callbacks", [])
    trainer = L.Trainer(callbacks=[dendrites, *others], **(QUIET | {"max_epochs": -1} | settings))
    trainer.fit(model or classifier(), *loaders())
    return trainer


class ScriptedScore(Callback):
    """Replaces the monitored value, so that a test decides what the validations say."""

    def __init__(self, dendrites: DendriteCallback, scores: dict[int, list[float]]) -> None:
        self.dendrites, self.scores = dendrites, {cycle: iter(values) for cycle, values in scores.items()}
        self.weights: dict[float, dict[str, Any]] = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = -1.0
        if self.dendrites.phase == "base":
            score = next(self.scores[self.dendrites.cycle])
            self.weights[score] = bits(module)
        self.log("score", score)


def test_the_main_job() -> None:
    """The README's promise: grows, switches phases, restores the best, stops by itself."""
    dendrites = DendriteCallback(
        "val_loss", form="private", patience=4, max_correlation_epochs=5, max_dendrites=2, verbose=False
    )
    model = classifier()
    trainer = fit(dendrites, model)
    assert dendrites.stop_reason
    assert dendrites.num_dendrites > 0
    score = trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"]
    assert score == pytest.approx(dendrites.best_model_score)
    assert score == min(record["best_score"] for record in dendrites.history)
    assert score < dendrites.history[0]["best_score"], "dendrites did not help on a problem made for them"


def test_accepted_and_rejected_sets() -> None:
    dendrites = DendriteCallback(
        "score",
        "max",
        form="private",
        patience=2,
        max_dendrites=5,
        max_tries=1,
        max_correlation_epochs=1,
        verbose=False,
    )
    script = ScriptedScore(
        dendrites,
        {
            0: [0.1, 0.5, 0.4, 0.5],  # a tie is no improvement
            1: [0.3, 0.6, 0.2, 0.2],  # helps
            2: [0.6, 0.5, 0.6],  # only as good as before: rejected
            3: [0.1, 0.7, 0.1, 0.1],  # the second try helps
            4: [0.2, 0.1, 0.1],
            5: [0.3, 0.1, 0.1],  # two in a row did not help
        },
    )
    model = classifier()
    fit(dendrites, model, callbacks=[script])
    base = [record for record in dendrites.history if record["phase"] == "base"]
    assert [record["accepted"] for record in base] == [None, True, False, True, False, False]
    assert [record["dendrites"] for record in base] == [0, 1, 2, 2, 3, 3]
    assert [record["epochs"] for record in base] == [4, 4, 3, 4, 3, 3]
    assert [record["best_score"] for record in base] == pytest.approx([0.5, 0.6, 0.6, 0.7, 0.7, 0.7])
    assert "2 sets in a row did not help" in dendrites.stop_reason
    assert dendrites.num_dendrites == 2
    best = next(weights for score, weights in script.weights.items() if score == pytest.approx(0.7))
    assert same_bits(bits(model), best)


def test_each_correlation_phase_starts_from_the_best_weights() -> None:
    dendrites = DendriteCallback(
        "score", "max", form="private", patience=2, max_dendrites=1, max_correlation_epochs=1, verbose=False
    )
    script = ScriptedScore(dendrites, {0: [0.1, 0.5, 0.4, 0.4], 1: [0.9, 0.8, 0.8]})

    class AtFirstCandidates(Callback):
        weights: dict[str, Any] | None = None

        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            if dendrites.phase == "correlation" and self.weights is None:
                self.weights = bits(module)

    watch = AtFirstCandidates()
    fit(dendrites, callbacks=[script, watch])
    best = next(weights for score, weights in script.weights.items() if score == pytest.approx(0.5))
    assert watch.weights is not None
    assert same_bits(watch.weights, best)


def test_a_new_set_changes_no_output_and_then_learns() -> None:
    dendrites = quick(max_dendrites=1)
    weights: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            if dendrites.cycle == 1 and dendrites.phase == "base":
                layer = dendrites.network.layers["net.0"]
                weights.append((layer[0].weights[0].detach().clone(), layer[0].nodes.weight.detach().clone()))

    fit(dendrites, callbacks=[Watch()])
    assert weights[0][0].abs().max() <= 0.021, "more than one step of Adam(lr=0.02) away from zero"
    assert not torch.equal(weights[0][0], weights[-1][0]), "the output weights do not learn"
    assert torch.equal(weights[0][1], weights[-1][1]), "what a dendrite has learned is frozen"


def test_candidates_learn_on_with_the_inputs_that_they_keep() -> None:
    dendrites = quick(max_dendrites=1, max_correlation_epochs=6, correlation_patience=6, fan_in=2)
    seen: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            pool = dendrites.network.candidates.get("net.0")
            if pool is not None and pool.fan_in is not None:
                seen.append((pool.nodes.inputs.clone(), pool.nodes.weight.detach().clone()))

    fit(dendrites, callbacks=[Watch()])
    assert torch.equal(seen[0][0], seen[-1][0])
    assert not torch.equal(seen[0][1], seen[-1][1])
    assert {form.fan_in for layer in dendrites.network.layers.values() for form in layer.forms} == {2}


def test_candidates_learn_to_correlate() -> None:
    seen: list[float] = []
    dendrites = quick(max_dendrites=1, max_correlation_epochs=30, correlation_patience=30, correlation_min_delta=0.0)

    class Watch(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            if dendrites.phase == "correlation":
                seen.append(dendrites.network.correlations()["net.0"].abs().mean().item())

    fit(dendrites, callbacks=[Watch()])
    assert len(seen) == 30
    assert seen[-1] > 1.5 * seen[0]


@pytest.mark.parametrize(("patience", "rises_matter", "epochs"), [(3, 1e6, 4), (40, 1e6, 7), (3, 0.0, 7)])
def test_the_correlation_phase_ends_when_no_correlation_rises_or_at_its_limit(
    patience: int, rises_matter: float, epochs: int
) -> None:
    """The first epoch always counts as a rise, for there was no correlation before it."""
    dendrites = quick(
        max_dendrites=1, correlation_patience=patience, correlation_min_delta=rises_matter, max_correlation_epochs=7
    )
    fit(dendrites)
    assert [r["epochs"] for r in dendrites.history if r["phase"] == "correlation"] == [epochs]


def test_the_candidates_optimizer_is_the_users() -> None:
    made = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.3))
        return made[-1]

    dendrites = quick(max_dendrites=2, optimizer=optimizer, candidates=3)
    fit(dendrites)
    assert len(made) == 2
    assert sum(p.numel() for p in made[0].param_groups[0]["params"]) == 3 * ((4 + 1) * 6 + (6 + 1) * 2)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (2, 2), (3, 2)])
def test_candidates_step_when_the_models_optimizer_would_and_statistics_cover_an_epoch(
    accumulate: int, steps: int
) -> None:
    """Four batches of 32: the last one of an epoch always steps."""
    taken, samples = [], []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            taken.append(1)
            return super().step(closure)

    dendrites = quick(max_dendrites=1, max_correlation_epochs=3, optimizer=lambda p: Counting(p, lr=0.1))

    class Watch(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            if dendrites.phase == "correlation":
                samples.append(dendrites.network.candidates["net.0"].samples.tolist())

    fit(dendrites, callbacks=[Watch()], accumulate_grad_batches=accumulate)
    assert len(taken) == 3 * steps
    assert samples == 3 * [6 * [128.0]]


def test_a_grown_model_trains_on_with_an_optimizer_that_knows_only_its_plain_parameters() -> None:
    """As LightningCLI builds it, before the dendrites came."""
    model = classifier()
    fit(quick(max_dendrites=1), model)

    def plain(model: Classifier) -> Any:
        return torch.optim.Adam([p for name, p in model.named_parameters() if "dendrites" not in name], lr=0.02)

    model.optimizers_of = plain
    before = bits(model)
    trainer = fit(DendriteCallback("train_loss", max_dendrites=0, verbose=False), model, max_epochs=1)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 6 + 2
    assert not torch.equal(bits(model)["net.0.dendrites.0.weights.0"], before["net.0.dendrites.0.weights.0"])

    model.optimizers_of = None
    trainer = fit(DendriteCallback("train_loss", max_dendrites=0, verbose=False), model, max_epochs=1)
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == 6 + 2, "what is frozen does not belong there"


def test_targets_and_exclude() -> None:
    dendrites = quick(targets=["net.*"], exclude=["net.4"])
    fit(dendrites)
    assert list(dendrites.network.layers) == ["net.0"]


def test_layers_made_in_setup_and_configure_model_grow() -> None:
    class Late(Classifier):
        def setup(self, stage: str) -> None:
            self.net.append(nn.Linear(2, 2))

        def configure_model(self) -> None:
            if len(self.net) == 6:
                self.net.append(nn.Linear(2, 2))

    dendrites = quick(max_dendrites=1)
    torch.manual_seed(0)
    fit(dendrites, Late())
    assert list(dendrites.network.layers) == ["net.0", "net.4", "net.5", "net.6"]


def test_restart_gives_each_base_phase_the_first_learning_rate_and_no_old_momentum() -> None:
    states: dict[int, Any] = {}
    dendrites = quick()

    class Watch(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if dendrites.phase == "base" and dendrites.cycle not in states:
                optimizer = trainer.optimizers[0]
                states[dendrites.cycle] = (optimizer.param_groups[0]["lr"], len(optimizer.state))

    def decaying(model: Classifier) -> Any:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    fit(dendrites, classifier(decaying), callbacks=[Watch()])
    assert states == {0: (0.02, 0), 1: (0.02, 0), 2: (0.02, 0)}


def test_without_restart_the_optimizer_goes_on_where_it_was() -> None:
    states: list[Any] = []
    dendrites = quick(restart=False, max_dendrites=1)

    class Watch(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            states.append((dendrites.phase, optimizer_bits(trainer.optimizers[0])))

    fit(dendrites, callbacks=[Watch()])
    before = next(state for phase, state in states if phase == "correlation")[0]
    at_return = [state for phase, state in states if phase == "base"][2 * 4][0]
    count = len(before[1])
    assert at_return[1][:count] == before[1]
    assert at_return[1][count:] == [{}, {}], "one output weight for each of two layers, with no state yet"


def test_no_checkpoint_holds_a_changed_model_under_an_old_score(tmp_path: Any) -> None:
    dendrites = quick()
    keep_all = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=100, save_on_train_epoch_end=True)
    model = classifier()
    trainer = fit(dendrites, model, callbacks=[keep_all], enable_checkpointing=True)
    assert len(keep_all.best_k_models) == trainer.current_epoch
    for path, score in keep_all.best_k_models.items():
        again = trainer.validate(classifier(), loaders()[1], ckpt_path=path, verbose=False)[0]["val_loss"]
        assert again == pytest.approx(score.item(), abs=1e-6), path


def test_max_dendrites_zero_trains_as_without_the_callback() -> None:
    """A control with early stopping and the best model, or simply a way to switch growth off."""
    dendrites = DendriteCallback("val_loss", max_dendrites=0, patience=10**6, verbose=False)
    seen: dict[bool, list[Any]] = {True: [], False: []}

    class Watch(Callback):
        def __init__(self, key: bool) -> None:
            self.key = key

        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            seen[self.key].append((bits(module), optimizer_bits(trainer.optimizers[0])))

    fit(dendrites, classifier(dropout=0.2), callbacks=[Watch(True)], max_epochs=5)
    trainer = L.Trainer(callbacks=[Watch(False)], max_epochs=5, **QUIET)
    trainer.fit(classifier(dropout=0.2), *loaders())
    assert len(seen[True]) == len(seen[False]) == 20
    for one, other in zip(seen[True], seen[False], strict=True):
        assert same_bits(one[0], other[0])
        assert one[1] == other[1]


def test_two_fits_with_the_same_objects() -> None:
    """The second fit goes on from the grown model, with a history of its own."""
    dendrites, model = quick(), classifier()
    fit(dendrites, model)
    first = dendrites.history
    grown = dendrites.num_dendrites
    more = quick(max_dendrites=grown + 1)
    fit(more, model)
    assert more.history[0]["dendrites"] == grown
    fit(dendrites, model)
    assert dendrites.history is not first
    assert dendrites.history[0]["cycle"] == 0


def test_two_models_in_one_process_do_not_meet() -> None:
    alone = quick()
    model = classifier()
    fit(alone, model)
    one, other = quick(), quick()
    second, first = classifier(seed=5), classifier()
    trainer = L.Trainer(max_epochs=3, callbacks=[one], **QUIET)
    trainer.fit(second, *loaders())
    fit(other, first)
    assert other.history == alone.history
    assert same_bits(bits(first), bits(model))


@pytest.mark.parametrize("kind", ["conv", "tokens"])
def test_models_of_other_shapes(kind: str) -> None:
    class Other(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            if kind == "conv":
                self.net = nn.Sequential(
                    nn.Conv2d(1, 4, 3, padding=1),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(4, 4, 3, groups=2, stride=2),
                    nn.Flatten(),
                    nn.LazyLinear(2),
                )
                self.net(torch.zeros(1, 1, 6, 6))
            else:
                self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2), nn.Flatten(), nn.Linear(12, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True, on_step=False)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    x = torch.randn(32, 1, 6, 6) if kind == "conv" else torch.randn(32, 6, 6)
    data = DataLoader(TensorDataset(x, torch.arange(32) % 2), batch_size=8)
    dendrites = quick("loss")
    trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites], **QUIET)
    trainer.fit(Other(), data)
    assert dendrites.history[-1]["dendrites"] == 2
    assert {d.count for d in dendrites.network.layers.values()} == {dendrites.num_dendrites}


@pytest.mark.long
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_parts_of_a_model_grow_as_it_would_without(in_place: bool) -> None:
    plain, compiled = quick(), quick()
    fit(plain)
    model = classifier()
    if in_place:
        model.net.compile(backend="eager")
    else:
        model.net = torch.compile(model.net, backend="eager")
    fit(compiled, model)
    assert compiled.history == plain.history
    assert list(compiled.network.layers) == ["net.0", "net.4"]


def test_sanity_check_and_validation_before_and_between_do_not_count() -> None:
    dendrites, model = quick(), classifier()
    trainer = L.Trainer(max_epochs=4, callbacks=[dendrites], num_sanity_val_steps=2, **QUIET)
    trainer.validate(model, loaders()[1], verbose=False)
    assert dendrites.history == []
    assert dendrites.best_model_score is None
    trainer.fit(model, *loaders())
    history = list(dendrites.history)
    trainer.validate(model, loaders()[1], verbose=False)
    trainer.test(model, loaders()[1], verbose=False)
    assert dendrites.history == history


@pytest.mark.skipif(TORCH < (2, 13), reason="PyTorch runs the graph of the network without dendrites again")
def test_a_compiled_part_that_ran_before_the_fit_grows_as_it_would_without() -> None:
    """Say, in a validation to start from."""
    plain, compiled = quick(), quick()
    fit(plain)
    model = classifier()
    model.net = torch.compile(model.net, backend="eager")
    model.eval()(torch.zeros(32, 4))
    model.train()(torch.zeros(32, 4))
    model.load_state_dict({f"net._orig_mod.{key}": value for key, value in classifier().net.state_dict().items()})
    fit(compiled, model)
    assert compiled.history == plain.history
