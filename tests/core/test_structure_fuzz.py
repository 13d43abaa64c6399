"""A state_dict that anybody may have written: it fits, or it is refused and nothing has happened."""

from __future__ import annotations

import random
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core import Form, attach, restore_structure
from pl_dendrites.core.keys import is_dendrite_key
from tests.core.helpers import grow, randomise

State = dict[Any, Any]
PARTS = (
    "nodes.weight",
    "nodes.bias",
    "nodes.inputs",
    "links",
    "code",
    "neurons",
    "weights.0",
    "weights.1",
    "weights.2",
)


class Net(nn.Module):
    """Layers that can have dendrites, alone, nested and under two names, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.attention = nn.MultiheadAttention(4, 2)
        self.tied = self.block[0]
        self.head = nn.Linear(4, 3)


LAYERS = ["conv", "norm", "block", "block.0", "tied", "attention", "attention.out_proj", "head", "nowhere", ""]
LAYERS += ["head.dendrites", "head.dendrites.0.nodes", "block.0.dendrites.0.nodes", "head.weight", "a\nb"]


def grown(conv: int, block: int, head: int, activation: str) -> Net:
    model = Net()
    attach(model, activation=activation)
    for layer, count in ((model.conv, conv), (model.block[0], block), (model.head, head)):
        grow(layer, count)
    return model


def mixed() -> Net:
    """A model whose layers have stacks of all kinds."""
    model = Net()
    attach(model)
    forms = {
        model.conv: [Form(1, fan_in=1, neurons=2), Form(2)],
        model.block[0]: [Form(1, "relu", neurons=3), Form(1, live=True)],
        model.head: [Form(1), Form(2, fan_in=2), Form(1, "gelu", live=True, fan_in=1, neurons=2)],
    }
    for layer, wanted in forms.items():
        layer.dendrites.reshape(layer, wanted)
        randomise(layer.dendrites)
        for stack in layer.dendrites:
            if stack.form.fan_in:
                stack.kind.initialise(stack.nodes) if stack.neurons is None else stack.nodes.inputs.zero_()
    return model


SOURCES = [
    grown(*sizes).state_dict()
    for sizes in [(1, 2, 0, "tanh"), (2, 1, 3, "relu"), (0, 0, 1, "gelu"), (3, 3, 3, "sigmoid"), (0, 0, 0, "tanh")]
]
SOURCES += [mixed().state_dict()] * 3
QUANTISED = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


def strange_value(rng: random.Random, old: Any) -> Any:
    """Anything that a file could hold in the place of a tensor."""
    plain = isinstance(old, Tensor) and not is_lazy(old) and old.layout == torch.strided and not old.is_nested
    shape = tuple(old.shape) if plain and old.numel() < 10**6 else (3,)
    dtype = rng.choice([torch.int64, torch.int8, torch.bool, torch.complex64, torch.float16, torch.float64])
    makers: list[Callable[[], Any]] = [
        lambda: rng.choice(
            [None, "text", "", 0, 1.5, True, 10**5000, -(10**30), b"", [], {}, (), [1, [2]], {"a": None}]
        ),
        lambda: [torch.zeros(3)],
        lambda: torch.zeros(shape, dtype=dtype),
        lambda: torch.zeros(*shape, 1),
        lambda: torch.zeros(shape[1:]),
        lambda: torch.zeros([size + rng.choice([-1, 1, 3]) if size else 1 for size in shape]),
        lambda: torch.empty(1).expand(10**9, *shape),
        lambda: torch.empty(1).expand(shape) if shape else torch.empty(10**3),
        lambda: torch.empty(shape, device="meta"),
        lambda: torch.empty(10**12, *shape[1:], device="meta"),
        lambda: torch.zeros(shape).to_sparse() if shape else torch.zeros(2).to_sparse(),
        lambda: torch.zeros(2, 2).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        nn.UninitializedParameter,
        lambda: QUANTISED,
        lambda: torch.full(shape, float("nan")),
        lambda: torch.zeros([2 * size for size in shape])[tuple(slice(None, None, 2) for _ in shape)],
        lambda: torch.zeros(shape[::-1]).permute(list(range(len(shape)))[::-1]),
        lambda: torch.zeros(0),
        lambda: torch.tensor(rng.choice([-1, 4, 99, 2**62, 0, 1, 2, 3])),
        lambda: torch.tensor(rng.choice([float("nan"), 0.0, -1.0])),
        lambda: torch.tensor([0]),
        lambda: torch.zeros((), dtype=torch.int64, device="meta"),
    ]
    return rng.choice(makers)()


def strange_key(rng: random.Random, key: Any) -> Any:
    layer, _, part = str(key).partition("dendrites.")
    number = rng.choice(["99999999999999", "007", "-1", "1e3", "", "٣", "00", "1", "2", "3", "17"])
    return rng.choice(
        [
            f"{layer}dendrites.0.weights.{number}",
            f"{layer}dendrites.{number}.{rng.choice(PARTS)}",
            f"{layer}dendrites.0.{rng.choice(PARTS)}",
            f"{rng.choice(LAYERS)}.dendrites.{part}",
            f"dendrites.{part}",
            f"{key}\n",
            f"{key}.",
            f".{key}",
            str(key).upper(),
            "",
            *([7, (1, "a"), None, b"links", 1.5] if rng.random() < 0.2 else []),
        ]
    )


def mutate(rng: random.Random, state: State) -> None:
    ours = [key for key in state if isinstance(key, str) and is_dendrite_key(key)]
    key = rng.choice(ours if ours and rng.random() < 0.8 else list(state) or [""])
    layer = str(key).partition(".dendrites")[0]
    kind = rng.choice(["drop", "rename", "copy", "spoil", "spoil", "move", "clear", "grow", "grow", "hollow"])
    if kind == "drop":
        state.pop(key, None)
    elif kind == "rename":
        state[strange_key(rng, key)] = state.pop(key, None)
    elif kind == "copy":
        state[strange_key(rng, key)] = state.get(key)
    elif kind == "spoil":
        state[key] = strange_value(rng, state.get(key))
    elif kind == "move":
        other = rng.choice(LAYERS)
        state |= {str(name).replace(layer, other, 1).removeprefix("."): state[name] for name in ours if layer in name}
    elif kind == "clear":
        gone = rng.choice([f"{layer}.dendrites.", f"{layer}.dendrites.", f"{layer}.", ""])
        for name in [name for name in state if str(name).startswith(gone)]:
            del state[name]
    elif kind == "hollow":
        hollow_stack(state, layer, rng)
    else:
        more_dendrites(state, layer, rng.choice([1, 2, 5, 30]), rng.random() < 0.7)


def more_dendrites(state: State, layer: str, count: int, hollow: bool) -> None:
    """A consistent layer of any size, in tensors that repeat one number."""
    own = state.get(f"{layer}.weight")
    if (
        not isinstance(own, Tensor)
        or is_lazy(own)
        or own.is_nested
        or own.layout != torch.strided
        or own.is_meta
        or own.ndim == 0
    ):
        return
    neurons, make = len(own), (lambda *shape: torch.zeros(1).expand(shape)) if hollow else torch.zeros
    parts = {"nodes.weight": make(count * neurons, *own.shape[1:]), "nodes.bias": make(count * neurons)}
    parts |= {"links": make(count * (count - 1) // 2, neurons), "code": torch.tensor([0, 0])}
    one = make(neurons)
    parts |= {f"weights.{j}": one if hollow else one.clone() for j in range(count)}
    state.update({f"{layer}.dendrites.0.{part}": value for part, value in parts.items()})


def hollow_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(1, dtype=dtype).expand(shape)


def hollow_stack(state: State, layer: str, rng: random.Random) -> None:
    """A stack of chosen neurons or chosen inputs, consistent in itself, for which a file holds one number each."""
    own = state.get(f"{layer}.weight")
    if not isinstance(own, Tensor) or is_lazy(own) or own.is_nested or own.layout != torch.strided or own.ndim < 2:
        return
    many, m = rng.choice([10**7, 10**9, 2**31, 2**60]), rng.choice([None, 1, 2, 10**9])
    prefix = f"{layer}.dendrites.{rng.choice('001')}"
    neurons = many if rng.random() < 0.5 else len(own)
    parts = {
        "nodes.weight": hollow_of(neurons, own.shape[1] if m is None else min(m, 4)),
        "nodes.bias": hollow_of(neurons),
    }
    parts |= {
        "links": torch.zeros(0, 1).expand(0, neurons),
        "weights.0": hollow_of(neurons),
        "code": torch.tensor([0, 0]),
    }
    if rng.random() < 0.7:
        parts["neurons"] = hollow_of(many, dtype=torch.int64)
    if m is not None:
        parts["nodes.inputs"] = hollow_of(neurons, min(m, 2**62 // neurons), dtype=torch.int64)
    state.update({f"{prefix}.{part}": value for part, value in parts.items()})


def mutated(seed: int, number: int) -> Iterator[State]:
    rng = random.Random(seed)
    for _ in range(number):
        state: State = dict(rng.choice(SOURCES))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutate(rng, state)
        yield state


def traces(model: nn.Module) -> list[Any]:
    """Every object of a model, each hook, and how often each tensor was written to."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (module._forward_hooks, module._forward_hooks_with_kwargs, module._load_state_dict_pre_hooks)
        found.append((name, id(module), module.training, [list(table) for table in hooks]))
        found.append(getattr(module, "activation", None))
        tensors = {**module._parameters, **module._buffers}
        found += [(key, id(value), value is not None and value._version) for key, value in tensors.items()]
    return found


