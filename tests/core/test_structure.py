"""A state_dict tells its own structure, and a model takes it on before it takes the values."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pl_dendrites.core import attach, detach, restore_structure
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.keys import is_dendrite_key
from pl_dendrites.core.structure import taken_whole
from tests.core.helpers import grow, output_weights

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((-2, -1)))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.other = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.net(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


X = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def grown(conv: int, head: int, activation: str = "tanh") -> Net:
    """A model with so many dendrites on its two layers."""
    model = Net().eval()
    attach(model, activation=activation)
    grow(model.conv, conv, 1)
    grow(model.head, head, 2)
    return model


def through_a_file(state: State) -> State:
    """What ``torch.load`` gives back without trusting the file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(model: nn.Module) -> dict[str, Any]:
    """Structure and values, to the bit, and which objects the parameters are."""
    values = {key: (value.shape, value.tolist()) for key, value in model.state_dict().items()}
    return {"values": values, "objects": [(name, id(p)) for name, p in model.named_parameters()], "print": repr(model)}


def counts(model: nn.Module) -> dict[str, int]:
    return {name: m.dendrites.count for name, m in model.named_modules() if hasattr(m, "dendrites")}


def test_weights_without_dendrites_go_into_an_attached_model_and_back() -> None:
    plain, attached = Net().eval(), Net().eval()
    attach(attached)
    attached.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(attached(X), plain(X))
    Net().load_state_dict(attached.state_dict(), strict=True)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "gelu"])
@pytest.mark.parametrize(("conv", "head"), [(1, 0), (0, 2), (2, 3)])
def test_a_fresh_model_takes_on_what_a_file_holds(conv: int, head: int, activation: str) -> None:
    model = grown(conv, head, activation)
    state = through_a_file(model.state_dict())
    fresh = Net().eval()
    network = restore_structure(fresh, state)
    assert {name: d.count for name, d in network.layers.items() if d.count} == {
        name: count for name, count in (("conv", conv), ("head", head)) if count
    }
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(X), model(X))
    assert list(fresh.state_dict()) == list(state)
    network.start_candidates(pool=2)
    network.discard()
    detach(fresh)
    assert list(fresh.state_dict()) == list(Net().state_dict())


def test_a_plain_model_and_plain_weights_stay_plain() -> None:
    model = Net()
    before = everything(model)
    assert restore_structure(model, Net().state_dict()) is None
    assert everything(model) == before
    assert not any(m._forward_hooks or m._load_state_dict_pre_hooks for m in model.modules())


