"""Any module that is named can have dendrites: copies of it, drawn anew."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from pl_dendrites.core import DendriticNetwork, attach, detach, restore_structure, select_targets
from tests.core.helpers import (
    assert_gradients,
    grow,
    output_of,
    randomise,
    reference_dendrites,
    reference_error,
    reference_forward,
    reference_gradients,
)
from tests.core.test_correlation_rule import wavy
from tests.core.test_network import snapshot

Pair = namedtuple("Pair", ["hidden", "other"])


class Gated(nn.Module):
    """A block of a user's own, with a parameter that nothing can reset."""

    expected_dim = -1

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda out: out) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(3, 4), nn.Linear(3, 4)
        self.mixing = nn.Parameter(torch.eye(4))
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.wrap = wrap

    def forward(self, x: Tensor, *, sharp: bool = False) -> Any:
        gate = self.gate(x).sigmoid()
        return self.wrap((self.value(x) * (gate.round() if sharp else gate)) @ self.mixing * self.scale)


def in_a_pair(out: Tensor) -> Pair:
    return Pair(out, out.mean())


def behind_a_text(out: Tensor) -> tuple[str, Tensor]:
    return "a text", out


def in_a_list(out: Tensor) -> list[Any]:
    return [out, None]


def in_a_dict(out: Tensor) -> dict[str, Any]:
    return {"hidden": out}


class Net(nn.Module):
    def __init__(self, block: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(channels, 2)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.head(output_of(self.block(x, **kwargs)))


class ConvBlock(nn.Sequential):
    expected_dim = -3

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())


class NormBlock(nn.Sequential):
    expected_dim = -1

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.GELU())


