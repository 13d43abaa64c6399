"""Recurrent layers: dendrites with a state of their own, in one call or in many, in one direction or in two."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from pl_dendrites.core import ACTIVATIONS, attach, detach
from tests.core.helpers import (
    assert_gradients,
    grow,
    output_of,
    randomise,
    reference_dendrites,
    reference_error,
    reference_forward,
    reference_gradients,
    reference_pool,
    samples,
)
from tests.core.test_correlation_rule import pearson_of, started, wavy

MakeLayer = Callable[[], nn.Module]

# Sequences of 6 with 3 inputs, in the order that each layer wants.
LAYERS = [
    pytest.param(lambda: nn.RNN(3, 4), (6, 2, 3), id="rnn"),
    pytest.param(lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True), (2, 6, 3), id="rnn-relu-batch-first"),
    pytest.param(lambda: nn.GRU(3, 4, 2, bidirectional=True), (6, 2, 3), id="gru-two-layers-both-ways"),
    pytest.param(lambda: nn.GRU(3, 4, bias=False), (6, 3), id="gru-unbatched"),
    pytest.param(lambda: nn.LSTM(3, 4, batch_first=True), (2, 6, 3), id="lstm-batch-first"),
    pytest.param(lambda: nn.LSTM(3, 5, 2, proj_size=2, bidirectional=True), (6, 2, 3), id="lstm-projected-both-ways"),
    pytest.param(lambda: nn.LSTM(3, 4, bidirectional=True, batch_first=True), (6, 3), id="lstm-unbatched-both-ways"),
]
ONE_WAY = [param for param in LAYERS if "both-ways" not in param.id]
CELLS = [
    pytest.param(lambda: nn.RNNCell(3, 4), id="rnn-cell"),
    pytest.param(lambda: nn.GRUCell(3, 4), id="gru-cell"),
    pytest.param(lambda: nn.LSTMCell(3, 4), id="lstm-cell"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grown(layer: nn.Module, dendrites: int = 2) -> nn.Module:
    randomise(layer.double(), 1)
    attach(layer)
    grow(layer, dendrites, 2)
    return layer


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from tensors(item)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_output_sequence_is_the_formula(make: MakeLayer, shape: tuple[int, ...], activation: str) -> None:
    layer = make().double()
    attach(layer, activation=activation)
    grow(layer, 3)
    x = random(*shape)
    torch.testing.assert_close(layer(x)[0], reference_forward(layer, x))
    torch.testing.assert_close(layer(input=x)[0], reference_forward(layer, x))
    assert (layer(x)[0] - layer.forward(x)[0]).abs().max() > 0.01


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_nothing_changes_where_dendrites_add_nothing(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(shape)
    expected = list(tensors(layer(x)))
    network = attach(layer)
    assert all(map(torch.equal, tensors(layer(x)), expected))
    network.start_candidates(pool=2)
    out, state = layer(x)
    assert all(map(torch.equal, tensors((out, state)), expected))
    (out.sin().sum() + sum(h.square().sum() for h in tensors(state))).backward()
    assert list(network.integrate()) == [""]
    assert network.num_dendrites == 1
    assert all(map(torch.equal, tensors(layer(x)), expected))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_final_state_is_the_end_of_the_sequence(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = grown(make())
    out, state = layer(random(*shape))
    hidden = state[0] if isinstance(state, tuple) else state
    plain_state = layer.forward(random(*shape))[1]
    time = 1 if layer.batch_first and out.ndim == 3 else 0
    size = layer.proj_size or layer.hidden_size
    ways = 2 if layer.bidirectional else 1
    torch.testing.assert_close(hidden[-ways], out.select(time, -1)[..., :size])
    if ways == 2:
        torch.testing.assert_close(hidden[-1], out.select(time, 0)[..., size:])
    plain_hidden = plain_state[0] if isinstance(plain_state, tuple) else plain_state
    assert torch.equal(hidden[:-ways], plain_hidden[:-ways])
    if isinstance(state, tuple):
        assert torch.equal(state[1], plain_state[1])


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(("make", "shape"), [param for param in LAYERS if "unbatched" not in param.id])
def test_packed_sequences_are_as_each_sequence_by_itself(make: MakeLayer, shape: tuple[int, ...], sort: bool) -> None:
    layer = grown(make())
    sequences = [random(length, 3, seed=length) for length in ([5, 3, 2] if sort else [2, 5, 3])]
    packed = pack_sequence(sequences, enforce_sorted=sort)
    out, state = layer(packed)
    assert isinstance(out, PackedSequence)
    padded, lengths = pad_packed_sequence(out, batch_first=True)
    for i, sequence in enumerate(sequences):
        alone, alone_state = layer(sequence)
        assert lengths[i] == len(sequence)
        torch.testing.assert_close(padded[i, : lengths[i]], alone)
        for h, alone_h in zip(tensors(state), tensors(alone_state), strict=True):
            torch.testing.assert_close(h[:, i], alone_h)


def test_padding_is_no_sample() -> None:
    layer = nn.GRU(3, 2, batch_first=True)
    network = started(layer, dendrites=0)
    padded = pack_padded_sequence(random(2, 5, 3), [5, 2], batch_first=True)
    layer(padded)[0].data.sin().sum().backward()
    assert layer.dendrites.candidates.moments.samples.tolist() == [7, 7]
    assert network.layers_with_error() == [""]


@pytest.mark.parametrize("dendrites", [0, 2])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_candidates_get_the_gradient_of_autograd(make: MakeLayer, shape: tuple[int, ...], dendrites: int) -> None:
    layer = make()
    network = started(layer, dendrites)
    x = random(*shape)
    wavy(layer(x)[0]).backward()
    error = reference_error(layer, x, wavy)
    assert_gradients(layer, reference_gradients(layer, [(x, error)]), 1e-6)
    outputs, errors = samples(reference_pool(layer, x).detach(), layer, 1), samples(error, layer)
    expected = pearson_of(outputs, errors).nan_to_num()  # ours is 0 where a candidate is constant
    torch.testing.assert_close(network.correlations()[""], expected)
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_model_that_uses_the_final_state_alone_has_an_error(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = make()
    network = started(layer, dendrites=1)
    for size in (1.0, -0.5, 2.0):  # of a single sequence the final entry is one sample
        state = layer(size * random(*shape))[1]
        hidden = state[0] if isinstance(state, tuple) else state
        wavy(hidden[-1]).backward()
        assert network.layers_with_error() == [""]
    taken = network.integrate()[""]
    assert taken[-1].abs() > 0


def test_all_neurons_take_the_same_candidate() -> None:
    layer = nn.LSTM(3, 4)
    network = started(layer, dendrites=1, pool=3)
    x = random(6, 5, 3)
    wavy(layer(x)[0]).backward()
    correlations = network.correlations()[""]
    best = int(correlations.abs().mean(1).argmax())
    expected = reference_pool(layer, x)[best]
    torch.testing.assert_close(network.integrate()[""], correlations[best])
    torch.testing.assert_close(reference_dendrites(layer, x)[-1], expected)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("pieces", [(6,), (3, 3), (1, 4, 1), (1,) * 6])
@pytest.mark.parametrize(("make", "shape"), ONE_WAY)
def test_a_sequence_in_pieces_is_the_sequence(
    make: MakeLayer, shape: tuple[int, ...], pieces: tuple[int, ...], detached: bool
) -> None:
    layer = grown(make())
    x = random(*shape)
    time = 1 if layer.batch_first and x.ndim == 3 else 0
    whole, state = layer(x)
    outputs, carried = [], None
    for piece in x.split(pieces, time):
        out, carried = layer(piece, carried) if len(outputs) % 2 else layer(piece, hx=carried)
        outputs.append(out)
        if detached:
            carried = tuple(h.detach() for h in carried) if isinstance(carried, tuple) else carried.detach()
    torch.testing.assert_close(torch.cat(outputs, time), whole)
    assert all(torch.allclose(a, b) for a, b in zip(tensors(carried), tensors(state), strict=True))


@pytest.mark.parametrize(("make", "shape"), ONE_WAY)
def test_gradients_flow_through_the_pieces_as_through_the_sequence(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = grown(make())
    x = random(*shape).requires_grad_()
    time = 1 if layer.batch_first and x.ndim == 3 else 0
    wavy(layer(x)[0]).backward()
    learn = [x, *layer.parameters()]
    expected = [p.grad.clone() for p in learn if p.grad is not None]
    for p in learn:
        p.grad = None
    outputs, state = [], None
    for piece in x.split(2, time):
        out, state = layer(piece, state)
        outputs.append(out)
    wavy(torch.cat(outputs, time)).backward()
    found = [p.grad for p in learn if p.grad is not None]
    assert len(expected) == len(found) > 2
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_validation_in_between_ends_no_sequence() -> None:
    layer = grown(nn.GRU(3, 4))
    x = random(6, 2, 3)
    whole = layer(x)[0]
    first, state = layer(x[:3])
    layer.eval()
    with torch.inference_mode():
        other = layer(random(4, 2, 3, seed=1))
        carried = layer(random(1, 2, 3, seed=2), other[1])[0]
        together = layer(torch.cat([random(4, 2, 3, seed=1), random(1, 2, 3, seed=2)]))[0]
    torch.testing.assert_close(carried, together[-1:])
    layer.train()
    torch.testing.assert_close(torch.cat([first, layer(x[3:], state)[0]]), whole)


def test_a_state_from_elsewhere_starts_layer_and_dendrites_alike() -> None:
    """An encoder's state, a copy, or one that was changed in place is what it says, and no more."""
    layer, x = grown(nn.LSTM(3, 4)), random(6, 2, 3)
    elsewhere = (random(1, 2, 4, seed=1), random(1, 2, 4, seed=2))
    expected = layer.forward(x, elsewhere)[0]
    outputs: list[Tensor] = []
    for j in range(2):
        total = layer.dendrites[0].nodes[j](x, elsewhere)[0]
        for i, earlier in enumerate(outputs):
            total = total + layer.dendrites[0].links[j * (j - 1) // 2 + i] * earlier
        outputs.append(total.tanh())
        expected = expected + layer.dendrites[0].weights[j] * outputs[-1]
    torch.testing.assert_close(layer(x, elsewhere)[0], expected)

    _, (h, c) = layer(x)
    copied, _ = layer(x, (h.clone(), c.clone()))
    layer(x)
    state = layer(x)[1]
    carried, _ = layer(x, state)
    assert (copied - carried).abs().max() > 1e-6
    with torch.no_grad():
        state = layer(x)[1]
        state[0][:, 0] = 0.0
        reset, _ = layer(x, state)
        fresh, _ = layer(x, (state[0].clone(), state[1].clone()))
    torch.testing.assert_close(reset, fresh)


def test_candidates_go_on_from_their_own_state_too() -> None:
    layer = nn.GRU(3, 4)
    started(layer, dendrites=1, pool=2)
    x = random(6, 2, 3)
    pool = layer.dendrites.candidates
    expected = reference_pool(layer, x)[:, 3:]
    seen = []
    pool.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    _, state = layer(x[:3])
    layer(x[3:], state.detach())
    torch.testing.assert_close(seen[1], expected)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_in_the_middle_of_a_sequence_is_a_layer_with_the_same_output(make_copy: Callable[..., Any]) -> None:
    layer = grown(nn.LSTM(3, 4))
    x = random(6, 2, 3)
    layer(x)  # leaves a state behind, with its graph
    twin = make_copy(layer)
    assert torch.equal(twin(x)[0], layer(x)[0])
    state = twin(x)[1]
    assert torch.isfinite(twin(x, state)[0]).all()


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_weights_go_to_a_fresh_layer_and_detaching_leaves_no_trace(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = grown(make())
    x, fresh = random(*shape), make().double()
    keys, plain = list(fresh.state_dict()), layer.forward(x)[0]
    attach(fresh).model.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], layer(x)[0])
    detach(fresh)
    assert list(fresh.state_dict()) == keys
    assert torch.equal(fresh(x)[0], plain)
    assert not any(value for name, value in vars(fresh).items() if "hooks" in name)


