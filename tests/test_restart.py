"""Restarted optimizers are as new, whatever they count and remember; every group takes what it can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from pl_dendrites.training import optimizers
from pl_dendrites.training.groups import group_for
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick, same_bits, train

# -- optimizers that keep more than torch's own -------------------------------------------------------------------


class OwnAdam(Optimizer):
    """Adam, and places to keep its count in."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999)})
        self.begin()

    def begin(self) -> None:
        pass

    def count(self, group: dict[str, Any]) -> int:
        raise NotImplementedError

    def moments(self, p: Tensor) -> dict[str, Any]:
        return self.state[p] or self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p)) or self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            count, (b1, b2) = self.count(group), group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    s = self.moments(p)
                    s["m"].lerp_(p.grad, 1 - b1)
                    s["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                    p.addcdiv_(s["m"] / (1 - b1**count), (s["v"] / (1 - b2**count)).sqrt() + 1e-8, value=-group["lr"])
        return loss


class InGroup(OwnAdam):
    """As apex.FusedAdam."""

    def count(self, group: dict[str, Any]) -> int:
        group["step"] = group.get("step", 0) + 1
        return group["step"]


class InGroupFromTheStart(OwnAdam):
    """Makes what it remembers when its count begins, as those of pytorch_optimizer."""

    def count(self, group: dict[str, Any]) -> int:
        if "step" not in group:
            group["step"] = 0
            for p in group["params"]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p))
        group["step"] += 1
        return group["step"]

    def moments(self, p: Tensor) -> dict[str, Any]:
        return self.state[p]


class InAttribute(OwnAdam):
    def begin(self) -> None:
        self.steps = 0

    def count(self, group: dict[str, Any]) -> int:
        self.steps += group is self.param_groups[0]
        return self.steps


class InLateAttribute(OwnAdam):
    def count(self, group: dict[str, Any]) -> int:
        self.steps = getattr(self, "steps", 0) + (group is self.param_groups[0])
        return self.steps


class InList(OwnAdam):
    def begin(self) -> None:
        self.counts = {"steps": [0, None]}

    def count(self, group: dict[str, Any]) -> int:
        self.counts["steps"][0] += group is self.param_groups[0]
        return self.counts["steps"][0]


class InTensor(OwnAdam):
    def begin(self) -> None:
        self.steps = torch.tensor(0.0)

    def count(self, group: dict[str, Any]) -> int:
        self.steps += group is self.param_groups[0]
        return int(self.steps)


class InState(OwnAdam):
    """Remembers from the start, and something that belongs to no parameter, as SPAM."""

    def begin(self) -> None:
        self.state["steps"] = 0
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p), first=p.detach().clone())

    def count(self, group: dict[str, Any]) -> int:
        self.state["steps"] += group is self.param_groups[0]
        return self.state["steps"]

    def moments(self, p: Tensor) -> dict[str, Any]:
        assert self.state[p]["first"].shape == p.shape
        return self.state[p]


