"""Dendrites of every kind in one layer: dense and sparse, live and frozen, of all neurons and of some."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import custom_from_mask

from pl_dendrites.core import Form, attach, detach, restore_structure
from pl_dendrites.core.kinds import LinearConv as Stacked
from tests.core.helpers import (
    LAYERS,
    assert_gradients,
    grow,
    neuron_dim,
    output_weights,
    randomise,
    reference_dendrites,
    reference_error,
    reference_gradients,
    reference_pool,
)
from tests.core.test_correlation_rule import random_input, wavy

MIXTURES = {
    "frozen then live": [Form(2), Form(2, live=True)],
    "live then frozen": [Form(1, live=True), Form(2)],
    "activations": [Form(1, "relu"), Form(1, "tanh"), Form(1, "gelu", live=True)],
    "sparse": [Form(2, fan_in=1)],
    "sparse and live": [Form(3, live=True, fan_in=2)],
    "dense, sparse, live": [Form(1), Form(2, fan_in=2), Form(1, live=True, fan_in=1), Form(1, live=True)],
    "some neurons": [Form(1, fan_in=1, neurons=1), Form(1, live=True, fan_in=1, neurons=2), Form(2)],
    "some neurons, dense": [Form(2, neurons=2), Form(1, live=True, neurons=1), Form(1, neurons=2)],
}


def can_have(layer: nn.Module, forms: Sequence[Form]) -> bool:
    """Whether a layer is large enough, and has one group where only some neurons have dendrites that see all inputs."""
    kind = Stacked(layer)
    large = all((form.fan_in or 0) <= kind.inputs and (form.neurons or 0) <= kind.neurons for form in forms)
    return large and (kind.groups == 1 or not any(form.neurons and not form.fan_in for form in forms))


LAYERS_WITH_MIXTURES = [
    pytest.param(*case.values, forms, id=f"{case.id}-{name}")
    for case in LAYERS
    for name, forms in MIXTURES.items()
    if can_have(case.values[0](), forms)
]
# With more than one neuron and more than one input.
LARGE_LAYERS = [case for case in LAYERS if can_have(case.values[0](), [Form(1, fan_in=2, neurons=2)])]


def make_layer(make: Callable[[], nn.Module], forms: Sequence[Form]) -> nn.Module:
    """A layer with such dendrites, random in every part."""
    layer = make().double()
    randomise(layer, 1)
    kind = Stacked(layer)
    attach(layer)
    layer.dendrites.reshape(layer, forms)
    randomise(layer.dendrites, 2)
    generator = torch.Generator().manual_seed(3)
    for stack in layer.dendrites:
        if stack.form.neurons is not None:
            stack.neurons.copy_(torch.randperm(kind.neurons, generator=generator)[: stack.form.neurons].sort().values)
        if stack.form.fan_in is not None:
            size = kind.neurons // kind.groups
            neurons = torch.arange(kind.neurons) if stack.neurons is None else stack.neurons
            groups = (neurons // size).repeat(stack.count)
            order = torch.rand(len(groups), kind.inputs, generator=generator).argsort(1)[:, : stack.form.fan_in]
            stack.nodes.inputs.copy_(order + groups[:, None] * kind.inputs)
    return layer


def reference(layer: nn.Module, x: Tensor) -> Tensor:
    out = layer.forward(x)
    for weight, output in zip(output_weights(layer), reference_dendrites(layer, x, live=True), strict=True):
        out = out + weight.reshape(-1, *[1] * (-neuron_dim(layer) - 1)) * output
    return out


@pytest.mark.parametrize(("make", "shape", "forms"), LAYERS_WITH_MIXTURES)
def test_output_and_every_gradient_are_those_of_the_formula(
    make: Callable[[], nn.Module], shape: tuple[int, ...], forms: list[Form]
) -> None:
    layer, x = make_layer(make, forms), random_input(shape).requires_grad_()
    out, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(out, expected)
    frozen = {id(p) for stack in layer.dendrites if not stack.live for p in (*stack.nodes.parameters(), stack.links)}
    for parameter in layer.dendrites.parameters():
        assert parameter.requires_grad == (id(parameter) not in frozen and parameter.numel() > 0)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found, references = torch.autograd.grad(wavy(out), wanted), torch.autograd.grad(wavy(expected), wanted)
    for one, other in zip(found, references, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("forms", [MIXTURES[name] for name in ("frozen then live", "some neurons")], ids=str)
@pytest.mark.parametrize("fan_in", [None, 1])
@pytest.mark.parametrize(("make", "shape"), LARGE_LAYERS)
def test_candidates_over_any_dendrites_dense_or_sparse_follow_the_rule(
    make: Callable[[], nn.Module], shape: tuple[int, ...], fan_in: int | None, forms: list[Form]
) -> None:
    layer, x = make_layer(make, forms), random_input(shape)
    candidates = layer.dendrites.start(layer, 2)
    if fan_in is not None:
        candidates.keep_strongest(layer, fan_in)
    randomise(candidates, 3)
    error = reference_error(layer, x, wavy)
    wavy(layer(x)).backward()
    assert_gradients(layer, reference_gradients(layer, [(x, error)]))


@pytest.mark.parametrize("chosen", [None, [1]], ids=["all", "some"])
@pytest.mark.parametrize(("make", "shape"), LARGE_LAYERS)
def test_a_sparse_candidate_keeps_its_strongest_inputs_and_becomes_a_dendrite_as_it_is(
    make: Callable[[], nn.Module], shape: tuple[int, ...], chosen: list[int] | None
) -> None:
    layer, x = make().double(), random_input(shape)
    kind, before = Stacked(layer), layer(x)
    attach(layer)
    pool = layer.dendrites.start(layer, 3)
    dense = [kind.take(pool.nodes, p) for p in range(3)]
    pool.keep_strongest(layer, 1)
    for p, values in enumerate(dense):
        sparse = pool.kind.take(pool.nodes, p)
        for neuron in range(kind.neurons):
            kernels = values["weight"][neuron]
            best = max(range(kind.inputs), key=lambda i: float(kernels[i].norm()))
            group = neuron // (kind.neurons // kind.groups)
            assert sparse["inputs"][neuron].tolist() == [best + group * kind.inputs]
            assert torch.equal(sparse["weight"][neuron, 0], kernels[best])
        assert torch.equal(sparse["bias"], values["bias"])

    wavy(layer(x)).backward()
    outputs, correlation = reference_pool(layer, x), pool.correlation()
    neurons = None if chosen is None else torch.tensor(chosen)
    layer.dendrites.integrate(layer, neurons)
    assert torch.equal(layer(x), before)
    best = correlation.abs().argmax(0)
    (dendrite,) = reference_dendrites(layer, x)
    for neuron in range(kind.neurons):
        expected = outputs[best[neuron]].select(neuron_dim(layer), neuron)
        if chosen is not None and neuron not in chosen:
            expected = torch.zeros_like(expected)
        torch.testing.assert_close(dendrite.select(neuron_dim(layer), neuron), expected)
    assert layer.dendrites.forms == [Form(1, fan_in=1, neurons=None if chosen is None else 1)]


def test_a_sparse_dendrite_has_the_parameters_and_the_file_of_its_inputs_alone() -> None:
    layer = nn.Linear(1000, 100)
    network = attach(layer, fan_in=4)
    network.grow([""])
    own = {name: p for name, p in layer.named_parameters() if name.startswith("dendrites.")}
    assert sum(p.numel() for p in own.values()) == 100 * (4 + 1) + 100
    file = io.BytesIO()
    torch.save({k: v for k, v in layer.state_dict().items() if k.startswith("dendrites.")}, file)
    assert file.tell() < 100 * 4 * (4 + 8) + 6000


@pytest.mark.parametrize(
    ("fan_in", "kept"), [(None, None), (3, 3), (12, None), (99, None), (0.5, 6), (0.01, 1), (1.0, None), (1, 1)]
)
def test_fan_in_is_a_number_or_a_share_of_inputs(fan_in: float | None, kept: int | None) -> None:
    layer = nn.Linear(12, 5)
    network = attach(layer, fan_in=fan_in)
    network.start_candidates(2)
    assert network.keep_strongest() == ([""] if kept else [])
    layer(torch.randn(4, 12)).sin().sum().backward()
    network.integrate()
    assert layer.dendrites.forms == [Form(1, fan_in=kept)]


@pytest.mark.parametrize("fan_in", [0, -1, 0.0, 1.5, float("nan"), -0.5])
def test_a_fan_in_that_makes_no_sense_is_refused_before_anything_changes(fan_in: float) -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"`fan_in` must be a positive number of inputs or a share"):
        attach(layer, fan_in=fan_in)
    assert not hasattr(layer, "dendrites")


def test_layers_that_cannot_be_sparse_get_dense_dendrites() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(6, 4), "head": nn.Linear(4, 3)})
    network = attach(model, fan_in=2)
    network.start_candidates(2)
    assert network.keep_strongest() == ["head"]
    model["head"](model["rnn"](torch.randn(5, 2, 6))[0]).square().mean().backward()
    network.integrate()
    assert {name: d.forms for name, d in network.layers.items()} == {"rnn": [Form(1)], "head": [Form(1, fan_in=2)]}


def test_correlations_of_sparse_candidates_rise_from_nothing() -> None:
    """Less than when they saw everything, and a phase that compared them with that would be over at once."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.randn(64, 6)
    network = attach(layer, fan_in=1)
    network.start_candidates(2)
    for sparse in (False, True):
        if sparse:
            network.candidates[""].reference.fill_(0.99)  # as after a good first stage
            network.keep_strongest()
        for rises in (True, False):
            layer(x).sin().sum().backward()
            assert network.correlation_rose(0.05) == rises