@pytest.mark.parametrize("before", [(0, 0), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("after", [(0, 0), (1, 0), (2, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_loading_grows_and_shrinks_an_attached_model(
    before: tuple[int, int], after: tuple[int, int], strict: bool
) -> None:
    model, source = grown(*before), grown(*after)
    missing, unexpected = model.load_state_dict(through_a_file(source.state_dict()), strict=strict)
    # What a state_dict does not speak of stays where a part of a model may be loaded.
    stays = [0 if strict or new else old for old, new in zip(before, after, strict=True)]
    assert counts(model) == {"conv": after[0] + stays[0], "head": after[1] + stays[1]}
    assert not unexpected
    layers = [name for name, count in zip(("conv", "head"), stays, strict=True) if count]
    assert missing == [key for key in model.state_dict() if any(key.startswith(f"{name}.dendrites") for name in layers)]
    if not layers:
        assert torch.equal(model(X), source(X))


def missing_when(load: Callable[[nn.Module, Any], Any], state: dict[str, Any]) -> tuple[list[str], int]:
    """The dendrites' entries that a grown model misses in a part of a state, and how many dendrites are left."""
    model = grown(2, 1)
    missing, unexpected = load(model, state)
    assert not unexpected
    return [key for key in missing if ".dendrites." in key], sum(counts(model).values())


class OverridesLoading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = grown(2, 1)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def test_a_part_of_a_state_leaves_the_dendrites_that_it_does_not_speak_of() -> None:
    """However ``strict=False`` comes to be: given, by position, by an override, from outside of the attached model."""
    part = {key: value for key, value in grown(0, 0).state_dict().items() if key.startswith("head.")}
    own = [key for key in grown(2, 1).state_dict() if ".dendrites." in key]
    assert missing_when(lambda model, state: model.load_state_dict(state, strict=False), part) == (own, 3)
    assert missing_when(lambda model, state: model.load_state_dict(state, False), part) == (own, 3)
    assert missing_when(lambda model, state: model.load_state_dict(state, strict=False, assign=True), part) == (own, 3)
    outside = OverridesLoading()
    missing = outside.load_state_dict({f"inner.{key}": value for key, value in part.items()}).missing_keys
    assert {f"inner.{key}" for key in own} <= set(missing)
    assert counts(outside.inner) == {"conv": 2, "head": 1}
    kept = {key: value.clone() for key, value in outside.inner.state_dict().items()}
    outside.load_state_dict({f"inner.{key}": torch.zeros_like(value) for key, value in part.items()})
    assert all(torch.equal(outside.inner.state_dict()[key], kept[key]) for key in own)


def test_a_part_of_a_state_is_not_enough_where_all_is_asked_for() -> None:
    model = grown(2, 1)
    part = {key: value for key, value in grown(0, 0).state_dict().items() if key.startswith("head.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.weight"):
        model.load_state_dict(part)


def test_weights_of_another_activation_bring_it_along() -> None:
    source = grown(2, 1, "sigmoid")
    for model in (grown(0, 0), grown(2, 1), grown(1, 3, "relu")):
        network = restore_structure(model, source.state_dict())
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(X), source(X))
        assert {d[0].form.activation for d in network.layers.values()} == {"sigmoid"}


def test_weights_of_zero_dendrites_leave_the_activation_that_was_asked_for() -> None:
    model = grown(1, 1, "relu")
    model.load_state_dict(grown(0, 0).state_dict())
    assert {m.dendrites.next.activation for m in model.modules() if hasattr(m, "dendrites")} == {"relu"}


@pytest.mark.parametrize(("activation", "code"), [("tanh", 0), ("sigmoid", 1), ("relu", 2), ("gelu", 3)])
def test_the_number_that_stands_for_an_activation_in_files_never_changes(activation: str, code: int) -> None:
    stored = grown(1, 0, activation).state_dict()["conv.dendrites.0.code"]
    assert torch.equal(stored, torch.tensor([code, 0]))


@pytest.mark.parametrize("attached", ["part", "whole"])
def test_a_model_within_a_model_grows_with_it(attached: str) -> None:
    source, target = Outer().eval(), Outer().eval()
    for outer in (source, target):
        attach(outer.net if attached == "part" else outer)
    grow(source.net.conv, 2)
    grow(source.net.head, 1)
    target.load_state_dict(through_a_file(source.state_dict()), strict=True)
    assert torch.equal(target(X), source(X))
    target.load_state_dict(Outer().state_dict(), strict=True)
    assert not any(counts(target).values())


def test_a_layer_used_under_two_names_has_one_set_of_dendrites() -> None:
    source, fresh, attached = Shared(), Shared(), Shared()
    network = attach(source)
    assert list(network.layers) == ["one"]
    grow(source.one, 2)
    state = through_a_file(source.state_dict())
    assert {"one.dendrites.0.weights.1", "two.dendrites.0.weights.1"} <= set(state)
    assert restore_structure(fresh, state).num_dendrites == 2
    attach(attached)
    x = torch.randn(4, 3)
    for model in (fresh, attached):
        model.load_state_dict(state, strict=True)
        assert model.two.dendrites is model.one.dendrites
        assert len(model.one._forward_hooks) == 1
        assert torch.equal(model(x), source(x))


def test_a_model_that_is_one_layer_is_restored() -> None:
    source, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
    attach(source)
    grow(source, 2)
    assert list(restore_structure(fresh, source.state_dict()).layers) == [""]
    fresh.load_state_dict(through_a_file(source.state_dict()))
    x = torch.randn(4, 3)
    assert torch.equal(fresh(x), source(x))
    source.load_state_dict(nn.Linear(3, 2).state_dict(), strict=True)
    assert source.dendrites.count == 0


def test_weights_of_a_layer_whose_weight_is_computed_shrink_it_too() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 2)))
    attach(model)
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    grow(model[0], 2)
    grown_state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(4, 3)
    out = model(x)
    assert not any(model.load_state_dict(plain))
    assert model[0].dendrites.count == 0
    model.load_state_dict(grown_state)
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("names", [["a[0]", "b*"], ["Linear", "b"], ["dendrites", "x y"]], ids=str)
def test_layers_are_restored_by_their_names_whatever_these_are(names: list[str]) -> None:
    source, fresh = (nn.ModuleDict({name: nn.Linear(2, 2) for name in names}) for _ in range(2))
    attach(source)
    grow(source[names[0]], 1)
    assert list(restore_structure(fresh, source.state_dict()).layers) == names[:1]
    fresh.load_state_dict(source.state_dict(), strict=True)


def test_weights_that_do_not_speak_of_a_layer_leave_it_alone() -> None:
    model = grown(2, 1)
    before = everything(model)["values"]
    head = {key: value for key, value in grown(3, 2).state_dict().items() if key.startswith("head.")}
    model.load_state_dict(head, strict=False)
    assert counts(model) == {"conv": 2, "head": 2}
    assert {k: v for k, v in everything(model)["values"].items() if "conv" in k} == {
        k: v for k, v in before.items() if "conv" in k
    }
    model.load_state_dict({}, strict=False)
    restore_structure(model, {})
    assert counts(model) == {"conv": 2, "head": 2}


@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 3), (3, 1), (2, 2), (2, 0), (3, 2)], ids=str)
def test_trained_parameters_of_dendrites_that_stay_are_the_same_parameters(before: int, after: int) -> None:
    layer = nn.Conv1d(4, 6, 2, groups=2)
    attach(layer)
    grow(layer, before)
    objects, old = output_weights(layer), {k: v.clone() for k, v in layer.dendrites.state_dict().items()}
    form = Form(before or 1)
    layer.dendrites.reshape(layer, [replace(form, count=after)] if after else [])
    kept = min(before, after)
    assert [id(p) for p in output_weights(layer)][:kept] == [id(p) for p in objects[:kept]]
    assert layer.dendrites.count == after
    assert all(torch.equal(layer.dendrites[0].weights[j], old[f"0.weights.{j}"]) for j in range(kept))
    assert not any(weight.any() for weight in output_weights(layer)[kept:])
    if kept > 1:
        rows = kept * (kept - 1) // 2
        assert torch.equal(layer.dendrites[0].links[:rows], old["0.links"][:rows])
        assert not layer.dendrites[0].links[rows:].any()
    for part in ("0.nodes.weight", "0.nodes.bias") if kept else ():
        new = layer.dendrites.get_parameter(part).unflatten(0, (2, after, 3))
        assert torch.equal(new[:, :kept], old[part].unflatten(0, (2, before, 3))[:, :kept])
    assert [p.requires_grad for p in output_weights(layer)] == [True] * after


