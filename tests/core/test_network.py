"""A model with dendrites stays the user's model: nothing changes but what was asked for, and all of it can go again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from pl_dendrites.core import ACTIVATIONS, attach, detach
from pl_dendrites.core.growth.dendrites import Candidates, Dendrites
from tests.core.helpers import LAYERS, grow, reference_dendrites, reference_forward, reference_pool, samples

MakeLayer = Callable[[], nn.Module]


class Net(nn.Module):
    """Convolution, BatchNorm, a Linear used with a keyword, one that the user froze, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.unused = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((-2, -1))
        return self.frozen(self.hidden(input=x).tanh())


def batch(seed: int = 0) -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a user can see of a model: types, attributes, flags, hooks and values."""
    return {
        "modules": [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [
            (name, key, list(value))
            for name, module in model.named_modules()
            for key, value in sorted(vars(module).items())
            if "hooks" in key and value is not None
        ],
        "flags": [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()],
        "values": {key: value.tolist() for key, value in model.state_dict().items()},
    }


def learn(model: nn.Module, steps: int = 1) -> None:
    """A forward and a backward pass in training mode, as in a correlation phase."""
    for step in range(steps):
        model.train()(batch(step)).square().sum().backward()


def test_attaching_changes_neither_type_nor_keys_nor_output() -> None:
    model = Net().eval()
    keys, out, kinds = list(model.state_dict()), model(batch()), [type(m) for m in model.modules()]
    network = attach(model)
    assert list(network.layers) == ["conv", "hidden", "unused"]
    assert network.model is model
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules() if not isinstance(m, Dendrites | nn.ParameterList)] == kinds
    assert torch.equal(model(batch()), out)
    assert network.num_dendrites == 0
    grow(model.conv, 1)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dendrites", [1, 3])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_output_of_a_grown_layer_is_the_formula(
    make: MakeLayer, shape: tuple[int, ...], dendrites: int, activation: str
) -> None:
    layer = make().double()
    attach(layer, activation=activation)
    grow(layer, dendrites)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference_forward(layer, x))
    torch.testing.assert_close(layer(input=x), reference_forward(layer, x))
    assert (layer(x) - layer.forward(x)).abs().max() > 0.01


@pytest.mark.parametrize("dendrites", [0, 1, 2])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_integrating_changes_no_output_and_takes_the_best_of_each_neuron(
    make: MakeLayer, shape: tuple[int, ...], dendrites: int
) -> None:
    layer = make().double()
    network = attach(layer)
    grow(layer, dendrites)
    x = torch.randn(shape, dtype=torch.float64)
    before = layer(x)
    network.start_candidates(pool=4)
    torch.nn.init.normal_(layer.dendrites.candidates.links)
    layer(x).sin().sum().backward()

    error = torch.cos(reference_forward(layer, x))
    outputs, errors = samples(reference_pool(layer, x).detach(), layer, 1), samples(error, layer)
    neurons = range(errors.shape[1])
    pairs = [[torch.stack([output[:, c], errors[:, c]]) for c in neurons] for output in outputs]
    correlation = torch.tensor([[torch.corrcoef(pair)[0, 1] for pair in row] for row in pairs], dtype=torch.float64)
    best = correlation.abs().argmax(0)
    taken = network.integrate()
    if dendrites:  # the older dendrites are part of a wider matrix product now, which may round otherwise
        torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(layer(x), before)
    assert network.num_dendrites == dendrites + 1
    torch.testing.assert_close(taken[""], correlation[best, neurons])
    newest = samples(reference_dendrites(layer, x)[-1], layer)
    torch.testing.assert_close(newest, torch.stack([outputs[best[c], :, c] for c in neurons], 1))
    torch.nn.init.normal_(layer.dendrites[0].weights[-1])
    torch.testing.assert_close(layer(x), reference_forward(layer, x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("fan_in", [None, 1])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_what_the_covariance_made_of_an_unbounded_candidate_is_scaled_to_a_spread_of_1(
    make: MakeLayer, shape: tuple[int, ...], fan_in: int | None, activation: str
) -> None:
    """A ReLU's output is what it was, divided by a standard deviation above 1; a GELU's is about that."""
    layer = make().double()
    network = attach(layer, activation="tanh")
    grow(layer, 1)
    network.set_next(activation, fan_in=fan_in)
    x = torch.randn(shape, dtype=torch.float64)
    network.start_candidates(pool=1)
    pool = layer.dendrites.candidates
    for parameter in pool.parameters():
        torch.nn.init.normal_(parameter, std=30.0)
    if fan_in is not None:
        network.keep_strongest()
    layer(x).sin().sum().backward()
    grown = samples(reference_pool(layer, x).detach(), layer, 1)[0]
    spread = grown.std(0, correction=0).clamp(min=1)
    assert spread.max() > 5
    network.integrate()
    newest = samples(reference_dendrites(layer, x)[-1], layer)
    if activation == "relu":
        torch.testing.assert_close(newest, grown / spread)
    else:
        torch.testing.assert_close(newest, grown / spread, rtol=0, atol=0.2)


def test_only_the_trained_parameters_of_dendrites_learn_and_nothing_flows_through_them() -> None:
    layer = nn.Linear(4, 3).double()
    attach(layer)
    grow(layer, 2)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    loss = layer(x).sin().sum()
    loss.backward()
    error = torch.cos(reference_forward(layer, x)).detach()
    torch.testing.assert_close(x.grad, error @ layer.weight)
    torch.testing.assert_close(layer.weight.grad, error.T @ x)
    for weight, output in zip(layer.dendrites[0].weights, reference_dendrites(layer, x), strict=True):
        torch.testing.assert_close(weight.grad, (error * output).sum(0))
    trainable = [name for name, p in layer.dendrites.named_parameters() if p.requires_grad]
    assert trainable == ["0.weights.0", "0.weights.1"]
    assert (
        layer.dendrites[0].nodes.weight.grad
        is layer.dendrites[0].nodes.bias.grad
        is layer.dendrites[0].links.grad
        is None
    )


@pytest.mark.parametrize("ending", ["integrate", "discard"])
@pytest.mark.parametrize("dendrites", [0, 2])
def test_flags_and_buffers_return_after_a_correlation_phase(dendrites: int, ending: str) -> None:
    model = Net()
    network = attach(model)
    for name in ("conv", "hidden"):
        grow(model.get_submodule(name), dendrites)
    if dendrites:
        model.hidden.dendrites[0].weights[0].requires_grad_(False)
        model.conv.dendrites[0].nodes.requires_grad_(True)
    learn(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {key: value.clone() for key, value in model.state_dict().items()}
    network.start_candidates()
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    learn(model, 3)
    assert not torch.equal(model.norm.running_mean, values["norm.running_mean"])
    assert all(p.grad is None for p in model.parameters())
    getattr(network, ending)()
    after = dict(model.named_parameters())
    old = {name for name in flags if ending == "discard" or not (".nodes." in name or "links" in name)}
    assert {name: after[name].requires_grad for name in old} == {name: flags[name] for name in old}
    kept = {key for key in values if ".dendrites." not in key or ending == "discard"}
    assert all(torch.equal(model.state_dict()[key], values[key]) for key in kept)
    assert network.candidate_parameters() == []
    assert not network.candidates


def test_buffers_can_be_put_back_within_a_correlation_phase() -> None:
    model = Net()
    network = attach(model)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    network.start_candidates()
    learn(model)
    network.hold_still()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert network.candidates


def test_the_trainable_parameters_can_be_told_by_name() -> None:
    model = Net().requires_grad_(False)
    network = attach(model, targets=["*"])
    network.start_candidates(trainable=["hidden.weight", "hidden.bias"])
    assert network.trainable == ["hidden.weight", "hidden.bias"]
    network.discard()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["hidden.weight", "hidden.bias"]


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        pytest.param(lambda: nn.Linear(4, 3), "weight", id="plain"),
        pytest.param(lambda: weight_norm(nn.Linear(4, 3)), "parametrizations.weight.original0", id="computed"),
        pytest.param(lambda: weight_norm(nn.Conv1d(4, 3, 2)), "parametrizations.weight.original0", id="computed-conv"),
    ],
)
def test_what_is_trained_comes_with_a_weight_of_its_layer_and_the_rest_is_frozen(make: MakeLayer, weight: str) -> None:
    layer = make()
    network = attach(layer)
    grow(layer, 2)
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    pairs = [(names[id(own)], names[id(of_layer)]) for own, of_layer in network.trained_parameters()]
    assert pairs == [("dendrites.0.weights.0", weight), ("dendrites.0.weights.1", weight)]
    frozen = [names[id(parameter)] for parameter in network.frozen_parameters()]
    assert frozen == ["dendrites.0.links", "dendrites.0.nodes.weight", "dendrites.0.nodes.bias"]


def test_a_layer_that_is_never_reached_gets_no_dendrite() -> None:
    model = Net()
    network = attach(model)
    network.start_candidates()
    learn(model)
    assert sorted(network.integrate()) == ["conv", "hidden"]
    assert {name: d.count for name, d in network.layers.items()} == {"conv": 1, "hidden": 1, "unused": 0}
    assert not [key for key in model.state_dict() if key.startswith("unused.dendrites")]
    assert model.unused.weight.requires_grad


def test_only_the_targets_grow_and_dendrites_elsewhere_stay() -> None:
    model = Net()
    network = attach(model, targets=["Linear"], exclude=["unused"])
    assert list(network.layers) == ["hidden", "frozen"]
    network.start_candidates(pool=2)
    assert {name: tuple(c.shape) for name, c in network.correlations().items()} == {"hidden": (2, 5), "frozen": (2, 3)}


@pytest.mark.parametrize("pool", [0, -1])
def test_a_pool_that_is_not_positive_is_refused_and_nothing_freezes(pool: int) -> None:
    network = attach(Net())
    before = snapshot(network.model)
    with pytest.raises(ValueError, match=f"`pool` must be at least 1, got {pool}"):
        network.start_candidates(pool=pool)
    assert snapshot(network.model) == before
    assert not network.candidates


def test_phases_out_of_order_are_refused() -> None:
    network = attach(Net())
    with pytest.raises(RuntimeError, match="call start_candidates first"):
        network.integrate()
    with pytest.raises(RuntimeError, match="call start_candidates first"):
        network.layers["conv"].integrate(network.model.conv)
    network.discard()
    network.start_candidates()
    pools = network.candidates
    with pytest.raises(RuntimeError, match="integrate or discard them first"):
        network.start_candidates()
    assert all(network.candidates[name] is pool for name, pool in pools.items())
    network.discard()
    network.start_candidates()


@pytest.mark.parametrize("activation", ["softmax", "", None])
def test_an_unknown_activation_is_refused_and_leaves_no_trace(activation: str | None) -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"`activation` must be one of \['tanh', .*'sharp_gelu'\], got"):
        attach(model, activation=activation)
    assert snapshot(model) == before


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make_copy", [copied, pickled])
def test_a_copy_is_a_model_without_candidates_that_can_grow_and_be_detached(
    make_copy: Callable[[nn.Module], nn.Module],
) -> None:
    model = Net().eval()
    network = attach(model)
    for name in ("conv", "hidden"):
        grow(model.get_submodule(name), 2)
    out = model(batch())
    network.start_candidates()
    twin = make_copy(model)
    assert not [m for m in twin.modules() if isinstance(m, Dendrites) and m.candidates is not None]
    assert torch.equal(twin(batch()), out)
    twin.train()(batch())
    assert not any(pool.saw_error() for pool in network.candidates.values())

    plain = Net()
    twin.load_state_dict(plain.state_dict())
    assert list(twin.state_dict()) == list(plain.state_dict())
    detach(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks or m._load_state_dict_pre_hooks for m in twin.modules())
    assert torch.equal(twin.eval()(batch()), plain.eval()(batch()))
    assert network.layers["conv"].count == 2


def test_candidates_are_no_part_of_the_model() -> None:
    model = Net()
    network = attach(model)
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    network.start_candidates()
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert not {id(p) for p in network.candidate_parameters()} & {id(p) for p in parameters}
    assert len(network.candidate_parameters()) == 3 * len(network.layers)
    assert all(p.requires_grad for p in network.candidate_parameters())


@pytest.mark.parametrize("used", [False, True])
def test_detaching_leaves_no_trace(used: bool) -> None:
    model = Net()
    model.hidden.register_forward_hook(lambda *_: None)
    model.register_load_state_dict_pre_hook(lambda *_: None)
    model.eval()
    before, out = snapshot(model), model(batch())
    network = attach(model)
    if used:
        network.start_candidates()
        model(batch()).sum().backward()
        network.integrate()
        grow(model.conv, 3)
        assert not torch.equal(model(batch()), out)
        network.start_candidates()
        network.discard()
    assert detach(model) is model
    assert snapshot(model) == before
    assert not any(hasattr(module, "dendrites") for module in model.modules())
    assert torch.equal(model(batch()), out)
    assert detach(model) is model
    attach(model)


def test_detaching_with_candidates_in_training_is_refused_and_changes_nothing() -> None:
    model = Net()
    network = attach(model)
    network.start_candidates()
    with pytest.raises(RuntimeError, match="integrate or discard"):
        detach(model)
    assert list(network.layers) == ["conv", "hidden", "unused"]
    network.discard()
    assert model.hidden.weight.requires_grad
    detach(model)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_is_attached_once(whole: bool) -> None:
    model = nn.Sequential(Net(), nn.Linear(3, 2))
    attach(model if whole else model[0])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"attached already, at \['0.conv', .*detach it first"):
        attach(model)
    assert snapshot(model) == before


def test_two_models_do_not_meet() -> None:
    one, two = attach(Net()), attach(Net())
    before = snapshot(two.model)
    one.start_candidates()
    learn(one.model)
    one.integrate()
    assert snapshot(two.model) == before
    assert (one.num_dendrites, two.num_dendrites) == (1, 0)
    two.start_candidates(pool=1)
    assert not one.candidates
    detach(one.model)
    assert two.candidates
    two.discard()
    detach(two.model)


def test_a_model_that_is_one_layer() -> None:
    network = attach(nn.Linear(4, 2))
    network.start_candidates(pool=3)
    network.model(torch.randn(9, 4)).square().sum().backward()
    assert {name: tuple(c.shape) for name, c in network.correlations().items()} == {"": (3, 2)}
    assert list(network.integrate()) == [""]
    parts = ["0.links", "0.code", "0.weights.0", "0.nodes.weight", "0.nodes.bias"]
    assert sorted(network.model.state_dict()) == sorted(["weight", "bias", *(f"dendrites.{part}" for part in parts)])
    assert list(detach(network.model).state_dict()) == ["weight", "bias"]


def test_the_state_of_candidates_goes_to_another_network_and_back() -> None:
    one, two = attach(Net()), attach(Net())
    two.model.load_state_dict(one.model.state_dict())
    for network in (one, two):
        network.start_candidates(pool=2)
    learn(one.model, 2)
    assert one.correlation_rose(0.05)
    state = one.candidate_state()
    two.load_candidate_state(state)
    for p in one.candidate_parameters():
        p.data.zero_()
    learn(one.model)
    one.load_candidate_state(state)
    for network in (one, two):
        for name, pool in state.items():
            assert all(torch.equal(value, network.candidates[name].state_dict()[key]) for key, value in pool.items())
        assert not network.correlation_rose(0.05)
    assert all(isinstance(value, Tensor) for pool in state.values() for value in pool.values())
    one.integrate(), two.integrate()
    for key, value in one.model.hidden.state_dict().items():
        assert torch.equal(value, two.model.hidden.state_dict()[key])


def test_the_state_of_other_candidates_is_refused() -> None:
    network = attach(Net(), targets=["hidden"])
    network.start_candidates(pool=2)
    other = attach(Net(), targets=["conv"])
    other.start_candidates(pool=2)
    with pytest.raises(ValueError, match=r"saved \['conv'\], there are \['hidden'\]"):
        network.load_candidate_state(other.candidate_state())
    larger = attach(Net(), targets=["hidden"])
    larger.start_candidates(pool=3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        network.load_candidate_state(larger.candidate_state())


def test_candidates_follow_their_generator_and_spare_the_global_one() -> None:
    states, before = [], torch.get_rng_state()
    for seed in (1, 1, 2):
        network = attach(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 4, 3, groups=2)))
        torch.set_rng_state(before)
        network.start_candidates(generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(network.candidate_state()["0"])
    assert torch.equal(states[0]["nodes.weight"], states[1]["nodes.weight"])
    assert not torch.equal(states[0]["nodes.weight"], states[2]["nodes.weight"])
    assert not torch.equal(*network.candidates["0"].nodes.weight.view(4, 3, 4)[:2])


@pytest.mark.parametrize("fan_in", [None, 2])
def test_where_tensors_are_made_by_default_does_not_matter(fan_in: int | None) -> None:
    """As after ``torch.set_default_device``. What is made on ``meta`` can be neither read nor written elsewhere."""
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4))
        model = nn.ModuleDict({"first": nn.Linear(5, 3), "block": block, "last": nn.GRU(4, 2, bidirectional=True)})
        x, lengths = torch.randn(3, 3, 5), torch.tensor([3, 1, 2])

        def loss(model: nn.ModuleDict = model, x: Tensor = x, lengths: Tensor = lengths) -> Tensor:
            hidden = model["block"](model["first"](x)).mT
            packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
            out, state = model["last"](packed)
            return out.data.sin().sum() + state.sum()

        with torch.device(device):
            network = attach(model, targets=["first", "block", "last"])
            network.set_next(fan_in=fan_in, share=0.5)
            loss()  # shows the neurons of the block
            network.start_candidates(2, torch.Generator("cpu").manual_seed(1))
            loss().backward()
            network.keep_strongest()
            loss().backward()
            network.integrate()
            network.grow(network.can_grow(), torch.Generator("cpu").manual_seed(2))
            states.append([*model.state_dict().values(), loss()])
    assert all(torch.equal(own, other) for own, other in zip(*states, strict=True))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_candidates_start_as_wide_as_a_layer_of_torch(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = make()
    network = attach(layer)
    network.start_candidates(pool=50)
    inputs = layer.weight[0].numel()
    if "Transpose" in type(layer).__name__:  # whose own weights PyTorch draws by the number of outputs
        inputs = layer.in_channels // layer.groups * layer.weight[0, 0].numel()
    bound = inputs**-0.5
    for parameter in layer.dendrites.candidates.nodes.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert not layer.dendrites.candidates.links.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_everything_has_the_type_of_the_layer(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3, dtype=dtype)
    network = attach(layer)
    for _ in range(2):
        network.start_candidates(pool=2)
        layer(torch.randn(8, 4, dtype=dtype)).sin().sum().backward()
        assert {p.dtype for p in network.candidate_parameters()} == {dtype}
        network.integrate()
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(8, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_candidates_learn_what_the_layer_cannot(activation: str) -> None:
    x = torch.randn(256, 2)
    target = x.prod(1, keepdim=True)
    network = attach(nn.Linear(2, 1), activation=activation)
    nn.init.zeros_(network.model.weight)
    network.start_candidates(pool=4)
    optimizer = torch.optim.Adam(network.candidate_parameters(), lr=0.1)
    reached = []
    for _ in range(60):
        network.reset_correlations()
        optimizer.zero_grad()
        (network.model(x) - target).square().mean().backward()
        optimizer.step()
        reached.append(network.correlations()[""].abs())
    assert reached[-1].min() > 0.3
    assert (reached[-1] - reached[0]).mean() > 0.1


def test_a_rise_counts_from_the_last_rise_and_in_the_mean_of_the_neurons_best() -> None:
    layer = nn.Linear(2, 2)
    network = attach(layer)
    network.start_candidates(pool=2)
    pool: Candidates = layer.dendrites.candidates
    verdicts = []
    for first, second in [(0.5, 0.2), (0.52, 0.2), (0.6, 0.1), (0.5, 0.25), (0.52, 0.28), (0.7, 0.0)]:
        outputs, error = torch.zeros(2, 4, 2), torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).expand(4, 2)
        for neuron, value in enumerate((first, -second)):
            across = (1 - value**2) ** 0.5 * torch.tensor([1.0, 1.0, -1.0, -1.0])
            outputs[0, :, neuron] = value * error[:, neuron] + across
            outputs[1, :, neuron] = across
        pool.reset()
        pool.observe(outputs, error)
        torch.testing.assert_close(pool.correlation(), torch.tensor([[first, -second], [0.0, 0.0]]))
        verdicts.append(network.correlation_rose(0.05))
    assert verdicts == [True, False, False, True, True, False]


def test_an_encoder_layer_uses_its_dendrites_in_inference_too() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    plain = encoder(x)
    network = attach(encoder)
    for name in network.layers:
        grow(encoder.get_submodule(name), 1)
    grown = encoder.train()(x)
    assert not torch.allclose(grown, plain, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), grown)


def test_a_transposed_convolution_that_is_asked_for_a_size() -> None:
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    network = attach(layer)
    x = torch.randn(2, 3, 5, 5)
    plain = layer(x, output_size=(12, 12)).detach()
    network.start_candidates(2)
    layer(x, output_size=(12, 12)).square().sum().backward()
    network.integrate()
    assert torch.equal(layer(x, output_size=(12, 12)), plain)
    with torch.no_grad():
        layer.dendrites[0].weights[0].fill_(1.0)
    assert layer(x, output_size=[12, 12]).shape == plain.shape
    assert not torch.equal(layer(x, output_size=[12, 12]), plain)