def test_candidates_that_are_sparse_stay_so_in_a_saved_state() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(8, 6)
    network = attach(layer, fan_in=2)
    network.start_candidates(2)
    network.keep_strongest()
    layer(x).sin().sum().backward()
    state, correlation = network.candidate_state(), network.correlations()[""]
    network.discard()
    network.start_candidates(2, state=state)
    assert network.candidates[""].fan_in == 2
    assert torch.equal(network.correlations()[""], correlation)
    assert network.keep_strongest() == []
    network.integrate()
    assert layer.dendrites.forms == [Form(1, fan_in=2)]


@pytest.mark.parametrize(
    "inputs", [torch.full((6, 2), 6), torch.full((6, 2), -1), torch.zeros(6, 2), torch.tensor(1)], ids=str
)
def test_saved_candidates_whose_inputs_are_not_there_are_refused_and_leave_no_trace(inputs: Tensor) -> None:
    layer = nn.Linear(6, 3)
    network = attach(layer, fan_in=2)
    network.start_candidates(2)
    network.keep_strongest()
    state = network.candidate_state()
    network.discard()
    state[""]["nodes.inputs"] = inputs
    with pytest.raises(ValueError, match="inputs"):
        network.start_candidates(2, state=state)
    assert network.candidates == {}
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("forms", MIXTURES.values(), ids=MIXTURES)
def test_every_mixture_is_saved_loaded_copied_and_taken_off(forms: list[Form]) -> None:
    layer = make_layer(lambda: nn.Linear(5, 3), forms)
    x, plain = random_input((4, 5)), {k: v for k, v in layer.state_dict().items() if "." not in k}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state, fresh = torch.load(file, weights_only=True), nn.Linear(5, 3).double()
    assert restore_structure(fresh, state).num_dendrites == sum(form.count for form in forms)
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.dendrites.forms == forms
        assert torch.equal(other(x), layer(x))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]
    detach(fresh)
    assert fresh.state_dict().keys() == plain.keys()
    fresh.load_state_dict(plain)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.Conv1d(5, 3, 2)], ids=["linear", "convolution"])
