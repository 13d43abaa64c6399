"""Dendrites alone, with what was trained beside them: a file of a few tensors, and a pretrained model to take them."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pl_dendrites.core import UnitSet, attach, attach_shared, dendrites_state_dict, load_dendrites
from tests.core.helpers import randomise
from tests.core.test_structure import Shared
from tests.core.test_structure_fuzz import Net, State, megabytes, mixed, mutate, traces

ENTRIES = "pl_dendrites.entries"


class Tagger(nn.Module):
    """A recurrent layer, and a module of one's own in which a weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.block[2].weight = self.block[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.gru(x)[0])


def grow(model: nn.Module, x: Tensor, shared: int | None = None, **settings: Any) -> None:
    if shared is not None:
        network = attach_shared(model)
        model(x)
        network.set_next(UnitSet(units=6, field=2, feeds=shared))
        network.start_candidates(pool=2)
        model(x).square().sum().backward()
        network.integrate()
    else:
        network = attach(model, **settings)
        model(x)
        for activation in ("tanh", "relu"):
            network.set_next(activation, live=activation == "relu", fan_in=settings.get("fan_in"))
            network.grow(network.can_grow())
    for layer in network.layers.values():
        for weight in layer.parameters():
            nn.init.normal_(weight, std=0.3) if weight.numel() else None


def sparse(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 3 * 3, 400), nn.Linear(400, 3)
    return nn.Sequential(*layers).to(dtype)


CASES = [
    pytest.param(sparse, torch.randn(2, 6, 5, 5), {"fan_in": 3}, id="sparse"),
    pytest.param(lambda: sparse(torch.bfloat16), torch.randn(2, 6, 5, 5).bfloat16(), {"fan_in": 3}, id="bfloat16"),
    pytest.param(Tagger, torch.randn(2, 3, 4), {"targets": ["gru", "block"]}, id="recurrent and a module of one's own"),
    pytest.param(Shared, torch.randn(2, 3), {}, id="a layer with two names"),
    pytest.param(lambda: nn.Linear(3, 2), torch.randn(2, 3), {}, id="the model is the layer"),
    pytest.param(lambda: nn.Sequential(nn.Linear(300, 3)), torch.randn(32, 300), {"shared": 2}, id="shared dendrites"),
]


