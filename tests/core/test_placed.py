"""Dendrites of frozen layers, placed where the network errs, within a budget; autograd says where that is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.core import fuse, restore_structure
from pl_dendrites.core.fields.gathered import Processes
from pl_dendrites.core.growth.placed_block import PlacedBlock
from pl_dendrites.core.placed import PlacedNetwork
from tests.core.test_shared_processes import in_processes

X, Y = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4


def dense() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.GELU(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 4))


def convolutional() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(384, 4)
    )


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def see(network: PlacedNetwork, batches: int = 1, part: slice = slice(None)) -> None:
    for x, y in zip(X.chunk(batches), Y.chunk(batches), strict=True):
        network.listen(True)
        F.cross_entropy(network.model(x[part]), y[part]).backward()
        network.listen(False)


def look(network: PlacedNetwork, batches: int = 1, part: slice = slice(None)) -> None:
    """Two epochs: what one shows is all that there is."""
    network.start_candidates(generator=torch.Generator().manual_seed(3))
    while not network.settled:
        network.reset_correlations()
        see(network, batches, part)
        network.correlation_rose(0.0)


def placed(model: nn.Module, budget: int, targets: Any = "frozen", **look_at: Any) -> PlacedNetwork:
    if targets == "frozen":
        model.requires_grad_(False)
    network = PlacedNetwork(model, targets)
    network.set_next(max_parameters=budget)
    look(network, **look_at)
    network.integrate()
    return network


def blocks(network: PlacedNetwork) -> dict[str, PlacedBlock]:
    return {name: block for name, dendrites in network.layers.items() for block in dendrites.placed}


def seen_and_missed(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer what its output positions see, a column each, and the errors there: by unfold and autograd."""
    twin, found = copy.deepcopy(model).requires_grad_(True), {}
    inputs, outputs = {}, {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), out
            out.retain_grad()

        return hook

    for name, layer in twin.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(note(name))
    F.cross_entropy(twin(X), Y).backward()
    for name, out in outputs.items():
        layer, x, error = twin.get_submodule(name), inputs[name], out.grad
        if isinstance(layer, nn.Conv2d):
            x, error = F.unfold(x, layer.kernel_size).movedim(1, -1), error.flatten(2).movedim(1, -1)
        found[name] = x.flatten(0, -2), error.flatten(0, -2)
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("make", [dense, convolutional])
def test_they_see_the_principal_directions_of_inputs_weighted_by_their_errors(
    make: Callable[[], nn.Sequential], half: bool
) -> None:
    model = make()
    expected = seen_and_missed(model)
    model.requires_grad_(False)
    network = PlacedNetwork(model, "frozen")
    network.set_next(max_parameters=10_000)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        look(network)
    network.integrate()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        F.cross_entropy(model(X), Y).backward()
    assert all(block.out.grad.any() for block in blocks(network).values())
    for name, (x, error) in expected.items():
        whole = torch.linalg.svdvals(x * error.norm(dim=1, keepdim=True)).square()
        kernels = blocks(network)[name].kernels.flatten(1)
        unit = F.normalize(kernels, dim=1)
        torch.testing.assert_close(unit @ unit.T, torch.eye(len(unit)), atol=1e-4, rtol=0)
        taken = ((x * error.norm(dim=1, keepdim=True)) @ unit.T).square().sum(0)
        # Nearly the best that there are, and the strongest first.
        assert taken.sum() > 0.95 * whole[: len(unit)].sum(), name
        torch.testing.assert_close(taken[0], whole[0], rtol=0.02, atol=0)


def test_what_they_see_is_as_large_whatever_units_the_inputs_have() -> None:
    scaled, model = dense(), dense()
    scaled[1].weight.data /= 100
    scaled[0].register_forward_hook(lambda module, args, out: 100 * out)
    kernels = [blocks(placed(network, 500))["1"].kernels for network in (model, scaled)]
    torch.testing.assert_close(kernels[0].abs(), 100 * kernels[1].abs(), rtol=1e-3, atol=1e-5)


def test_all_layers_have_one_before_any_has_a_second_and_those_come_first_where_the_loss_falls_fastest() -> None:
    costs = {"1": 32 + 20, "3": 20 + 10, "5": 10 + 4}
    network = placed(dense(), 3 * sum(costs.values()) + 14)
    assert {name: block.form.units for name, block in blocks(network).items()} == {"1": 3, "3": 3, "5": 4}
    slopes = {}
    for name, (x, error) in seen_and_missed(dense()).items():
        slopes[name] = float((error.T @ x @ blocks(network)[name].kernels.T).square().sum()) / costs[name]
    best = max(slopes, key=slopes.__getitem__)
    assert best in blocks(placed(dense(), costs[best]))
    worst = min(slopes, key=slopes.__getitem__)
    assert worst not in blocks(placed(dense(), sum(costs.values()) - 1))