@pytest.mark.parametrize("make", CELLS)
def test_a_cell_and_its_dendrites_see_the_same_state(make: MakeLayer) -> None:
    cell = grown(make())
    x = random(4, 2, 3)
    state = None
    for step in x:
        plain = cell.forward(step, state)
        expected, outputs = output_of(plain), []
        for j in range(2):
            total = output_of(cell.dendrites[0].nodes[j](step, state))
            for i, earlier in enumerate(outputs):
                total = total + cell.dendrites[0].links[j * (j - 1) // 2 + i] * earlier
            outputs.append(total.tanh())
            expected = expected + cell.dendrites[0].weights[j] * outputs[-1]
        state = cell(step, state)
        torch.testing.assert_close(output_of(state), expected)
        if isinstance(state, tuple):
            assert torch.equal(state[1], plain[1])


@pytest.mark.parametrize("make", CELLS)
def test_candidates_of_a_cell_get_the_gradient_of_autograd_at_every_step(make: MakeLayer) -> None:
    cell = make()
    started(cell, dendrites=1)
    state = random(5, 4, seed=1)
    x = (random(5, 3), (state, state.sin()) if isinstance(cell, nn.LSTMCell) else state)
    wavy(output_of(cell(*x))).backward()
    assert_gradients(cell, reference_gradients(cell, [(x, reference_error(cell, x, wavy))]), 1e-6)

    for p in cell.dendrites.candidates.parameters():
        p.grad = None
    state, loss = None, torch.zeros((), dtype=torch.float64)
    for step in random(3, 5, 3):
        state = cell(step, state)
        loss = loss + wavy(output_of(state))
    loss.backward()
    assert cell.dendrites.candidates.moments.samples.tolist() == [20.0] * 4
    assert all(p.grad.abs().sum() > 0 for p in cell.dendrites.candidates.parameters())


@pytest.mark.parametrize("make", CELLS)
def test_a_cell_integrates_without_any_change_of_its_output(make: MakeLayer) -> None:
    cell, x = make(), torch.randn(5, 3)
    expected = list(tensors(cell(x)))
    network = attach(cell)
    network.start_candidates(pool=2)
    assert all(map(torch.equal, tensors(cell(x)), expected))
    output_of(cell(x)).sin().sum().backward()
    network.integrate()
    assert network.num_dendrites == 1
    assert all(map(torch.equal, tensors(cell(x)), expected))
    fresh = attach(make()).model
    fresh.load_state_dict(cell.state_dict())
    assert all(map(torch.equal, tensors(fresh(x)), expected))


def test_the_recurrence_itself_does_not_see_the_dendrites() -> None:
    layer = grown(nn.GRU(3, 4))
    x = random(6, 2, 3)
    plain = layer.forward(x)[0]
    with torch.no_grad():
        for weight in layer.dendrites[0].weights:
            weight.zero_()
        layer.dendrites[0].weights[0][0] = 5.0
    assert torch.equal(layer(x)[0][..., 1:], plain[..., 1:])


# -- several sequences at a time, and what is kept of them ---------------------------------------------------------


def in_turn(layer: nn.Module, sequences: list[Tensor], order: list[int]) -> list[Tensor]:
    """Step by step, with a state of each, in an order of whose turn it is."""
    steps = [iter(sequence) for sequence in sequences]
    states: list[Any] = [None] * len(sequences)
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for turn in order:
        out, states[turn] = layer(next(steps[turn])[None], states[turn])
        outputs[turn].append(out)
    return [torch.cat(output) for output in outputs]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2] * 5, [0, 0, 1, 2, 1, 1, 0, 2, 2, 2, 1, 0, 0, 2, 1], [2, 1] * 5 + [0] * 5])