def megabytes() -> float:
    """The most memory that the process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def answer(take: Callable[[State], Any], state: State, model: nn.Module) -> str:
    """``"taken"``, or ``"refused"`` with everything as it was, or ``"PyTorch's"`` error; there must be no other."""
    before, refusal = traces(model), ""
    try:
        take(state)
    except ValueError as error:
        refusal = str(error)
    except RuntimeError:
        return "PyTorch's"
    if not refusal:
        return "taken"
    assert refusal.startswith("the state_dict does not fit the model:\n")
    assert traces(model) == before
    return "refused"


def misfits(model: nn.Module, state: State) -> set[str]:
    """The dendrites' entries that a model does not have, or not of that shape."""
    there = {key: value.shape for key, value in model.state_dict().items()}
    return {key for key, value in state.items() if is_dendrite_key(key) and there.get(key) != value.shape}


several = pytest.mark.parametrize(
    "number", [250, pytest.param(1000, marks=pytest.mark.long), pytest.param(10_000, marks=pytest.mark.slow)]
)


@several
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("seed", "plain"), [(0, True), (1, False)], ids=["plain", "attached"])
def test_restore_structure_refuses_or_fits(seed: int, plain: bool, number: int) -> None:
    answers, before, model = Counter[str](), megabytes(), grown(1, 0, 2, "tanh")
    for state in mutated(seed, number):
        model = Net() if plain else model
        given = answer(partial(restore_structure, model), state, model)
        answers[given] += 1
        assert given != "taken" or not misfits(model, state)
    assert answers["taken"] > number / 7
    assert answers["refused"] > number / 2.5
    assert not answers["PyTorch's"]
    assert megabytes() - before < 200