HEAD, CONV = "head.dendrites.0.", "conv.dendrites.0."


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key.removeprefix(HEAD) not in parts}


def replaced(prefix: str, part: str, value: Any) -> Callable[[State], State]:
    return lambda state: {**state, f"{prefix}{part}": value}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def in_two_layers(state: State) -> State:
    return {**state, f"{HEAD}links": torch.zeros(7), f"{CONV}links": torch.zeros(7)}


def with_many_weights(state: State) -> State:
    return {**state, **{f"{HEAD}weights.{j}": torch.zeros(3) for j in range(2000)}}


CODE, HUGE = "code", torch.zeros(1, 4).expand(3 * 10**11, 4)

MISFITS = [
    pytest.param(without("nodes.bias"), [r"'head': .*missing .*nodes\.bias"], id="no-bias"),
    pytest.param(without("links"), ["'head': .*missing .*links"], id="no-links"),
    pytest.param(without(CODE), ["'head': .*missing .*code"], id="no-code"),
    pytest.param(without("weights.0"), [r"'head': .*\['code', .*missing"], id="no-first-weights"),
    pytest.param(without("weights.0", "weights.1"), ["'head': .*incomplete"], id="no-weights"),
    pytest.param(replaced(HEAD, "weights.9", torch.zeros(3)), [r"'head': .*missing .*weights\.2"], id="a-gap"),
    pytest.param(with_many_weights, [r"'head': .*\(6000, 4\), got \(6, 4\)"], id="many-weights"),
    pytest.param(replaced(HEAD, "nodes.weight", torch.zeros(6, 5)), [r"\(6, 4\), got \(6, 5\)"], id="wrong-inputs"),
    pytest.param(
        replaced(HEAD, "nodes.weight", HUGE), [r"'head': .*\(6, 4\), got \(300000000000, 4\)"], id="huge-nodes"
    ),
    pytest.param(replaced(CONV, "weights.0", torch.zeros(5)), [r"'conv': .*\(4,\), got \(5,\)"], id="wrong-neurons"),
    pytest.param(replaced(HEAD, "links", torch.zeros(2, 3)), [r"'head': .*links.*\(1, 3\)"], id="wrong-links"),
    pytest.param(replaced(HEAD, "links", "text"), ["'head': .*links.*got str"], id="no-tensor"),
    pytest.param(replaced(HEAD, CODE, torch.tensor([99, 0])), ["'head': .*code .*to 99"], id="large-code"),
    pytest.param(replaced(HEAD, CODE, torch.tensor([-1, 0])), ["'head': .*code .*got -1"], id="negative-code"),
    pytest.param(replaced(HEAD, CODE, torch.zeros(2)), ["'head': .*code .*integer"], id="float-code"),
    pytest.param(replaced(HEAD, CODE, torch.tensor([0, 2])), ["'head': .*code must end with 0 or 1"], id="live-code"),
    pytest.param(renamed("head.", "tail."), ["'tail': .*the model has no such layer"], id="unknown-layer"),
    pytest.param(renamed(HEAD, "norm.dendrites.0."), ["'norm': .*a BatchNorm2d cannot"], id="unsupported-layer"),
    pytest.param(in_two_layers, ["'conv': .*links", "'head': .*links"], id="two-layers"),
]


