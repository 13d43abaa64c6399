"""Dendrites that are placed where the loss falls most steeply, within a budget; autograd says where that is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.core import fuse
from pl_dendrites.core.fields.gathered import Processes
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


def placed(
    model: nn.Module, budget: int, fan_in: int | None = 3, targets: Any = "frozen", **look_at: Any
) -> PlacedNetwork:
    if targets == "frozen":
        model.requires_grad_(False)
    network = PlacedNetwork(model, targets)
    network.set_next(fan_in=fan_in, max_parameters=budget)
    look(network, **look_at)
    network.integrate()
    return network


def steepest(model: nn.Module, fan_in: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each neuron of each layer its inputs with the largest gradients, and the sum of these: by autograd."""
    twin = copy.deepcopy(model).requires_grad_(True)
    F.cross_entropy(twin(X), Y).backward()
    found = {}
    for name, layer in twin.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is not None:
            gradient = weight.grad.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight.grad
            best = gradient.reshape(*gradient.shape[:2], -1).norm(dim=2).topk(fan_in, 1)
            found[name] = best.indices, best.values.sum(1)
    return found


@pytest.mark.parametrize("make", [dense, convolutional])
def test_a_dendrite_sees_the_inputs_whose_weights_have_the_largest_gradients(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    expected = steepest(model, 3)
    network = placed(model, 10_000, batches=4)  # room for all of them
    assert {name for name, layer in network.layers.items() if layer.count} == set(expected)
    for name, (inputs, _) in expected.items():
        (block,) = network.layers[name].private
        assert block.nodes.inputs.tolist() == inputs.sort(1).values.tolist(), name


def test_the_neurons_get_them_where_the_loss_falls_most_steeply() -> None:
    """Nearly: the first look is at random directions."""
    model = dense()
    worth = {(name, c): float(v) for name, (_, sums) in steepest(model, 3).items() for c, v in enumerate(sums)}
    network = placed(model, 30)
    chosen = {(n, c) for n, d in network.layers.items() for block in d.private for c in block.neurons.tolist()}
    assert trainable(model) == 30
    assert sum(worth[place] for place in chosen) > 0.9 * sum(sorted(worth.values())[-10:])


def test_nothing_changes_until_they_learn_and_then_all_of_them_do() -> None:
    model = convolutional()
    before = model(X)
    placed(model, 2_000)
    torch.testing.assert_close(model(X), before, atol=0, rtol=0)
    torch.testing.assert_close(fuse(model)(X), before)
    F.cross_entropy(model(X), Y).backward()
    idle = [
        n for n, p in model.named_parameters() if p.requires_grad and n.endswith("nodes.weight") and not p.grad.any()
    ]
    assert not idle
    assert all(p.grad is None for n, p in model.named_parameters() if "dendrites" not in n)


@pytest.mark.parametrize(("budget", "fan_ins"), [(30, {4}), (400, {16}), (1_000, {64, 20})])
def test_the_budget_counts_all_that_is_trainable_and_is_used_up(budget: int, fan_ins: set[int]) -> None:
    model = dense().requires_grad_(False)
    model[5].bias.requires_grad_(True)
    network = placed(model, budget, fan_in=None, targets=["1", "3"])
    assert budget - 64 < trainable(model) <= budget
    assert {block.form.fan_in for d in network.layers.values() for block in d.private} == fan_ins


@pytest.mark.parametrize("left", [-1, 0, 3])
def test_a_budget_that_is_used_already_leaves_the_network_as_it_is(left: int) -> None:
    model = dense().requires_grad_(False)
    model[5].requires_grad_(True)
    network = placed(model, 44 + left, fan_in=None, targets=["1", "3"])
    assert network.num_dendrites == 0
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
        sizes.append(sum(value["sums"].numel() for value in network.candidate_state().values()))
        network.correlation_rose(0.0)
    assert max(sizes) < 0.5 * sum(parameter.numel() for parameter in model.parameters())


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
        looks.append({name: "neurons" in value for name, value in network.candidate_state().items()})
    assert looks[0] == looks[1] == dict.fromkeys(("1", "3", "5"), True)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [("another layer's", "slopes are of"), ("neurons", "are to be some of 20"), ("sums", "are none of")],
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


def test_two_processes_place_what_one_does() -> None:
    # The processes are threads: they share the generator that draws a model's weights.
    drawn = dense().requires_grad_(False)

    def run(processes: Processes) -> dict[str, Tensor]:
        model = copy.deepcopy(drawn)
        network = PlacedNetwork(model, "frozen", processes=processes)
        network.set_next(max_parameters=300)
        half = slice(processes.rank, None, processes.count)
        look(network, 1, half)
        network.integrate()
        return model.state_dict()

    (alone,), (first, second) = in_processes(1, run), in_processes(2, run)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], value), name


def test_layers_that_cannot_see_a_few_inputs_are_left_alone_with_the_reason() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(3, 4), "line": nn.Linear(4, 2), "groups": nn.Conv1d(4, 4, 1, groups=2)})
    network = PlacedNetwork(model.requires_grad_(False), "frozen")
    assert network.targets == ["line"]
    assert network.skipped.keys() == {"rnn", "groups"}
    with pytest.raises(ValueError, match="no layer can have placed dendrites"):
        PlacedNetwork(nn.GRU(3, 4).requires_grad_(False), "frozen")


def test_fused_they_are_weights_of_their_neurons() -> None:
    model = convolutional()
    placed(model, 500)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    fused = fuse(model)
    torch.testing.assert_close(fused(X), model(X))
    count = [sum(p.numel() for p in network.parameters()) for network in (fused, convolutional())]
    assert count[0] == count[1]