@several
@pytest.mark.filterwarnings("ignore")
def test_load_state_dict_refuses_or_fits(number: int) -> None:
    answers, before, model = Counter[str](), megabytes(), grown(1, 0, 2, "tanh")
    for place, state in enumerate(mutated(2, number)):
        given = answer(partial(model.load_state_dict, strict=place % 2 == 0), state, model)
        answers[given] += 1
        # What PyTorch refuses is no entry of ours: those fit by then.
        assert given == "refused" or not misfits(model, state)
    assert answers["taken"] > number / 7
    assert answers["refused"] > number / 2.5
    assert megabytes() - before < 200


def refusal(model: nn.Module, state: State) -> str:
    before = traces(model)
    with pytest.raises(ValueError, match="the state_dict does not fit the model") as error:
        restore_structure(model, state)
    assert traces(model) == before
    return str(error.value)


@pytest.mark.parametrize("hollow", ["repeats", "shares"])
def test_a_small_file_that_speaks_of_gigabytes_is_refused_before_memory_is_taken(hollow: str) -> None:
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(200))
    state = model.state_dict()
    if hollow == "repeats":
        more_dendrites(state, "0", 4000, True)
    else:  # 200 layers speak of the same 3 MB
        more_dendrites(state, "0", 150, False)
        for layer in range(1, 200):
            state |= {key.replace("0", str(layer), 1): v for key, v in state.items() if key.startswith("0.dendrites")}
    before = megabytes()
    assert "would take" in refusal(model, state)
    assert megabytes() - before < 100