BLOCKS = [
    pytest.param(Gated, (5, 3), id="own-block"),
    pytest.param(Gated, (2, 5, 3), id="own-block-3d"),
    pytest.param(NormBlock, (2, 5, 3), id="linear-with-norm"),
    pytest.param(ConvBlock, (2, 3, 4, 5), id="conv-with-batchnorm"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(block: nn.Module, x: Tensor, dendrites: int = 0, pool: int = 3) -> DendriticNetwork:
    """A model in double precision that is the block alone, with candidates for the block as a whole."""
    randomise(block.double(), 1)
    network = attach(nn.ModuleDict({"block": block}), targets=["block"])
    block(x)  # one forward pass tells the neurons
    grow(block, dendrites, 2)
    network.start_candidates(pool)
    randomise(block.dendrites.candidates, 3)
    return network


@pytest.mark.parametrize("dendrites", [1, 3])
@pytest.mark.parametrize(("make", "shape"), BLOCKS)
def test_the_output_is_the_formula(make: Callable[[], nn.Module], shape: tuple[int, ...], dendrites: int) -> None:
    block, x = make(), random(*shape)
    started(block, x, dendrites)
    torch.testing.assert_close(block.eval()(x), reference_forward(block, x))
    assert (block(x) - block.forward(x)).abs().max() > 0.01


@pytest.mark.parametrize("dendrites", [0, 2])
@pytest.mark.parametrize(("make", "shape"), BLOCKS)
def test_candidates_get_the_gradient_of_autograd(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dendrites: int
) -> None:
    block, x = make(), random(*shape)
    started(block, x, dendrites)
    wavy(block(x)).backward()
    error = reference_error(block, x, wavy)
    assert_gradients(block, reference_gradients(block, [(x, error)]), 1e-6)
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize(("make", "shape"), BLOCKS)
def test_nothing_changes_where_dendrites_add_nothing(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = Net(make()) if shape[-1] == 3 else nn.Sequential(make())
    block = model[0] if isinstance(model, nn.Sequential) else model.block
    x = torch.randn(shape)
    model(x)
    model.eval()
    expected, before = model(x), snapshot(model)
    network = attach(model, targets=["0" if isinstance(model, nn.Sequential) else "block"])
    assert torch.equal(model(x), expected)
    network.start_candidates(pool=2)
    model(x).sin().sum().backward()
    assert torch.equal(model(x), expected)
    assert len(network.integrate()) == 1
    assert network.num_dendrites == 1
    assert torch.equal(model(x), expected)
    assert not torch.equal(reference_dendrites(block, x)[0], block.forward(x).tanh())
    detach(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("wrap", "attributes"),
    [
        (in_a_pair, {}),
        (in_a_pair, {"neuron_output": 0}),
        (in_a_pair, {"neuron_output": -2}),
        (behind_a_text, {"neuron_output": 1}),
        (in_a_list, {}),
        (in_a_dict, {}),
        (in_a_dict, {"neuron_output": "hidden"}),
        (lambda out: {"a": 1, "hidden": out}, {"neuron_output": "hidden"}),
    ],
)
def test_the_rest_of_what_a_module_returns_stays_as_it_is(wrap: Callable[[Tensor], Any], attributes: Any) -> None:
    block, x = Gated(wrap), random(5, 3)
    for name, value in attributes.items():
        setattr(block, name, value)
    started(block, x, dendrites=2)
    plain, out = block.forward(x), block(x)
    assert type(out) is type(plain)
    for module in (block, *block.dendrites[0].nodes):
        module.wrap = lambda value: value
    expected = reference_forward(block, x)
    tensor = {in_a_pair: 0, behind_a_text: 1, in_a_list: 0}.get(wrap, "hidden")
    torch.testing.assert_close(out[tensor], expected)
    assert len(out) == len(plain)
    if wrap is in_a_pair:
        assert torch.equal(out.other, plain.other)
    if wrap is behind_a_text:
        assert out[0] == "a text"


@pytest.mark.parametrize("dim", [1, -2])
def test_a_module_can_say_where_its_neurons_are(dim: int) -> None:
    class Raw(nn.Module):
        neuron_dim, expected_dim = dim, -2

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight @ x

    block, x = Raw(), random(2, 3, 6)
    network = started(block, x, dendrites=1)
    assert network.layers["block"].kind.neurons == 4
    torch.testing.assert_close(block(x), reference_forward(block, x))


@pytest.mark.parametrize(
    ("block", "shape", "message"),
    [
        (Gated(behind_a_text), (2, 3), "output of a Gated .* is not a floating point tensor: set `neuron_output`"),
        (Gated(lambda out: {"a": out, "b": out}), (2, 3), "is a dict: set `neuron_output` to the index or key"),
        (Gated(lambda out: out > 0), (2, 3), "not a floating point tensor"),
        (Gated(lambda out: out.mT), (2, 5, 3), r"has the shape \(2, 4, 5\): set `neuron_dim`"),
        (Gated(lambda out: None), (2, 3), "is a NoneType: set `neuron_output`"),
    ],
)
def test_what_one_forward_pass_cannot_tell_is_asked_for(block: nn.Module, shape: tuple[int, ...], message: str) -> None:
    model = nn.Sequential(block)
    attach(model, targets=["0"])
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


def test_neurons_do_not_change_their_number() -> None:
    block = Gated(lambda out: out[..., :3] if len(out) == 1 else out)
    model = nn.Sequential(block)
    attach(model, targets=["0"])
    model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"a Gated have 4 neurons along dimension -1 .* the shape \(1, 3\)"):
        model(torch.randn(1, 3))


def test_arguments_reach_the_copies() -> None:
    block, x = Gated(), random(5, 3)
    started(block, x, dendrites=1)
    node = block.dendrites[0].nodes[0]
    expected = block.forward(x, sharp=True) + block.dendrites[0].weights[0] * node(x, sharp=True).tanh()
    torch.testing.assert_close(block(x, sharp=True), expected)


def test_neurons_that_no_forward_pass_has_told_cannot_grow_yet() -> None:
    model = Net(Gated())
    network = attach(model, targets=["block"])
    assert network.can_grow() == []
    with pytest.raises(RuntimeError, match=r"the neurons of \['block'\] are not known before their first forward"):
        network.start_candidates()
    assert all(p.requires_grad for p in model.parameters())
    both = attach(detach(model), targets=["block", "head"])
    both.start_candidates()
    assert list(both.candidates) == ["head"]


def test_candidates_go_on_in_a_process_that_has_seen_no_forward_pass() -> None:
    one, two = Net(Gated()), Net(Gated())
    two.load_state_dict(one.state_dict())
    x = torch.randn(6, 3)
    first, second = attach(one, targets=["block"]), attach(two, targets=["block"])
    one(x)
    first.start_candidates(pool=2)
    one(x).square().sum().backward()
    second.start_candidates(pool=2, state=first.candidate_state())
    two(x).square().sum().backward()
    one(x).square().sum().backward()
    assert torch.equal(first.correlations()["block"], second.correlations()["block"])
    wrong = {"block": {"links": torch.zeros(1)}}
    second.discard()
    with pytest.raises(ValueError, match="the saved candidates of 'block' have samples of the shape NoneType"):
        second.start_candidates(pool=2, state=wrong)
    assert second.candidates == {}
    assert all(p.requires_grad for p in two.parameters())


@pytest.mark.parametrize("load", ["restore", "attached", "sequence"])
def test_weights_go_to_a_fresh_model(load: str) -> None:
    x, model = torch.randn(2, 3, 4, 5), nn.Sequential(ConvBlock(), nn.Flatten(), nn.Linear(80, 2))
    attach(model, targets=["0", "2"])
    model(x)
    grow(model[0], 2)
    grow(model[2], 1)
    model.eval()
    fresh = nn.Sequential(ConvBlock(), nn.Flatten(), nn.Linear(80, 2)).eval()
    if load == "restore":
        assert restore_structure(fresh, model.state_dict()).num_dendrites == 2
    else:
        attach(fresh, targets=["0"] if load == "attached" else ["2"])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert {key: value.shape for key, value in fresh.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block.dendrites.0.nodes.0.mixing", torch.zeros(5, 4), r"nodes.0.mixing must have the shape \(4, 4\)"),
        ("block.dendrites.0.nodes.1.mixing", torch.zeros(4, 4), "its dendrites are incomplete"),
        ("block.dendrites.0.weights.0", torch.zeros(3), r"weights.0 must have the shape \(4,\)|links"),
        ("block.gate.weight", torch.zeros(4, 2), r"gate.weight must have the shape \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(key: str, value: Tensor, message: str) -> None:
    model = Net(Gated())
    attach(model, targets=["block"])
    model(torch.randn(2, 3))
    grow(model.block, 1)
    fresh = Net(Gated())
    attach(fresh, targets=["block"])
    fresh(torch.randn(2, 3))
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict({**model.state_dict(), key: value})
    assert snapshot(fresh) == before


def test_a_load_makes_no_copies_where_nothing_grows() -> None:
    """A run loads its best network again and again; whether a copy can be made was found out when it was attached."""
    made = []

    class Counted(Gated):
        def __deepcopy__(self, memo: Any) -> Counted:
            made.append(self)
            twin = Counted.__new__(Counted)
            memo[id(self)] = twin
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return twin

    model = Net(Counted())
    attach(model, targets=["block"])
    model(torch.randn(2, 3))
    grow(model.block, 1)
    assert made
    made.clear()
    model.load_state_dict(model.state_dict())
    assert made == []


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_the_same_output(make_copy: Callable[..., Any]) -> None:
    model, x = nn.Sequential(ConvBlock()), torch.randn(2, 3, 4, 5)
    attach(model, targets=["0"])
    model(x)
    grow(model[0], 2)
    twin = make_copy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    detach(twin)
    assert torch.equal(twin(x), model[0].forward(x))


def test_dendrites_are_in_evaluation_mode_and_candidates_in_training() -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model, x = Net(block), torch.randn(8, 3)
    network = attach(model, targets=["block"])
    model(x)
    model.eval()
    network.start_candidates(pool=2)
    assert all(module.training for module in block.dendrites.candidates.modules())
    model(x).sin().sum().backward()
    assert all(node[1].num_batches_tracked == 1 for node in block.dendrites.candidates.nodes)
    network.integrate()
    model.train()
    assert not any(module.training for module in block.dendrites[0].nodes.modules())
    statistics = block.dendrites[0].nodes[0][1].running_mean.clone()
    block[2].p = 0.0
    assert torch.equal(model(x), model(x))
    assert torch.equal(block.dendrites[0].nodes[0][1].running_mean, statistics)


def test_a_module_that_works_in_place_spoils_nothing() -> None:
    block = nn.Sequential(nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Linear(3, 4))
    model = nn.Sequential(nn.Linear(3, 3), block)
    network = attach(model, targets=["1"])
    x = torch.randn(6, 3)
    model(x)
    plain = torch.nn.functional.linear(model[0](x).clamp(-0.5, 0.5), block[1].weight, block[1].bias)
    network.start_candidates(pool=3)
    torch.testing.assert_close(model(x), plain)
    model(x).square().sum().backward()
    assert list(network.integrate()) == ["1"]
    torch.testing.assert_close(model(x), plain)


def test_the_owner_of_a_hook_is_not_copied() -> None:
    class Watcher:
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("a watcher must not be copied")

        def look(self, module: nn.Module, args: Any, out: Any) -> None:
            self.seen = out

    model, watcher = Net(Gated()), Watcher()
    model.block.register_forward_hook(watcher.look)
    model.block.gate.register_full_backward_hook(watcher.look)
    network = attach(model, targets=["block"])
    model(torch.randn(2, 3))
    network.start_candidates(pool=2)
    assert not any(module._forward_hooks for module in network.candidates["block"].modules())


def test_drawing_candidates_leaves_the_users_random_numbers_alone_and_follows_the_generator() -> None:
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        block = Gated()
        network = attach(nn.ModuleList([block]), targets=["0"])
        block(torch.randn(2, 3))
        users = torch.get_rng_state()
        network.start_candidates(pool=2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), users)
        draws.append([p.detach().clone() for p in network.candidate_parameters()])
        one, two = network.candidates["0"].nodes
        assert not torch.equal(one.value.weight, two.value.weight)
        assert not torch.equal(one.mixing, two.mixing)
        assert not torch.equal(one.mixing, block.mixing)
        assert torch.equal(one.scale, block.scale)
    assert all(map(torch.equal, draws[0], draws[1]))
    assert not all(map(torch.equal, draws[0], draws[2]))


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.cache = self.linear.weight * 2  # no leaf: deepcopy refuses it

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), Gated()])
        self.computed = nn.Sequential(weight_norm(nn.Linear(4, 4)))
        self.hooked = nn.Sequential(old_weight_norm(nn.Linear(4, 4)))
        self.recurrent = weight_norm(nn.LSTM(4, 4), "weight_hh_l0")
        self.uncopyable = Uncopyable()
        self.lazy = nn.Sequential(nn.LazyLinear(3))
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("norm", "it has no weight matrix"),
        ("table", "an embedding has no input that could be weighted"),
        ("blocks", "it holds modules and is never called itself"),
        ("computed", "weights inside it are computed from others"),
        ("hooked", "weights inside it are computed from others"),
        ("recurrent", "weights inside it are computed from others"),
        ("uncopyable", "a copy of it cannot be made: Only Tensors created explicitly"),
        ("lazy", "its size is not known before its first forward pass"),
        ("scripted", "it is compiled by TorchScript"),
        ("", "it is the whole model"),
    ],
)
def test_what_cannot_is_refused_with_the_reason(name: str, reason: str) -> None:
    model = Whole()
    if not name:
        del model.computed, model.hooked, model.recurrent, model.lazy, model.scripted, model.uncopyable
    with pytest.raises(ValueError, match=f"'{name}' .*: {reason}"):
        select_targets(model, targets=[name or "Whole"])
    assert "blocks.0" in select_targets(model).chosen


