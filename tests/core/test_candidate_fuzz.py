"""A state of candidates that anybody may have written: it fits, or it is refused and nothing has happened."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import DendriticNetwork, attach
from tests.core.test_structure_fuzz import megabytes, strange_value, traces

State = dict[str, dict[str, Any]]


class Block(nn.Module):
    """A module of a user's own, whose neurons nobody knows before it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def networks(ran: bool) -> DendriticNetwork:
    model = nn.ModuleDict({"block": Block(), "conv": nn.Conv1d(2, 4, 1), "head": nn.Linear(5, 3)})
    network = attach(model, targets=["block", "conv", "head"])
    if ran:
        model["block"](torch.randn(2, 3))
    return network


def states() -> list[State]:
    """Of dense and of sparse candidates."""
    found = []
    for sparse in (False, True):
        network = networks(True)
        network.start_candidates(2)
        if sparse:
            network.set_next(fan_in=2)
            network.keep_strongest()
        found.append(network.candidate_state())
    return found


SOURCES = states()
COUNTS = (2**31, 10**9, 10**7, 2**62)


def hollow(rng: random.Random, value: Tensor) -> Tensor:
    """A tensor that repeats one number, larger along one of its dimensions."""
    shape, one = list(value.shape) or [1], torch.zeros(1, dtype=value.dtype)
    shape[rng.randrange(len(shape))] = rng.choice(COUNTS)
    try:
        return one.expand(shape)
    except RuntimeError:  # beyond what can be counted
        return one.expand(10**9)


def consistent(rng: random.Random, values: dict[str, Any]) -> None:
    """A whole pool for any number of neurons, as the shapes of a hollow file have it."""
    neurons, tensors = rng.choice(COUNTS[:3]), {k: v for k, v in values.items() if isinstance(v, Tensor)}
    for key, value in tensors.items():
        if not key.startswith("nodes.") and value.ndim and not value.is_nested and value.layout == torch.strided:
            values[key] = torch.zeros(1).expand(*value.shape[:-1], neurons if key != "links" or value.numel() else 0)
    if "links" in values:
        values["links"] = torch.zeros(2, 0, 1).expand(2, 0, neurons)


def mutate(rng: random.Random, state: State) -> None:
    layer = rng.choice(list(state) or ["block"])
    values = state.get(layer, {})
    key = rng.choice(list(values) or ["reference"])
    kind = rng.randrange(8)
    if kind == 0:
        state.pop(layer, None)
    elif kind == 1:
        state[rng.choice(["block", "conv", "head", "nowhere", ""])] = values
    elif kind == 2:
        values.pop(key, None)
    elif kind == 3:
        values[rng.choice(["nodes.inputs", "nodes.weight", "nodes.9999999.inner.weight", "more"])] = values.get(key)
    elif kind == 4 and isinstance(values.get(key), Tensor) and not values[key].is_nested:
        values[key] = hollow(rng, values[key]) if values[key].layout == torch.strided else None
    elif kind == 5:
        consistent(rng, values)
    else:
        values[key] = strange_value(rng, values.get(key))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ran", [True, False])
def test_a_pool_starts_from_a_state_that_fits_or_not_at_all(ran: bool, number: int) -> None:
    rng, answers, network = random.Random(ran), Counter[str](), networks(ran)
    network.start_candidates(2, state=SOURCES[0]), network.discard()
    before, most = traces(network.model), megabytes()
    for _ in range(number):
        state: State = {name: dict(values) for name, values in rng.choice(SOURCES).items()}
        for _ in range(rng.choice([0, 1, 1, 2])):
            mutate(rng, state)
        network.layers["block"].kind.neurons = 3 if ran else None
        try:
            network.start_candidates(2, state=state)
        except ValueError:
            answers["refused"] += 1
            assert network.layers["block"].kind.neurons == (3 if ran else None)
        else:
            answers["taken"] += 1
            taken = network.candidate_state()
            assert taken.keys() == state.keys()
            for name, values in state.items():  # what older states are without has its shape anyhow
                assert {key: taken[name][key].shape for key in values} == {k: v.shape for k, v in values.items()}
            network.discard()
        assert network.candidates == {}
        assert [p.requires_grad for p in network.model.parameters()] == [True] * 6
        assert traces(network.model) == before
    assert answers["taken"] > number / 5
    assert answers["refused"] > number / 3
    assert megabytes() - most < 100


@pytest.mark.parametrize("spoil", [hollow, consistent])
def test_a_pool_for_millions_of_neurons_in_a_small_file_is_refused(spoil: Callable[..., Any]) -> None:
    state = {name: dict(values) for name, values in SOURCES[0].items()}
    if spoil is consistent:
        consistent(random.Random(0), state["block"])
    else:
        state["block"]["reference"] = torch.zeros(1).expand(10**7)
    network, most = networks(False), megabytes()
    with pytest.raises(ValueError, match=r"the saved candidates would take .* bytes, and their state holds"):
        network.start_candidates(2, state=state)
    assert megabytes() - most < 20
    assert network.can_grow() == ["conv", "head"]


def test_neurons_that_a_file_does_hold_come_with_a_pool_of_their_size_alone() -> None:
    """Tensors of one megabyte would be a hundred of them if the pool were not compared first."""
    state = {name: dict(values) for name, values in SOURCES[0].items()}
    state["block"]["reference"] = torch.zeros(250_000)
    network, most = networks(False), megabytes()
    with pytest.raises(ValueError, match="the saved candidates of 'block' have samples of the shape"):
        network.start_candidates(100, state=state)
    assert megabytes() - most < 20


def test_a_state_goes_into_candidates_that_are_there_only_as_far_as_it_holds() -> None:
    network = networks(True)
    network.start_candidates(2)
    state = {name: dict(values) for name, values in SOURCES[1].items()}
    inputs = state["head"]["nodes.inputs"]
    state["head"]["nodes.inputs"] = torch.zeros(1, dtype=torch.int64).expand(10**10, *inputs.shape)
    with pytest.raises(ValueError, match="they would take"):
        network.load_candidate_state(state)