class Unseen(nn.Module):
    """A module of a user's own, whose neurons nobody knows before it ran; and a recurrent one, both with many names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(*(nn.Linear(3, 3) for _ in range(40)))
        self.lstm = nn.LSTM(3, 3)


def chosen_neurons(state: State) -> None:
    state |= {"head.dendrites.0.nodes.weight": hollow_of(HUGE, 4), "head.dendrites.0.nodes.bias": hollow_of(HUGE)}
    state |= {"head.dendrites.0.links": torch.zeros(0, HUGE), "head.dendrites.0.weights.0": hollow_of(HUGE)}
    state |= {"head.dendrites.0.code": torch.tensor([0, 0])}
    state["head.dendrites.0.neurons"] = hollow_of(HUGE, dtype=torch.int64)


def chosen_inputs(state: State) -> None:
    more_dendrites(state, "head", HUGE // 10_000, True)
    state["head.dendrites.0.nodes.inputs"] = hollow_of(3 * HUGE // 10_000, 2, dtype=torch.int64)
    state["head.dendrites.0.nodes.weight"] = hollow_of(3 * HUGE // 10_000, 2)


def neurons_of_a_module(state: State) -> None:
    state |= {f"block.dendrites.0.nodes.0.{key[6:]}": value for key, value in state.items() if key[:6] == "block."}
    state |= {"block.dendrites.0.links": torch.zeros(0, HUGE), "block.dendrites.0.code": torch.tensor([0, 0])}
    state["block.dendrites.0.weights.0"] = torch.zeros(1).expand(HUGE)


def neurons_beyond_counting(state: State) -> None:
    neurons_of_a_module(state)
    state["block.dendrites.0.weights.0"] = torch.zeros(1).expand(2**62)


def names_of_many(state: State) -> None:
    """Names of output weights, each of which says that there is one more copy of a module of eighty names."""
    neurons_of_a_module(state)
    state |= dict.fromkeys((f"block.dendrites.0.weights.{j}" for j in range(60_000)), torch.zeros(3))


HUGE = 60_000_000
SPOILT = [chosen_neurons, chosen_inputs, neurons_of_a_module, neurons_beyond_counting, names_of_many]


@pytest.mark.parametrize("spoil", SPOILT)
def test_numbers_that_become_lists_sizes_or_names_are_compared_first(spoil: Callable[[State], None]) -> None:
    model = Net() if spoil in SPOILT[:2] else Unseen()
    state = dict(model.state_dict())
    spoil(state)
    before = megabytes()
    refusal(model, state)
    assert megabytes() - before < 60


def test_numbers_that_a_file_does_not_hold_are_not_looked_at() -> None:
    """Each is wrong, which nobody sees who does not look."""
    state = dict(Net().state_dict())
    more_dendrites(state, "head", 300, True)
    state["head.dendrites.0.nodes.weight"] = hollow_of(900, 2)
    state["head.dendrites.0.nodes.inputs"] = hollow_of(900, 2, dtype=torch.int64) - 1
    assert "must hold integers below 4" in refusal(Net(), {**state, **held(state)})
    state["head.dendrites.0.nodes.inputs"] = torch.full((1,), -1).expand(900, 2)
    assert "would take" in refusal(Net(), state)


def held(state: State) -> State:
    return {key: value.clone() for key, value in state.items() if is_dendrite_key(key)}


def test_numbers_of_stacks_are_names_and_no_sizes() -> None:
    for number in ("999999999", "99999999999999999999999"):
        state = {key.replace("dendrites.0", f"dendrites.{number}"): value for key, value in SOURCES[1].items()}
        assert "its dendrites are incomplete" in refusal(Net(), state)
        state = {key.replace("weights.1", f"weights.{number}"): value for key, value in SOURCES[1].items()}
        assert "its dendrites are incomplete" in refusal(Net(), state)


def test_weights_that_are_views_of_one_large_buffer_are_as_good_as_others() -> None:
    source = SOURCES[1]
    numbers = [key for key, value in source.items() if value.is_floating_point()]
    buffer = torch.cat([source[key].flatten() for key in numbers])
    pieces = buffer.split([source[key].numel() for key in numbers])
    views = {key: piece.view(source[key].shape) for key, piece in zip(numbers, pieces, strict=True)}
    fresh = Net()
    restore_structure(fresh, {**source, **views})
    fresh.load_state_dict({**source, **views}, strict=True)
    assert all(torch.equal(value, source[key]) for key, value in fresh.state_dict().items())


def test_a_tensor_of_no_bytes_shares_with_nobody() -> None:
    """In a file that is mapped it lies where the next one begins: the links of a layer's first dendrite do."""
    grown, fresh = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3))
    attach(grown).grow(["0"])
    state = grown.state_dict()
    file = torch.cat([value.flatten().view(torch.uint8) for value in state.values()]).untyped_storage()
    mapped, start = {}, 0
    for key, value in state.items():
        part = torch.empty(0, dtype=value.dtype)
        part.set_(file[start : start + value.nbytes], 0, value.shape, value.stride())
        mapped[key], start = part, start + value.nbytes
    empty = mapped["0.dendrites.0.links"].untyped_storage().data_ptr()
    assert [value.untyped_storage().data_ptr() for value in mapped.values()].count(empty) == 2
    restore_structure(fresh, mapped)
    fresh.load_state_dict(mapped)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        ("attention.out_proj", "a NonDynamicallyQuantizableLinear cannot .*MultiheadAttention uses its weights"),
        ("head.dendrites.0.nodes", "a Linear cannot have any here: it is a part of dendrites itself"),
        ("whole", "a Linear cannot have any here: its weight is of type torch.int8, not floating point"),
    ],
)
def test_a_layer_that_could_not_be_attached_is_not_restored_either(layer: str, says: str) -> None:
    model = grown(0, 0, 1, "tanh")
    model.whole = nn.Linear(4, 4)
    model.whole.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    state = model.state_dict()
    state |= {f"{layer}.weight": torch.zeros(model.get_submodule(layer).weight.shape)}
    more_dendrites(state, layer, 1, False)
    assert re.search(says, refusal(model, state))