@pytest.mark.parametrize(("make", "x", "settings"), CASES)
def test_a_file_of_dendrites_and_the_pretrained_model_are_the_grown_model(
    make: Callable[[], nn.Module], x: Tensor, settings: dict[str, Any], tmp_path: Path
) -> None:
    pretrained = make()
    model, fresh = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    grow(model, x, **settings)
    save_file(dendrites_state_dict(model), tmp_path / "grown.safetensors")
    load_dendrites(fresh, load_file(tmp_path / "grown.safetensors"))
    assert torch.equal(fresh(x), model(x))
    assert not torch.equal(fresh(x), pretrained(x))
    assert [(n, p.dtype, p.requires_grad) for n, p in fresh.named_parameters()] == [
        (n, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    ]


def test_integers_take_as_few_bytes_as_they_fit_in() -> None:
    model = sparse()
    grow(model, torch.randn(2, 6, 5, 5), fan_in=3)
    own, state = model.state_dict(), dendrites_state_dict(model)
    for layer, dtype in {"0": torch.uint8, "2": torch.uint8, "3": torch.int16}.items():
        key = f"{layer}.dendrites.1.nodes.inputs"
        assert state[key].dtype == dtype
        assert own[key].dtype == torch.int32
        assert torch.equal(state[key].int(), own[key])


class Bert(nn.Module):
    """A backbone, and a head that shares its weight with the embedding; with dendrites on the backbone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)
        self.norm.register_buffer("cache", torch.randn(1), persistent=False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.register_state_dict_post_hook(lambda module, state, *_: state.update({"cfg": "x"}))
        randomise(self, seed)

    def grown(self, *layers: int) -> Bert:
        network = attach(self, targets=["layers.*"])
        network.grow([f"layers.{layer}" for layer in layers])
        for layer in self.layers:
            randomise(layer.dendrites, 5)
        self.norm.running_mean.fill_(layers[0] + 1.5)
        return self


@pytest.mark.parametrize("also", [["head", "norm"], ["h*d", "norm.*"], ["head.*", "head.bias", "*norm"]], ids=str)
def test_what_was_trained_beside_the_dendrites_comes_with_them_and_all_else_is_left_alone(
    also: list[str], tmp_path: Path
) -> None:
    source, model = Bert(1).grown(0), Bert(2).grown(1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    objects = {name: id(value) for name, value in model.named_parameters() if ".dendrites." not in name}
    state = dendrites_state_dict(source, also=also)
    trained = {"head.weight", "head.bias", *(f"norm.{name}" for name in source.norm.state_dict())}
    assert {key for key in state if ".dendrites." not in key} == {*trained, ENTRIES}
    save_file(state, tmp_path / "grown.safetensors")
    network = load_dendrites(model, load_file(tmp_path / "grown.safetensors"))
    # Wholly: what the model had, on another layer, is gone.
    assert {name: layer.count for name, layer in network.layers.items()} == {"layers.0": 1, "layers.1": 0}
    own = dict(model.state_dict())
    assert all(torch.equal(own[key], state[key]) for key in trained | {k for k in state if "nodes" in k})
    for name in ("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"):
        assert torch.equal(own[name], before[name])
    assert {name: id(value) for name, value in model.named_parameters() if ".dendrites." not in name} == objects
    assert not torch.equal(model.norm.cache, source.norm.cache)


def test_what_is_returned_is_a_copy() -> None:
    model = Bert(1).grown(0)
    state = dendrites_state_dict(model, also=["head"])
    kept = {key: value.clone() for key, value in state.items()}
    randomise(model, 3)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize(
    ("also", "says"),
    [
        ("head", "must be a list of names or patterns, got 'head'"),
        (["head", "tail"], r"named 'tail'\. There are \[.*'norm.weight'"),
        (["norm.cache"], "named 'norm.cache'"),  # which no state_dict holds
        (["layers.0.dendrites"], "named 'layers.0.dendrites'"),  # which come anyway
    ],
)
def test_what_there_is_not_cannot_be_asked_for(also: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dendrites_state_dict(Bert(1).grown(0), also=also)


class Counts(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 1}

    def set_extra_state(self, state: Any) -> None: ...


def test_what_is_no_tensor_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Sequential(Counts(3, 3)))
    network = attach(model, targets=["0"])
    model(torch.randn(2, 3))
    network.grow(["0"])
    with pytest.raises(ValueError, match=r"no tensors.*\['0\.dendrites\.0\.nodes\.0\.0\._extra_state'\]"):
        dendrites_state_dict(model)


def test_a_model_with_candidates_takes_none() -> None:
    model = Bert(1).grown(0)
    state, network = dendrites_state_dict(model), attach(fresh := Bert(1), targets=["layers.*"])
    network.start_candidates(pool=2)
    before = traces(fresh)
    with pytest.raises(RuntimeError, match="integrate or discard them first"):
        load_dendrites(fresh, state)
    assert traces(fresh) == before
    assert dendrites_state_dict(fresh).keys() == {ENTRIES}


@pytest.mark.long  # for what it imports
def test_a_sharded_model_is_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        source, model = Bert(1).grown(0), Bert(2)
        fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (1,)))
        for call in (dendrites_state_dict, lambda fresh: load_dendrites(fresh, dendrites_state_dict(source))):
            with pytest.raises(ValueError, match="the model is sharded"):
                call(model)
    finally:
        torch.distributed.destroy_process_group()


# -- files of others ---------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, state: Any) -> str:
    before = traces(model)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - whoever calls this looks at what it says
        load_dendrites(model, state)
    assert traces(model) == before
    return str(error.value)


def test_no_part_is_taken_for_the_whole() -> None:
    state, fresh = dendrites_state_dict(Bert(1).grown(0, 1), also=["head"]), Bert(2).grown(1)
    for key in state:
        part = {name: value for name, value in state.items() if name != key}
        assert "is a part alone" in refusal(fresh, part) if key == ENTRIES else "is not whole" in refusal(fresh, part)
    assert "is a part alone" in refusal(fresh, Bert(1).grown(0).state_dict())
    for count in (torch.tensor(-1), torch.tensor(len(state)), torch.tensor(2**62), torch.tensor(float("nan"))):
        assert ENTRIES in (says := refusal(fresh, {**state, ENTRIES: count})) or "is not whole" in says


def counted(state: State) -> State:
    return {**state, ENTRIES: torch.tensor(len(state) - (ENTRIES in state))}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("layers.0.dendrites.0.nodes.weight", torch.zeros(4, 5), r"'layers.0': .*\(4, 4\), got \(4, 5\)"),
        ("layers.7.dendrites.0.links", torch.zeros(0, 4), "'layers.7': .*the model has no such layer"),
        ("layers.0.dendrites.0.code", torch.tensor([9, 0]), "'layers.0': .*code must hold integers below 5"),
        ("layers.0.dendrites.0.code", torch.tensor([0.0, 0.0]), "'layers.0': .*code must hold integers, got"),
        ("layers.0.dendrites.0.links", torch.zeros(0, 4, dtype=torch.int8), "'layers.0': .*be floating point"),
        (
            "layers.1.weight",
            torch.zeros(1).expand(4, 10**12),
            r"'layers.1.weight': .*\(4, 4\), got \(4, 1000000000000\)",
        ),
        ("norm.num_batches_tracked", torch.tensor(0.5), "'norm.num_batches_tracked': .*torch.int64, got torch.float32"),
        ("head.bias", torch.zeros(7, dtype=torch.int64), "'head.bias': .*torch.float32, got torch.int64"),
        ("head.bias", None, "'head.bias': .*got NoneType"),
        ("head.bias", torch.zeros(7, device="meta"), "'head.bias': .*got a tensor without values"),
        ("tail.bias", torch.zeros(7), "'tail.bias': the model has no such parameter or buffer"),
        ("norm.cache", torch.zeros(1), "'norm.cache': the model has no such parameter or buffer"),
        (7, torch.zeros(7), "a key is a int, not a text"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key: Any, value: Any, says: str) -> None:
    state = counted({**dendrites_state_dict(Bert(1).grown(0)), key: value})
    with pytest.raises(ValueError, match=says):
        raise ValueError(refusal(Bert(2).grown(1), state))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [20, pytest.param(3_000, marks=pytest.mark.slow)])
def test_any_state_is_loaded_whole_or_refused(number: int) -> None:
    rng, answers, model = random.Random(0), Counter[str](), mixed()
    source, before = dendrites_state_dict(mixed(), also=["head", "tied"]), megabytes()
    for _ in range(number):
        state: State = dict(source)
        for _ in range(rng.choice([0, 1, 1, 2])):
            mutate(rng, state)
        state = counted(state) if rng.random() < 0.9 else state
        model = model if rng.random() < 0.5 else Net()
        untouched = traces(model)
        try:
            load_dendrites(model, state)
        except ValueError:
            answers["refused"] += 1
            assert traces(model) == untouched
        else:
            answers["loaded"] += 1
            there = model.state_dict()
            torch.testing.assert_close(
                {key: there[key].to(value.dtype) for key, value in state.items() if key != ENTRIES},
                {key: value for key, value in state.items() if key != ENTRIES},
                rtol=0,
                atol=0,
                equal_nan=True,
            )
    assert min(answers.values()) > number / 10
    assert answers.total() == number
    assert megabytes() - before < 200