def test_inputs_and_neurons_of_any_integers_are_loaded_as_those_of_today(
    make: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    """Older files have the inputs in 64 bits, and files of dendrites alone have them in as few as they take."""
    layer, x = make_layer(make, MIXTURES["some neurons"]), random_input((2, 5, 5))
    numbers = [key for key, value in layer.state_dict().items() if not value.is_floating_point()]
    state = {key: value.to(dtype) if key in numbers else value for key, value in layer.state_dict().items()}
    for assign in (False, True):
        fresh = make().double()
        restore_structure(fresh, state)
        fresh.load_state_dict(state, assign=assign)
        assert torch.equal(fresh(x), layer(x))
        assert {fresh.state_dict()[key].dtype for key in numbers if key.endswith("inputs")} == {torch.int32}


def test_a_set_joins_those_that_are_like_it_and_leaves_others_alone() -> None:
    layer = nn.Linear(6, 3)
    network = attach(layer)
    for live, fan_in in ((False, None), (False, None), (True, None), (True, 2), (True, 2), (False, None)):
        network.set_next(live=live, fan_in=fan_in)
        network.grow([""])
    expected = [Form(2), Form(1, live=True), Form(2, live=True, fan_in=2), Form(1)]
    assert layer.dendrites.forms == expected
    assert [stack.below for stack in layer.dendrites] == [0, 2, 3, 5]
    first = [id(p) for p in output_weights(layer)[:4]]
    layer.dendrites.reshape(layer, [*expected[:2], Form(1, live=True, fan_in=2)])
    assert [id(p) for p in output_weights(layer)] == first


def test_dendrites_of_all_kinds_learn_together() -> None:
    """What a live sparse dendrite on two of five inputs can express, and a plain layer cannot."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 2), torch.randn(256, 5)
    target = torch.stack([(2 * x[:, 0] - x[:, 3]).tanh(), x[:, 1]], 1)
    attach(layer, live=True, fan_in=2).grow([""])
    layer.dendrites[0].nodes.inputs.copy_(torch.tensor([[0, 3], [2, 4]]))
    nn.init.constant_(layer.dendrites[0].weights[0], 0.1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(300):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3


def test_grow_draws_other_inputs_for_each_node_and_leaves_random_numbers_alone() -> None:
    conv = nn.Conv2d(12, 6, 3, groups=2)
    network, users = attach(conv, live=True, fan_in=3), torch.get_rng_state()
    network.grow([""], torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), users)
    inputs = conv.dendrites[0].nodes.inputs
    assert all(len(set(row.tolist())) == 3 for row in inputs)
    assert inputs[:3].max() < 6 <= inputs[3:].min()
    assert len({tuple(row.tolist()) for row in inputs}) > 3
    grow(conv, 1)
    assert conv.dendrites[0].nodes.layer.weight.shape == (6, 3, 3, 3)


@pytest.mark.parametrize("forms", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 4), lambda: nn.Conv1d(5, 4, 2)], ids=["linear", "convolution"])
def test_every_mixture_is_exported(make: Callable[[], nn.Module], forms: list[Form]) -> None:
    layer, x = make_layer(make, forms).eval(), random_input((3, 5, 5))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_an_input_that_never_varies_is_not_kept() -> None:
    """As border pixels are: their weights stay as they were drawn, and the largest of these would win."""
    layer = nn.Linear(12, 3)
    network = attach(layer, fan_in=4)
    network.start_candidates(2, torch.Generator().manual_seed(0))
    x = torch.randn(256, 12) * 1e-3
    x[:, :4], x[:, 8:] = torch.randn(256, 4), 5.0
    layer(x[:128]).square().mean().backward()
    layer(x[128:]).square().mean().backward()
    network.keep_strongest()
    assert sorted(set(network.candidates[""].nodes.inputs.flatten().tolist())) == [0, 1, 2, 3]


def test_channels_that_never_vary_are_not_kept() -> None:
    layer = nn.Conv2d(8, 4, 3, groups=2)
    network = attach(layer, fan_in=1)
    network.start_candidates(2, torch.Generator().manual_seed(0))
    x = torch.ones(6, 8, 5, 5)
    x[:, [1, 6]] = torch.randn(6, 2, 5, 5)
    layer(x).square().mean().backward()
    network.keep_strongest()
    assert network.candidates[""].nodes.inputs.view(2, 4).tolist() == [[1, 1, 6, 6]] * 2


@pytest.mark.parametrize("pruned", [0, 1])
def test_an_output_weight_that_is_pruned_is_what_it_became(pruned: int) -> None:
    """Pruning takes the parameter away, and has a plain tensor stand where it was."""
    layer, x = make_layer(lambda: nn.Linear(5, 3), [Form(2)]), torch.randn(4, 5, dtype=torch.float64)
    twin, mask = copy.deepcopy(layer), torch.tensor([1.0, 0.0, 1.0])
    custom_from_mask(layer.dendrites[0].weights, str(pruned), mask)
    with torch.no_grad():
        twin.dendrites[0].weights[pruned].mul_(mask)
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize("forms", [[Form(3)], [Form(1), Form(1, live=True)], [Form(2, neurons=2)]], ids=str)
def test_what_the_layer_itself_put_out_is_left_as_it_is(forms: Sequence[Form]) -> None:
    """Somebody may look at it, and a layer whose last step is a tanh needs it to learn."""
    layer, seen = make_layer(lambda: nn.Linear(5, 3), forms), []
    forward = layer.forward
    layer.forward = lambda x: seen.append(forward(x)) or seen[-1]
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            layer(x)
        torch.testing.assert_close(seen[-1], nn.functional.linear(x, layer.weight, layer.bias))