def test_a_layer_under_two_names_with_different_dendrites_is_refused() -> None:
    state = dict(SOURCES[0])
    for layer in ("tied", "block.0"):
        state = {key: value for key, value in state.items() if not key.startswith(f"{layer}.dendrites")}
        more_dendrites(state, layer, 1 if layer == "tied" else 2, False)
    assert "it has other dendrites under another name" in refusal(Net(), state)


def test_a_layer_under_two_names_may_have_its_dendrites_under_one() -> None:
    state = {key: value for key, value in SOURCES[0].items() if not key.startswith("tied.dendrites")}
    model = grown(0, 0, 0, "tanh")
    restore_structure(model, state)
    assert model.tied.dendrites.count == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.zeros(9, 4, dtype=torch.int32), "be floating point, got torch.int32"),
        (lambda: torch.zeros(9, 4, dtype=torch.complex64), "be floating point, got torch.complex64"),
        (lambda: torch.empty(9, 4, device="meta"), r"\(9, 4\), got a tensor without values"),
        (nn.UninitializedParameter, r"\(9, 4\), got a tensor without values"),
        (lambda: torch.zeros(9, 4).to_sparse(), r"\(9, 4\), got a nested or sparse tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(4)] * 9), r"\(9, 4\), got a nested or sparse tensor"),
    ],
)
def test_what_is_no_plain_tensor_of_numbers_is_refused(make: Callable[[], Any], says: str) -> None:
    state = {**SOURCES[1], "head.dendrites.0.nodes.weight": make()}
    assert re.search(f"'head': dendrites.0.nodes.weight must .*{says}", refusal(Net(), state))