def test_a_glob_means_layers_and_a_name_or_type_the_module_itself() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"one": Gated(), "two": Gated()}), "head": nn.Linear(4, 2)})
    inner = [f"encoder.{block}.{layer}" for block in ("one", "two") for layer in ("value", "gate")]
    assert list(select_targets(model).chosen) == [*inner, "head"]
    by_glob = select_targets(model, ["encoder.*"])
    assert list(by_glob.chosen) == inner
    assert by_glob.skipped["encoder.one"].startswith("it grows only where `targets` names it")
    assert list(select_targets(model, ["encoder.one"]).chosen) == ["encoder.one"]
    by_type = select_targets(model, ["Gated", "Linear"])
    assert list(by_type.chosen) == ["encoder.one", "encoder.two", "head"]
    assert by_type.skipped == {
        name: f"it is a part of '{name.rpartition('.')[0]}', which gets dendrites as a whole" for name in inner
    }
    assert list(select_targets(model, ["Gated"], exclude=["encoder.t*"]).chosen) == ["encoder.one"]


def test_a_predicate_chooses_among_layers() -> None:
    model = nn.ModuleDict({"block": Gated(), "wide": nn.Linear(4, 64), "cell": nn.GRUCell(3, 3)})
    seen = []

    def wide(name: str, layer: nn.Module) -> bool:
        seen.append(name)
        return getattr(layer, "out_features", 0) > 8

    assert list(select_targets(model, wide).chosen) == ["wide"]
    assert seen == ["block.value", "block.gate", "wide", "cell"]
    assert list(attach(model, exclude=wide).layers) == ["block.value", "block.gate", "cell"]
    with pytest.raises(ValueError, match="no layer can have dendrites for the predicate"):
        select_targets(model, lambda name, layer: False)


def test_the_selection_prints_what_would_grow_and_what_it_costs() -> None:
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 8, 3), "rnn": nn.GRU(8, 4), "block": Gated(), "attention": nn.MultiheadAttention(4, 2)}
    )
    before = snapshot(model)
    selection = select_targets(model, ["conv", "rnn", "Gated", "attention.out_proj"][:3])
    lines = str(selection).splitlines()
    cost = {
        "conv": 3 * 8 * 9 + 8 + 8,
        "rnn": sum(p.numel() for p in nn.GRU(8, 4).parameters()) + 4,
        "block": f"{sum(p.numel() for p in Gated().parameters())} + neurons",
    }
    assert lines[0].split() == ["layer", "type", "neurons", "parameters", "per", "dendrite"]
    assert [line.split()[0] for line in lines[1:4]] == list(cost)
    for line in lines[1:4]:
        assert line.endswith(f" {cost[line.split()[0]]}")
    assert "'attention.out_proj' is left alone: nn.MultiheadAttention uses" in str(select_targets(model))
    assert snapshot(model) == before

    network = attach(model, ["conv", "rnn"])
    for name in ("conv", "rnn"):
        network.grow([name])
        assert sum(p.numel() for p in network.layers[name].parameters()) == cost[name]
