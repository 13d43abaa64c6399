"""A callback's state that anybody may have written: it is taken, or refused with a reason and nothing has happened."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from pl_dendrites import DendriteCallback
from pl_dendrites.reporting.page import Picture, to_markdown
from pl_dendrites.reporting.report import report_blocks
from tests.core.test_structure_fuzz import megabytes
from tests.models import classifier, quick, train

State = dict[str, Any]
Path = list[Any]
STRANGE: list[Callable[[], Any]] = [
    lambda: None,
    lambda: -1,
    lambda: -2,
    lambda: 0,
    lambda: 1,
    lambda: 10**5000,
    lambda: -(10**5000),
    lambda: True,
    lambda: False,
    lambda: 0.5,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: "text",
    lambda: "",
    lambda: "base",
    lambda: "correlation",
    lambda: "integrate",
    lambda: b"bytes",
    lambda: [],
    lambda: [None],
    lambda: [{}],
    lambda: {},
    lambda: {1: 2},
    lambda: {"a": None},
    lambda: (),
    lambda: {1, 2},
    lambda: 1j,
    lambda: torch.tensor(1),
    lambda: torch.zeros(2),
    lambda: torch.zeros(1).expand(10**9),
    lambda: torch.zeros(1, dtype=torch.float64).expand(2**62),
    lambda: [torch.zeros(1).expand(10**9)],
    lambda: torch.empty(10**12, device="meta"),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    torch.nn.UninitializedParameter,
    object,
]
UNTOLD = {"running": None, "mirrors": {}, "rewiring": None, "form": None, "frontier": {"best": None, "smaller": []}}


class Grab(L.Callback):
    """Keeps the state at the end of every epoch."""

    def __init__(self, dendrites: DendriteCallback) -> None:
        self.dendrites, self.states = dendrites, list[State]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.states.append(copy.deepcopy(self.dendrites.state_dict()))


@pytest.fixture(scope="module")
def states() -> list[State]:
    """One of each kind: before the first score, in both phases, with decisions waiting, at the end."""
    dendrites = quick(max_dendrites=1)
    grab = Grab(dendrites)
    train(classifier(hidden=3), dendrites, grab)
    grab.states.append(copy.deepcopy(dendrites.state_dict()))
    kinds = {(s["machine"]["phase"], len(s["history"]), s["best"]["weights"] is None): s for s in grab.states}
    assert {phase for phase, _, _ in kinds} == {"base", "correlation"}
    assert any(s["correlation"] for s in kinds.values())
    assert any(s["frontier"]["smaller"] for s in kinds.values())
    return list(kinds.values())


def same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.is_nested != other.is_nested or one.data_ptr() != other.data_ptr():
            return False
        return one.is_nested or one.shape == other.shape  # a nested tensor of this kind has no shape
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def containers(value: Any) -> Iterator[Any]:
    """Every dict and list in a state, from the outside to the inside."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def unshared(value: Any) -> Any:
    """A copy whose dicts and lists may be changed; the tensors are the same."""
    if isinstance(value, dict):
        return {key: unshared(inner) for key, inner in value.items()}
    return [unshared(inner) for inner in value] if isinstance(value, list) else value


def mutate(rng: random.Random, state: State) -> None:
    # The outer ones are few and say most.
    found = list(containers(state))
    place = rng.choice(found[:1] + found)
    if rng.random() < 0.3:
        place = state[rng.choice(list(state))] if state else state
    if not isinstance(place, dict | list) or not place:
        place = state
    strange = rng.choice(STRANGE)()
    if isinstance(place, list):
        index = rng.randrange(len(place))
        rng.choice(
            [lambda: place.__setitem__(index, strange), lambda: place.append(strange), lambda: place.pop(index)]
        )()
        return
    key = rng.choice(list(place)) if place else "format"
    kind = rng.randrange(6)
    if kind == 0:
        place.pop(key, None)
    elif kind == 1:
        place[rng.choice(["", "extra", 7, None, (1, 2), f"{key} "])] = place.pop(key, None)
    elif kind == 2:
        other = rng.choice(list(place))
        place[key], place[other] = place.get(other), place.get(key)
    else:
        place[key] = strange


def test_states_as_they_are_load(states: list[State]) -> None:
    for state in states:
        fresh = quick()
        fresh.load_state_dict(state)
        assert same(fresh.state_dict(), state)


