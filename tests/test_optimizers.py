"""The user's optimizers follow a network that grows, and start anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from pl_dendrites.training import optimizers
from tests.models import Classifier, Rates, classifier, quick, train

# -- parameters come and go ---------------------------------------------------------------------------------------


def zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


def same(one: list[nn.Parameter], other: list[nn.Parameter]) -> bool:
    return [id(p) for p in one] == [id(p) for p in other]


def groups_of(optimizer: Optimizer) -> list[list[nn.Parameter]]:
    return [group["params"] for group in optimizer.param_groups]


def test_a_parameter_joins_the_group_of_its_layers_weight_by_identity() -> None:
    """All are zero and of one shape: a comparison of values would find the first group each time."""
    a, b, c, new_b, new_c, again = (zeros(3) for _ in range(6))
    one, two = SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1), Adam([c])
    optimizers.adopt_parameters([one, two], [], [(new_b, b), (new_c, c)])
    assert same(groups_of(one)[0], [a])
    assert same(groups_of(one)[1], [b, new_b])
    assert same(groups_of(two)[0], [c, new_c])
    optimizers.adopt_parameters([one, two], [], [(new_b, b), (new_c, c), (again, new_b)])
    assert same(groups_of(one)[1], [b, new_b, again]), "never twice"
    assert same(groups_of(two)[0], [c, new_c])


def test_a_parameter_whose_layer_nobody_trains_joins_the_first_group() -> None:
    a, b, frozen, new = (zeros(3) for _ in range(4))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    optimizers.adopt_parameters([optimizer], [], [(new, frozen)])
    assert [len(group) for group in groups_of(optimizer)] == [2, 1]
    assert groups_of(optimizer)[0][1] is new
    optimizers.adopt_parameters([], [], [(new, frozen)])  # no optimizer, no error


def test_a_parameter_leaves_by_identity_with_its_state() -> None:
    a, b, c = (zeros(3) for _ in range(3))
    optimizer = Adam([{"params": [a, b]}, {"params": [c]}])
    for parameter in (a, b, c):
        parameter.grad = torch.ones(3)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state[a])
    with torch.no_grad():
        for parameter in (a, b, c):
            parameter.zero_()
    optimizers.adopt_parameters([optimizer], [b, zeros(3)], [])
    assert [len(group) for group in groups_of(optimizer)] == [1, 1]
    assert groups_of(optimizer)[0][0] is a
    assert groups_of(optimizer)[1][0] is c
    assert set(map(id, optimizer.state)) == {id(a), id(c)}
    assert all(torch.equal(optimizer.state[a][key], value) for key, value in kept.items())


def test_one_leaves_and_its_successor_comes() -> None:
    weight, bias, old, new = (zeros(3) for _ in range(4))
    optimizer = SGD([weight, bias], lr=0.1)
    optimizers.adopt_parameters([optimizer], [], [(old, weight)])
    optimizers.adopt_parameters([optimizer], [old], [(new, weight)])
    assert same(groups_of(optimizer)[0], [weight, bias, new])


def test_names_follow() -> None:
    model = nn.Linear(2, 3)
    optimizer = Adam(model.named_parameters())
    one, two = zeros(3), zeros(3)
    optimizers.adopt_parameters([optimizer], [model.bias], [(one, model.weight), (two, model.weight)])
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(set(group["param_names"])) == len(group["params"]) == 3
    assert group["param_names"][0] == "weight"
    assert all("dendrites" in name for name in group["param_names"][1:])
    other = Adam(nn.Linear(2, 3).named_parameters())
    optimizers.adopt_parameters(
        [other], [other.param_groups[0]["params"][1]], [(zeros(3), zeros(3)), (zeros(3), zeros(3))]
    )
    other.load_state_dict(optimizer.state_dict())


def test_state_that_is_not_finite_goes() -> None:
    good, bad = zeros(2), zeros(2)
    optimizer = Adam([good, bad])
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, float("nan")])
    optimizer.step()
    optimizers.drop_spoilt_state([optimizer])
    assert list(map(id, optimizer.state)) == [id(good)]


# -- order and names ----------------------------------------------------------------------------------------------


def two_optimizers(model: nn.Sequential, reverse: bool) -> list[Optimizer]:
    foreign = zeros(1)
    first = [model[0].weight, foreign, model[0].bias]
    groups = [{"params": [model[2].bias]}, {"params": [model[2].weight]}]
    return [Adam(first[::-1] if reverse else first), SGD(groups, lr=0.1)]


def test_fresh_optimizers_take_the_order_of_a_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    saved, fresh = two_optimizers(model, False), two_optimizers(model, True)
    names = optimizers.parameter_names(saved, model)
    assert names == [[["0.weight", "", "0.bias"]], [["2.bias"], ["2.weight"]]]
    foreign = fresh[0].param_groups[0]["params"][1]
    optimizers.order_parameters(fresh, model, names)
    assert optimizers.parameter_names(fresh, model) == names
    assert same(groups_of(fresh[0])[0], [model[0].weight, foreign, model[0].bias])
    optimizers.order_parameters(fresh, model, names)
    assert optimizers.parameter_names(fresh, model) == names


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda names: names.pop(), r"optimizers of \[1\] parameter groups, the model configures \[1, 2\]"),
        (lambda names: names[1].pop(), r"optimizers of \[1, 1\] parameter groups, the model configures \[1, 2\]"),
        (
            lambda names: names[1][0].append("2.dendrites.0.weights.0"),
            r"checkpoint's \['2\.dendrites\.0\.weights\.0'\], .* \[\]",
        ),
        (lambda names: names[1][0].pop(), r"only the checkpoint's \[\], only the model's \['2\.bias'\]"),
        (lambda names: names[0][0].remove("0.weight"), r"only the checkpoint's \[\], only the model's \['0\.weight'\]"),
        (lambda names: names[0][0].append(""), r"only the checkpoint's \['\(not in the model\)'\]"),
        (lambda names: names[0][0].remove(""), r"only the model's \['\(not in the model\)'\]"),
    ],
)
def test_optimizers_that_are_not_those_of_the_checkpoint(change: Callable[[Any], Any], says: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    names = optimizers.parameter_names(two_optimizers(model, False), model)
    change(names)
    fresh = two_optimizers(model, True)
    before = [list(group) for optimizer in fresh for group in groups_of(optimizer)]
    with pytest.raises(MisconfigurationException, match=says):
        optimizers.order_parameters(fresh, model, names)
    after = [group for optimizer in fresh for group in groups_of(optimizer)]
    assert all(same(one, other) for one, other in zip(before, after, strict=True))


# -- schedulers ---------------------------------------------------------------------------------------------------

Scheduler = Any


class Remembering(lr_scheduler.LRScheduler):
    """A user's own, with a list in its state that grows in place."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.past: list[int] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.past.append(self.last_epoch)
        return [rate * 0.9 ** (len(self.past) - 1) for rate in self.base_lrs]