@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: nn.GRU(3, 4, 2), lambda: nn.RNN(3, 4)])
def test_sequences_that_are_fed_in_turn_are_each_as_it_is_alone(
    make: MakeLayer, order: list[int], gradients: bool
) -> None:
    layer = grown(make())
    sequences = [random(5, 2, 3, seed=seed) for seed in range(3)]
    with torch.set_grad_enabled(gradients):
        for found, sequence in zip(in_turn(layer, sequences, order), sequences, strict=True):
            torch.testing.assert_close(found, layer(sequence)[0])


def test_a_state_goes_on_twice_and_an_older_one_again() -> None:
    """Two continuations of one beginning, and one more from its middle."""
    layer = grown(nn.LSTM(3, 4))
    start, one, other = (random(3, 2, 3, seed=seed) for seed in range(3))
    middle = layer(start[:2])[1]
    _, state = layer(start[2:], middle)
    for rest in (one, other):
        torch.testing.assert_close(layer(rest, state)[0], layer(torch.cat([start, rest]))[0][3:])
    torch.testing.assert_close(layer(other, middle)[0], layer(torch.cat([start[:2], other]))[0][2:])


def test_two_threads_do_not_disturb_each_other() -> None:
    layer = grown(nn.LSTM(3, 4)).eval()
    sequences = [random(6, 1, 3, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [layer(sequence)[0] for sequence in sequences]
    results: list[list[Any]] = [[], []]

    def serve(which: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                try:
                    first, state = layer(sequences[which][:3])
                    rest, _ = layer(sequences[which][3:], state)
                    results[which].append(float((torch.cat([first, rest]) - expected[which]).abs().max()))
                except Exception as error:
                    results[which].append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [len(result) for result in results] == [100, 100]
    assert [value for result in results for value in result if isinstance(value, Exception) or value > 1e-9] == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_state_is_kept_across_a_validation_that_keeps_its_own(mode: Callable[[], Any]) -> None:
    layer = grown(nn.GRU(3, 4))
    sequences = [random(6, 2, 3, seed=seed) for seed in range(2)]
    whole = [layer(sequence)[0] for sequence in sequences]
    _, training = layer(sequences[0][:3])
    layer.eval()
    with mode():
        _, validation = layer(sequences[1][:2])
    layer.train()
    torch.testing.assert_close(layer(sequences[0][3:], training)[0], whole[0][3:])
    layer.eval()
    with mode():
        torch.testing.assert_close(layer(sequences[1][2:], validation)[0], whole[1][2:])


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_is_kept_of_states_that_the_caller_let_go(gradients: bool) -> None:
    layer = grown(nn.LSTM(3, 4))
    with torch.set_grad_enabled(gradients):
        kept = layer(random(3, 2, 3))[1]
        for seed in range(50):
            layer(random(3, 2, 3, seed=seed))
        gc.collect()
        layer(random(1, 2, 3))
    assert len(layer.dendrites.memory._past) <= 2
    assert layer.dendrites.memory.find(kept) is not None