def test_a_key_that_only_looks_like_one_of_ours_is_none() -> None:
    state = {f"{key}\n" if is_dendrite_key(key) else key: value for key, value in SOURCES[1].items()}
    model = Net()
    assert restore_structure(model, state) is None
    assert not hasattr(model.head, "dendrites")


@pytest.mark.parametrize("key", [7, None, ("head", "links"), b"head.dendrites.0.links"])
@pytest.mark.parametrize("load", [restore_structure, nn.Module.load_state_dict])
def test_a_key_that_is_no_text_is_refused(key: Any, load: Callable[[nn.Module, State], Any]) -> None:
    model = grown(0, 0, 0, "tanh")
    with pytest.raises(ValueError, match=f"a key is a {type(key).__name__}, not a text"):
        load(model, {**SOURCES[0], key: torch.zeros(1)})


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("1.nodes.inputs", torch.full((6, 2), 4), "nodes.inputs must hold integers below 4, got 4 to 4"),
        ("1.nodes.inputs", torch.full((6, 2), -1), "nodes.inputs must hold integers below 4, got -1 to -1"),
        ("1.nodes.inputs", torch.zeros(6, 2), "nodes.inputs must hold integers, got torch.float32"),
        ("1.nodes.inputs", torch.zeros(6, 5, dtype=torch.int64), "has 4 inputs, and a dendrite cannot see 5"),
        ("1.nodes.inputs", torch.zeros(6, 1, dtype=torch.int64), r"nodes.weight must have the shape \(6, 1\)"),
        ("1.nodes.inputs", torch.zeros((), dtype=torch.int64), "incomplete"),
        ("2.neurons", torch.tensor([1, 1]), "neurons must be ascending"),
        ("2.neurons", torch.tensor([2, 0]), "neurons must be ascending"),
        ("2.neurons", torch.tensor([0, 3]), "neurons must hold integers below 3, got 0 to 3"),
        ("2.neurons", torch.tensor([0]), r"must have the shape \(1,"),
        ("2.neurons", torch.tensor([0.0, 1.0]), "neurons must hold integers"),
        ("1.code", torch.tensor([0, 7]), "code must hold integers below 5|code must end with 0 or 1"),
        ("9.code", torch.tensor([0, 0]), "incomplete: there are the stacks"),
        ("01.code", torch.tensor([0, 0]), "incomplete: there are the stacks"),
    ],
)
def test_stacks_that_do_not_fit_are_refused_by_name(part: str, value: Any, says: str) -> None:
    state = {**SOURCES[-1], f"head.dendrites.{part}": value}
    assert re.search(f"'head': .*({says})", refusal(Net(), state))