SCHEDULERS: dict[str, Callable[[Optimizer], Scheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "CyclicLR, own scale": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, 3, cycle_momentum=False, scale_fn=lambda x: 0.9**x, scale_mode="iterations"
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 60),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.CosineAnnealingLR(o, 8)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "a user's own": Remembering,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=0),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.02, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.02),
    "AdamW": lambda params: AdamW(params, lr=0.02, weight_decay=0.1),
}


def rates(optimizer: Optimizer) -> list[tuple[float, Any]]:
    """With what else a scheduler may move."""
    return [(group["lr"], group.get("momentum", group.get("betas"))) for group in optimizer.param_groups]


def steps(optimizer: Optimizer, scheduler: Scheduler, count: int = 6) -> list[Any]:
    seen = []
    for _ in range(count):
        seen.append(rates(optimizer))
        optimizer.step()
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    return seen


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_restored_schedulers_go_as_fresh_ones(
    make_optimizer: Callable[[Any], Optimizer], make_scheduler: Callable[[Optimizer], Scheduler]
) -> None:
    def make() -> tuple[list[nn.Parameter], Optimizer, Scheduler]:
        parameters = [zeros(2), zeros(2)]
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer = make_optimizer([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.005}])
        return parameters, optimizer, make_scheduler(optimizer)

    expected = steps(*make()[1:])
    parameters, optimizer, scheduler = make()
    trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)])
    initial = optimizers.OptimizerSettings(trainer)
    for _ in range(2):  # what is restored must not be what is kept
        assert steps(optimizer, scheduler, 5) == expected[:5]
        assert optimizer.state
        optimizers.forget([optimizer])
        initial.restore()
    assert rates(optimizer) == expected[0]
    assert steps(optimizer, scheduler) == expected
    assert same([p for group in groups_of(optimizer) for p in group], parameters)


def test_a_restore_leaves_parameters_where_they_are_and_other_settings_as_they_were() -> None:
    a, b = zeros(2), zeros(2)
    optimizer = AdamW(nn.ParameterDict({"a": a}).named_parameters(), weight_decay=0.1)
    trainer = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[])
    initial = optimizers.OptimizerSettings(trainer)
    optimizers.adopt_parameters([optimizer], [], [(b, a)])
    optimizer.param_groups[0].update(weight_decay=0.5, betas=(0.5, 0.5), lr=3.0)
    initial.restore()
    group = optimizer.param_groups[0]
    assert same(group["params"], [a, b])
    assert len(group["param_names"]) == 2
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.1, (0.9, 0.999), 0.001)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_fit_with_growth_under_every_scheduler(name: str, restart: bool) -> None:
    def optimizers_of(model: Classifier) -> Any:
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}

    dendrites = quick(restart=restart, base_epochs=3)
    observed = Rates(dendrites)
    train(classifier(optimizers_of), dendrites, observed)
    assert [len(rates) // 4 for rates in observed.seen.values()] == [3, 2, 3, 2, 3]
    base = [observed.seen["base", cycle] for cycle in range(3)]
    for cycle in (1, 2):
        assert len(set(observed.seen["correlation", cycle])) == 1, "a scheduler stepped in a correlation phase"
    if restart:
        assert base[1] == base[2] == base[0]
        return
    assert [base[cycle][0] for cycle in (1, 2)] == [observed.seen["correlation", cycle][-1] for cycle in (1, 2)]
    if name != "ReduceLROnPlateau":  # which looks at the loss
        optimizer = SGD([zeros(1)], lr=0.02, momentum=0.9)
        alone = steps(optimizer, SCHEDULERS[name](optimizer), 9)
        assert base[0] + base[1] + base[2] == [groups[0][0] for groups in alone for _ in range(4)]