def test_nothing_changes_until_they_learn_and_then_all_of_them_do() -> None:
    model = convolutional()
    before = model(X)
    network = placed(model, 2_000)
    torch.testing.assert_close(model(X), before, atol=0, rtol=0)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "dendrites" not in n or "nodes" in n)
    for _ in range(2):
        F.cross_entropy(model(X), Y).backward()
        for block in blocks(network).values():
            block.out.data -= block.out.grad
    assert all(block.out.grad.any() and block.weight.grad.any() for block in blocks(network).values())
    assert all(p.grad is None for n, p in model.named_parameters() if "dendrites" not in n)


def learned(model: nn.Sequential, budget: int) -> nn.Sequential:
    placed(model, budget)
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    return model


def test_a_network_with_them_computes_what_its_weights_and_theirs_say() -> None:
    model = learned(dense(), 500)
    twin = dense()
    for name in ("1", "3", "5"):
        layer = model.get_submodule(name)
        (block,) = layer.dendrites.placed
        twin.get_submodule(name).weight.data += block.out.T @ block.weight @ block.nodes.weight
    torch.testing.assert_close(model(X), twin(X))


@pytest.mark.parametrize("make", [dense, convolutional])
def test_fused_they_are_weights_of_their_layers(make: Callable[[], nn.Sequential]) -> None:
    model = learned(make(), 2_000)
    fused = fuse(model)
    torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-5)
    count = [sum(p.numel() for p in network.parameters()) for network in (fused, make())]
    assert count[0] == count[1]