def load(model: nn.Module, state: State) -> None:
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("apply", "make"),
    [
        pytest.param(load, lambda: grown(2, 0), id="load"),
        pytest.param(restore_structure, lambda: grown(2, 0), id="restore"),
        pytest.param(restore_structure, Net, id="restore-plain"),
    ],
)
@pytest.mark.parametrize(("spoil", "messages"), MISFITS)
def test_weights_that_do_not_fit_name_every_layer_and_change_nothing(
    spoil: Callable[[State], State],
    messages: list[str],
    apply: Callable[[nn.Module, State], Any],
    make: Callable[[], nn.Module],
) -> None:
    state, model = spoil(grown(1, 2).state_dict()), make()
    before = everything(model)
    with pytest.raises(ValueError, match="the state_dict does not fit the model") as error:
        apply(model, state)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == len(messages)
    for message in messages:
        assert error.match(message)
    assert everything(model) == before


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("dendrites.0.links", True),
        ("a.0.dendrites.0.weights.12", True),
        ("a.dendrites.0.nodes.bias", True),
        ("a.dendrites.3.nodes.inputs", True),
        ("a.dendrites.1.nodes.layer.bias", True),
        ("a.dendrites.nodes.bias", False),
        ("a.dendrites.0.code", True),
        ("a.dendrites.weight", False),
        ("my_dendrites.0.links", False),
        ("a.dendrites.0.weights.x", False),
        ("a.dendrites.0.nodes.0.weight_hh_l0", True),
        ("a.dendrites.0.nodes.weight.b", False),
        ("a.weight", False),
    ],
)
def test_keys_of_dendrites_are_told_from_the_users(key: str, expected: bool) -> None:
    assert is_dendrite_key(key) is expected


@pytest.mark.parametrize("load", [restore_structure, lambda model, weights: model.load_state_dict(weights)])
def test_a_layer_whose_own_weight_does_not_fit_is_named_before_anything_changes(load: Any) -> None:
    """A Linear with other inputs, whose dendrites happen to fit."""
    grown = nn.Sequential(nn.Linear(3, 2))
    network = attach(grown)
    network.grow(["0"])
    weights = grown.state_dict() | {"0.weight": torch.zeros(2, 4)}
    model = nn.Sequential(nn.Linear(3, 2))
    attach(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'0': weight must have the shape \(2, 3\), got \(2, 4\)"):
        load(model, weights)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_whole_state_need_not_speak_of_a_layer_that_its_model_leaves_out() -> None:
    """A frozen layer, say: that the state has no dendrites of it says that it has none."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    attach(model).grow(["0"])
    part = {key: value for key, value in model.state_dict().items() if key.startswith("1.")}
    model.load_state_dict(part, strict=False)
    assert model[0].dendrites.count == 1
    with taken_whole():
        model.load_state_dict(part, strict=False)
    assert model[0].dendrites.count == 0