class Around(Optimizer):
    """Wraps another, as Lookahead."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        self.inner = InAttribute(params, lr)
        super().__init__([{"params": g["params"]} for g in self.inner.param_groups], {"lr": lr})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.inner.step(closure)


KINDS = [InGroup, InGroupFromTheStart, InAttribute, InLateAttribute, InList, InTensor, InState, Around]


def steps(make: Callable[[Any], Optimizer], parameters: list[nn.Parameter], optimizer: Optimizer | None = None) -> Any:
    optimizer = optimizer or make(parameters)
    for i in range(3):
        for p in parameters:
            p.grad = torch.full_like(p, 0.5 + i)
        optimizer.step()
    return optimizer


def as_trainer(optimizer: Optimizer) -> Any:
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[])


@pytest.mark.parametrize("kind", KINDS)
def test_a_restarted_optimizer_steps_as_a_new_one(kind: type[Optimizer]) -> None:
    def make(parameters: Any) -> Optimizer:
        return kind([{"params": parameters}])

    start = [torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    expected = [nn.Parameter(value.clone()) for value in start]
    steps(make, expected)
    parameters = [nn.Parameter(value.clone()) for value in start]
    optimizer = make(parameters)
    initial = optimizers.OptimizerSettings(as_trainer(optimizer))
    for _ in range(2):  # what is restored must not be what is kept
        steps(make, parameters, optimizer)
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        optimizers.forget([optimizer])
        initial.restore()
        steps(make, parameters, optimizer)
        assert all(map(torch.equal, parameters, expected))
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
        optimizers.forget([optimizer])
        initial.restore()


class Moves(L.Callback):
    def __init__(self, dendrites: Any) -> None:
        self.dendrites, self.seen = dendrites, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = pl_module.net[0].weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        moved = float((pl_module.net[0].weight - self.before).abs().max())
        self.seen.setdefault((self.dendrites.phase, self.dendrites.cycle), []).append(moved)


@pytest.mark.parametrize("learning", ["correlation", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_after_a_restart_is_that_of_the_first_phase(kind: type[Optimizer], learning: str) -> None:
    dendrites = quick(learning=learning)
    moves = Moves(dendrites)
    train(classifier(lambda model: kind(model.parameters())), dendrites, moves)
    first = [moves.seen["base", cycle][0] for cycle in range(3)]
    assert first == pytest.approx([0.02] * 3, rel=0.02)  # of Adam, whatever the gradient: its learning rate


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_restart_they_go_on(kind: type[Optimizer]) -> None:
    dendrites = quick(restart=False, max_tries=0)
    train(classifier(lambda model: kind(model.parameters())), dendrites)
    assert "base" in {record["phase"] for record in dendrites.history[1:]}


class AddsGroup(Classifier):
    """Thaws its head into a group of its own, in the middle of the first phase."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizers().optimizer.add_param_group({"params": list(self.net[4].parameters()), "lr": 0.007})

    def configure_optimizers(self) -> Any:
        return Adam([*self.net[0].parameters(), *self.net[1].parameters()], lr=0.02)


def test_a_group_that_the_model_added_keeps_its_own_settings() -> None:
    torch.manual_seed(0)
    model, dendrites = AddsGroup(), quick(targets=["net.?"])
    trainer = train(model, dendrites)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == [0.02, 0.007]
    assert len(dendrites.history) >= 3


# -- optimizers that keep weights of their own --------------------------------------------------------------------


class TwoWeights(Optimizer):
    """Trains at one point and is evaluated at another, a schedule-free optimizer in miniature."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "train_mode": False})

    @torch.no_grad()
    def _to(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 0.5 if train else -1.0)
                group["train_mode"] = train

    def train(self) -> None:
        self._to(True)

    def eval(self) -> None:
        self._to(False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                assert group["train_mode"], "not in train mode"
                for p in group["params"]:
                    if p.grad is not None:
                        z = self.state[p].setdefault("z", p.clone())
                        z.sub_(p.grad, alpha=group["lr"])
                        p.sub_(p.grad, alpha=group["lr"] / 2)
        return loss


class Switching(Classifier):
    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.train()

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        if self.trainer.state.fn == "fit":
            self.optimizers().optimizer.eval()

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        if self.trainer.state.fn == "fit":
            self.optimizers().optimizer.train()

    def on_fit_end(self) -> None:
        self.optimizers().optimizer.eval()

    def configure_optimizers(self) -> Any:
        return TwoWeights(self.parameters())


@pytest.mark.parametrize("restart", [True, False])
def test_the_best_network_stands_still_under_an_optimizer_that_keeps_weights(restart: bool) -> None:
    torch.manual_seed(0)
    model, dendrites, seen = Switching(), quick(restart=restart), {}

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                seen.setdefault((dendrites.phase, dendrites.cycle), []).append(
                    (float(trainer.callback_metrics["val_loss"]), dendrites.best_model_score)
                )

    train(model, Watch(), dendrites)
    assert ("correlation", 1) in seen
    for phase, scores in seen.items():
        if phase[0] == "correlation":
            assert all(score == pytest.approx(best) for score, best in scores)
    trainer = L.Trainer(**QUIET)
    assert trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"] == pytest.approx(
        dendrites.best_model_score
    )


# -- optimizers that do not take everything -----------------------------------------------------------------------


class Matrices(SGD):
    """Takes matrices alone, and says so when it steps."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if any(p.grad is not None and p.ndim != 2 for p in group["params"]):
                raise ValueError("matrices only")
        return super().step(closure)


class Two(Classifier):
    """Matrices in one optimizer, the rest in another."""

    kind: Any = Matrices

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        rest = [p for p in self.parameters() if p.ndim < 2]
        return self.kind([p for p in self.parameters() if p.ndim == 2], lr=0.02), AdamW(rest, lr=0.02)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.parametrize("learning", ["correlation", "gradient"])