def test_files_put_them_on_a_fresh_network() -> None:
    model = learned(convolutional(), 2_000)
    fresh = convolutional()
    fresh.load_state_dict(model.state_dict() if restore_structure(fresh, model.state_dict()) else {})
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize(
    ("part", "value", "refusal"),
    [
        ("out", torch.zeros(2, 7), r"out must have the shape \(2, 20\), got \(2, 7\)"),
        ("weight", torch.zeros(5), "weight must have a row for each unit"),
        ("nodes.weight", torch.zeros(32, 9), r"nodes.weight must have the shape \(32, 108\)"),
        ("out", torch.zeros(2, 20, dtype=torch.int64), "out must be floating point"),
        ("nodes.bias", None, r"incomplete.*missing \['nodes.bias'\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(part: str, value: Tensor | None, refusal: str) -> None:
    model = dense()
    placed(model, 2 * (52 + 30 + 14))
    state = model.state_dict()
    state.pop(f"1.dendrites.0.{part}")
    if value is not None:
        state[f"1.dendrites.0.{part}"] = value
    fresh = dense()
    with pytest.raises(ValueError, match=refusal):
        restore_structure(fresh, state)
    assert fresh.state_dict().keys() == dense().state_dict().keys()
    with pytest.raises(ValueError, match="without groups"):
        restore_structure(nn.GRU(3, 4), {f"dendrites.0.{p}": torch.zeros(2, 2) for p in ("weight", "out")})


@pytest.mark.parametrize("budget", [96, 400, 1_000])
def test_the_budget_counts_all_that_is_trainable_and_is_used_up(budget: int) -> None:
    model = dense().requires_grad_(False)
    model[5].bias.requires_grad_(True)
    placed(model, budget, targets=["1", "3"])
    assert budget - 30 < trainable(model) <= budget


@pytest.mark.parametrize("left", [-1, 0, 3])
def test_a_budget_that_is_used_already_leaves_the_network_as_it_is(left: int) -> None:
    model = dense().requires_grad_(False)
    model[5].requires_grad_(True)
    network = placed(model, 44 + left, targets=["1", "3"])
    assert network.num_dendrites == network.units == 0
    assert trainable(model) == 44
    assert network.skipped.keys() == {"1", "3"}


def test_what_is_looked_at_is_smaller_than_the_layers() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(108, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 4)
    )
    network = PlacedNetwork(model.requires_grad_(False), "frozen")
    network.set_next(max_parameters=600)
    network.start_candidates()
    sizes = []
    for _ in range(2):
        see(network)
        sizes.append(sum(value.numel() for state in network.candidate_state().values() for value in state.values()))
        network.correlation_rose(0.0)
    assert max(sizes) < 0.5 * sum(parameter.numel() for parameter in model.parameters())


def test_a_batch_whose_loss_is_not_finite_leaves_no_trace() -> None:
    """As the first ones in half precision, whose gradients a GradScaler finds too large."""
    networks = [PlacedNetwork(dense().requires_grad_(False), "frozen") for _ in range(2)]
    for network, broken in zip(networks, (False, True), strict=True):
        network.set_next(max_parameters=300)
        network.start_candidates(generator=torch.Generator().manual_seed(3))
        for _ in range(2):
            see(network)
            if broken:
                network.listen(True)
                (F.cross_entropy(network.model(X), Y) * torch.inf).backward()
                network.listen(False)
            network.correlation_rose(0.0)
        network.integrate()
    for own, other in zip(*(blocks(network).values() for network in networks), strict=True):
        assert own.form == other.form
        assert bool(other.kernels.isfinite().all())
        # The size of inputs is that of all batches, and here these are the same.
        torch.testing.assert_close(other.kernels, own.kernels)


def test_an_epoch_of_many_batches_has_both_looks() -> None:
    network = PlacedNetwork(dense().requires_grad_(False), "frozen")
    network.set_next(max_parameters=300)
    network.start_candidates()
    network.reset_correlations()
    see(network, 32)
    assert not network.correlation_rose(0.0)
    assert network.settled
    network.integrate()
    assert network.num_dendrites


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_saved_look_goes_on_to_the_same_bits(epochs: int) -> None:
    def begin() -> PlacedNetwork:
        network = PlacedNetwork(dense().requires_grad_(False), "frozen")
        network.set_next(max_parameters=300)
        return network

    whole = begin()
    whole.start_candidates(generator=torch.Generator().manual_seed(3))
    for _ in range(epochs):
        whole.reset_correlations()
        see(whole, 4)
        whole.correlation_rose(0.0)
    whole.reset_correlations()
    see(whole, 4, part=slice(8))
    state = whole.candidate_state()
    resumed = begin()
    resumed.start_candidates(generator=torch.Generator().manual_seed(3), state=state)
    for network in (whole, resumed):
        see(network, 4, part=slice(8, None))
        while network.correlation_rose(0.0):
            network.reset_correlations()
            see(network, 4)
        network.integrate()
    own, other = whole.model.state_dict(), resumed.model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_a_saved_look_goes_on_counting() -> None:
    networks = [PlacedNetwork(dense().requires_grad_(False), "frozen") for _ in range(2)]
    for network in networks:
        network.set_next(max_parameters=300)
    networks[0].start_candidates()
    see(networks[0], 8)
    networks[1].start_candidates(state=networks[0].candidate_state())
    looks = []
    for network in networks:
        see(network, 8)
        looks.append({name: "square" in value for name, value in network.candidate_state().items()})
    assert looks[0] == looks[1] == dict.fromkeys(("1", "3", "5"), True)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [("another layer's", "what was seen is of"), ("along", "'along'.* is to be"), ("square", "'square'.* is to be")],
)
def test_a_saved_look_of_another_network_is_refused(change: str, refusal: str) -> None:
    network = PlacedNetwork(dense().requires_grad_(False), "frozen")
    network.set_next(max_parameters=300)
    look(network)
    state = network.candidate_state()
    network.discard()
    if change == "another layer's":
        state["other"] = state.pop("1")
    else:
        state["1"][change] = torch.full_like(state["1"][change], 99)[:-1]
    with pytest.raises(ValueError, match=refusal):
        network.start_candidates(state=state)
    assert not network._watches


@pytest.mark.parametrize("resumed", [False, True])
def test_two_processes_place_what_one_does(resumed: bool) -> None:
    # The processes are threads: they share the generator that draws a model's weights.
    drawn = dense().requires_grad_(False)

    def run(processes: Processes) -> dict[str, Tensor]:
        def begin(state: Any = None) -> PlacedNetwork:
            network = PlacedNetwork(copy.deepcopy(drawn), "frozen", processes=processes)
            network.set_next(max_parameters=300)
            network.start_candidates(generator=torch.Generator().manual_seed(3), state=state)
            return network

        network, half, seen = begin(), slice(processes.rank, None, processes.count), {}
        for last in (False, True):
            see(network, 4, half)
            if resumed and not last:
                network = begin(network.candidate_state(together=True))
                see(network, 4, slice(processes.rank, 6, processes.count))
            seen |= network.candidate_state(together=True)["1"]
            network.correlation_rose(0.0)
        network.integrate()
        # A loss is the mean of a batch, which is half as large in each of two processes.
        return {**network.model.state_dict(), "image": F.normalize(seen["image"].flatten(), dim=0)}

    (alone,), (first, second) = in_processes(1, run), in_processes(2, run)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        # Of a direction there are two signs, and of the weakest ones little to go by.
        own, both = (part[:4].abs() if "nodes.weight" in name else part for part in (value, first[name]))
        torch.testing.assert_close(both, own, rtol=0.02, atol=1e-3 if name != "image" else 1e-5)


def test_layers_of_other_kinds_are_left_alone_with_the_reason() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4), "line": nn.Linear(4, 2), "groups": nn.Conv1d(4, 4, 1, groups=2)})
    network = PlacedNetwork(model.requires_grad_(False), "frozen")
    assert network.targets == ["line"]
    assert network.skipped.keys() == {"rnn", "groups"}
    with pytest.raises(ValueError, match="no layer can have placed dendrites"):
        PlacedNetwork(nn.GRU(3, 4).requires_grad_(False), "frozen")