@pytest.mark.parametrize("number", [1000, pytest.param(5500, marks=pytest.mark.long)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_state_is_taken_whole_or_refused(seed: int, number: int, states: list[State]) -> None:
    rng, refused, callbacks = random.Random(seed), 0, []
    for state in (states[0], states[-2]):
        callbacks.append(quick())
        callbacks[-1].load_state_dict(state)
    most = megabytes()
    for place in range(number):
        state = unshared(rng.choice(states))
        for _ in range(rng.choice([1, 1, 2, 4])):
            mutate(rng, state)
        dendrites = callbacks[place % 2]
        before = unshared(dendrites.state_dict())
        try:
            dendrites.load_state_dict(state)
        except MisconfigurationException:
            refused += 1
            assert same(dendrites.state_dict(), before)
        else:
            after = dendrites.state_dict()
            assert same({**after, "machine": None}, {**UNTOLD, **state, "machine": None})
            assert same({**after["machine"], **state["machine"]}, after["machine"])
            dendrites.summary()
            records = [*state["history"], *filter(None, [state.get("running")])]
            if records:
                to_markdown("", [b for b in report_blocks(records) if not isinstance(b, Picture)], FilePath("r.md"))
    assert refused > number * 0.63
    assert megabytes() - most < 200


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ([], 7, "it must be a dict with texts as keys, got 7"),
        (["format"], True, "it has format True"),
        (["format"], 10**300, "it has format int"),
        (["more"], 1, r"it must have the entries \['batches', .*'used'\], got .*'more'"),
        (["machine"], [], "the state of the phase machine must be a dict, got list"),
        (["machine", "dendrites"], -1, "impossible values in the state of the phase machine: dendrites"),
        (["machine", "phase"], "base", "it has candidates outside a correlation phase"),
        (["history"], {}, "'history' must be a list, got dict"),
        (["history", 0, "accepted"], 1, r"'accepted' in 0 in 'history' must be one of \[True, False, None\], got 1"),
        (["history", 0, "epochs"], None, "'epochs' in 0 in 'history' must be an integer of at least 0, got None"),
        (["best", "path"], None, "'path' in 'best' must be a text, got None"),
        (["best", "weights"], {3: torch.zeros(1)}, "'weights' in 'best' must be a dict with texts as keys, got dict"),
        (
            ["best", "weights", "net.0.weight"],
            [1.0],
            "'net.0.weight' in 'weights' in 'best' must be a tensor, got list",
        ),
        (["frontier", "best"], {}, r"'best' in 'frontier' must have the entries \['cycle', .*'units'\], got \[\]"),
        (["frontier", "smaller"], {}, "'smaller' in 'frontier' must be a list, got dict"),
        (["seed"], -1, "'seed' must be an integer of at least 0, got -1"),
        (["score", "source"], "test", r"'source' in 'score' must be one of \['validation', .*got 'test'"),
        (
            ["correlation"],
            {},
            r"'correlation' must have the entries \['candidates', 'gradients', .*'whole_epoch'\], got \[\]",
        ),
        (["correlation", "optimizer"], {}, "'optimizer' in 'correlation' must be the state of an optimizer, got dict"),
        (["correlation", "trainable"], "all", "'trainable' in 'correlation' must be a list, got 'all'"),
    ],
    ids=str,
)
def test_a_refusal_says_where_and_why(path: Path, value: Any, says: str, states: list[State]) -> None:
    state = unshared(next(state for state in states if state["correlation"]))
    if path:
        place = state
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    dendrites = quick()
    dendrites.load_state_dict(states[0])
    before = dendrites.state_dict()
    with pytest.raises(
        MisconfigurationException, match=f"the checkpoint's DendriteCallback state cannot be .*: {says}"
    ):
        dendrites.load_state_dict(state if path else value)
    assert dendrites.state_dict() == before


@pytest.mark.parametrize("names", [7, None, {}, [7], [["a"]], [[[7]]], [[None]]], ids=str)
def test_names_of_parameters_that_are_none_are_refused(names: Any, tmp_path: FilePath) -> None:
    train(classifier(hidden=3), quick(max_dendrites=1), max_epochs=1).save_checkpoint(tmp_path / "file.ckpt")
    checkpoint = torch.load(tmp_path / "file.ckpt", weights_only=True)
    torch.save(checkpoint | {"pl_dendrites_optimizer_parameters": names}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=r"in 'pl_dendrites_optimizer_parameters' must be|'pl_dend.*' must be a list"):
        train(classifier(hidden=3), quick(max_dendrites=1), ckpt_path=tmp_path / "file.ckpt")


HOLLOW = [
    (["correlation", "candidates", "net.0", "reference"], torch.float32),
    (["correlation", "candidates", "net.0", "links"], torch.float32),
    (["correlation", "candidates", "net.0", "nodes.weight"], torch.float64),
    (["correlation", "optimizer", "state", 0, "exp_avg"], torch.float64),
    (["correlation", "optimizer", "state", 0, "more"], torch.int8),
    (["correlation", "optimizer", "param_groups", 0, "lr"], torch.float32),
    (["best", "weights", "net.0.weight"], torch.float32),
    (["best", "weights", "net.9.dendrites.0.neurons"], torch.int64),
]


@pytest.mark.parametrize(
    ("path", "dtype"), HOLLOW, ids=lambda value: ".".join(map(str, value)) if isinstance(value, list) else ""
)
def test_a_small_state_that_asks_for_gigabytes_is_refused_before_a_fit_begins(
    path: Path, dtype: torch.dtype, states: list[State], tmp_path: FilePath
) -> None:
    state = unshared(next(state for state in states if state["correlation"]))
    place = state
    for key in path[:-1]:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    place[path[-1]] = torch.zeros(1, dtype=dtype).expand(10**9)
    model, most = classifier(hidden=3), megabytes()
    trainer = train(classifier(hidden=3), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    checkpoint = torch.load(tmp_path / "file.ckpt", weights_only=True)
    torch.save({**checkpoint, "callbacks": {"DendriteCallback": state}}, tmp_path / "file.ckpt")
    assert (tmp_path / "file.ckpt").stat().st_size < 50_000
    where = path[1] if path[0] == "correlation" else path[0]
    with pytest.raises(MisconfigurationException, match=f"'{where}'.* would take .* bytes, and the state holds"):
        train(model, quick(max_dendrites=1), ckpt_path=tmp_path / "file.ckpt")
    assert megabytes() - most < 60


def test_a_smaller_network_holds_what_it_claims(states: list[State]) -> None:
    state = unshared(next(state for state in states if state["frontier"]["smaller"]))
    state["frontier"]["smaller"][0]["weights"]["net.0.weight"] = torch.zeros(1).expand(10**9)
    with pytest.raises(MisconfigurationException, match=r"'smaller' in 'frontier' would take .* bytes, and the state"):
        quick().load_state_dict(state)


def test_what_a_module_keeps_as_extra_state_is_its_own_affair(states: list[State]) -> None:
    state = unshared(next(state for state in states if state["best"]["weights"]))
    state["best"]["weights"]["net.9._extra_state"] = {"anything": [1, None]}
    quick().load_state_dict(state)