@pytest.mark.parametrize("kind", [Matrices, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])])
def test_output_weights_join_an_optimizer_that_takes_vectors(kind: Any, learning: str) -> None:
    torch.manual_seed(0)
    model, dendrites = Two(), quick(learning=learning, max_dendrites=1)
    model.kind = kind
    trainer = train(model, dendrites)
    held = [{p.ndim for group in o.param_groups for p in group["params"]} for o in trainer.optimizers]
    assert held == [{2}, {1}]
    trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert {id(weight) for weight, _ in dendrites.network.trained_parameters()} <= trained


@pytest.mark.parametrize("kind", [Matrices, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])])
def test_a_fit_whose_optimizers_take_no_vector_is_refused_at_its_start(kind: Any) -> None:
    model = classifier(lambda model: kind([p for p in model.parameters() if p.ndim == 2], lr=0.02))
    before = bits(model)
    with pytest.raises(MisconfigurationException, match=rf"\({kind.__name__}\) takes in a vector.*'net.0'"):
        train(model, quick())
    assert same_bits(bits(model), before)


def test_a_trial_on_the_side_leaves_no_trace() -> None:
    matrix, vector = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.zeros(3))
    optimizer = InAttribute([matrix])
    optimizer.state[matrix]["m"] = torch.ones(3, 3)
    groups, random, value = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state(), matrix.detach().clone()
    assert group_for([optimizer], vector, matrix) is optimizer.param_groups[0]
    assert group_for([Matrices([matrix])], vector, matrix) is None
    assert group_for([], vector, matrix) is None
    assert str(optimizer.state_dict()) == str(groups)
    assert optimizer.steps == 0
    assert torch.equal(matrix, value)
    assert torch.equal(random, torch.get_rng_state())


# -- layers that no optimizer holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", ["correlation", "gradient"])
def test_a_layer_that_no_optimizer_trains_gets_no_dendrites(learning: str) -> None:
    model, dendrites = classifier(lambda model: Adam(model.net[4].parameters(), lr=0.02)), quick(learning=learning)
    before = bits(model)
    train(model, dendrites)
    assert dendrites.num_dendrites >= 1
    assert list(dendrites.network.layers) == ["net.4"]
    assert "no optimizer holds its parameters" in dendrites.network.skipped["net.0"]
    assert all(torch.equal(bits(model)[key], before[key]) for key in ("net.0.weight", "net.0.bias"))
    assert not hasattr(model.net[0], "dendrites")


def test_one_that_is_named_does() -> None:
    model, dendrites = classifier(lambda model: Adam(model.net[4].parameters(), lr=0.02)), quick(targets=["net.0"])
    train(model, dendrites)
    assert dendrites.network.targets == ["net.0"]
    assert "correlation" in {record["phase"] for record in dendrites.history}


def test_no_layer_is_left() -> None:
    model = classifier(lambda model: Adam(model.net[1].parameters(), lr=0.02))
    with pytest.raises(
        MisconfigurationException, match=r"no layer can have dendrites\. 'net.0', 'net.4': no optimizer"
    ):
        train(model, quick())


def test_dendrites_of_a_layer_that_no_optimizer_trains_any_more_rest() -> None:
    model, dendrites = classifier(), quick(max_dendrites=1, max_tries=9)
    model.optimizers_of = lambda model: Adam(model.parameters(), lr=0.003)
    train(model, dendrites)
    assert model.net[0].dendrites.count == 1
    before = bits(model)
    model.optimizers_of = lambda model: Adam(model.net[4].parameters(), lr=0.02)
    train(model, quick(max_dendrites=2))
    after = bits(model)
    kept = [key for key in before if key.startswith("net.0.")]
    assert any("dendrites" in key for key in kept)
    assert all(torch.equal(after[key], before[key]) for key in kept)


# -- gradients of weights that went -------------------------------------------------------------------------------


@pytest.mark.parametrize("learning", ["correlation", "gradient"])
def test_no_gradient_outlives_its_weights(learning: str) -> None:
    dendrites, left = quick(learning=learning, base_epochs=None, patience=2, max_dendrites=2), []

    class Watch(L.Callback):
        cycle = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if dendrites.cycle != self.cycle:
                self.cycle = dendrites.cycle
                left.extend(p.grad for p in pl_module.parameters())

    model = classifier(lambda model: SGD(model.parameters(), lr=1.0))
    train(model, dendrites, Watch(), accumulate_grad_batches=4, val_check_interval=1, max_epochs=8)
    assert left
    assert all(gradient is None for gradient in left)
