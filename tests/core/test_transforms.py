"""Training steps that use ``torch.func``: candidates learn as they do from the ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from pl_dendrites.core import DendriticNetwork, Form, attach
from pl_dendrites.core.rule.processes import JointLearning
from tests.core.helpers import grow, randomise

MODELS = [
    pytest.param(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), (7, 3), id="linear"),
    pytest.param(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)), (7, 2, 3), id="linear-3d"),
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(-3), nn.Linear(12, 1)), (5, 2, 3, 3), id="conv"
    ),
]
LIVE = [False, True]


def started(make: Callable[[], nn.Module], dendrites: int = 1, live: bool = False, seed: int = 0) -> DendriticNetwork:
    torch.manual_seed(seed)
    network = attach(make().double(), live=live)
    for i, layer in enumerate(network._hosts.values()):
        grow(layer, dendrites, i)
    network.start_candidates(pool=2, generator=torch.Generator().manual_seed(seed))
    return network


def what_was_learned(network: DendriticNetwork) -> list[Tensor]:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.candidate_parameters()]
    return [*gradients, *(value for pool in network.candidates.values() for value in pool.moments)]


def assert_learned_alike(network: DendriticNetwork, other: DendriticNetwork) -> None:
    found, expected = what_was_learned(network), what_was_learned(other)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert any(value.any() for value in found)


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_a_vmapped_forward_pass_is_the_forward_pass_of_the_batch(
    make: Callable[[], nn.Module], shape: tuple[int, ...], live: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    one, other = started(make, live=live), started(make, live=live)
    vmap(one.model)(x).square().sum().backward()
    other.model(x).square().sum().backward()
    assert_learned_alike(one, other)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_per_sample_gradients_show_every_error_once(
    make: Callable[[], nn.Module], shape: tuple[int, ...], live: bool, processes: int
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    one, other = started(make, live=live), started(make, live=live)
    joint = JointLearning(one.candidates.values(), lambda tensor: None, processes) if processes > 1 else None
    other_joint = JointLearning(other.candidates.values(), lambda tensor: None, processes) if processes > 1 else None

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(one.model, parameters, (sample,)).square().sum()

    parameters = {name: p.detach() for name, p in one.model.named_parameters()}
    samples = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    other.model.requires_grad_(True)
    other.model(x).square().sum().backward()
    for learning in (joint, other_joint):
        if learning is not None:
            learning.learn()
    assert_learned_alike(one, other)
    for name, parameter in other.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(samples[name].sum(0), parameter.grad)
    if processes > 1:
        return
    assert all(p.grad is None for p in one.model.parameters())
    one.integrate()


def test_only_layers_that_per_sample_gradients_train_have_an_error() -> None:
    network = started(MODELS[0].values[0])

    def loss(head: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(network.model, head, (sample,)).square().sum()

    head = {name: p.detach() for name, p in network.model.named_parameters() if name.startswith("2.")}
    vmap(grad(loss), in_dims=(None, 0))(head, torch.randn(7, 3, dtype=torch.float64))
    assert network.layers_with_error() == ["2"]


def by_vmap_of_grad(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(grad(lambda sample: net(sample).sum()))(x)


def by_jacrev(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacrev(net))(x)


def by_jacfwd(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacfwd(net))(x)


def by_hessian(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(hessian(lambda sample: net(sample).sum()))(x)


def by_grad_of_grad(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(grad(lambda s: grad(lambda sample: net(sample).sum())(s).sum()))(x)


def by_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return jvp(net, (x,), (torch.ones_like(x),))[1]


def by_dual_numbers(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


def by_batched_backward(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = net(x)
    rows = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return torch.autograd.grad(out, x, rows, create_graph=True, is_grads_batched=True)[0]


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize(
    "derive",
    [
        by_vmap_of_grad,
        by_jacrev,
        by_jacfwd,
        by_hessian,
        by_grad_of_grad,
        by_jvp,
        by_dual_numbers,
        by_batched_backward,
    ],
)
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_a_derivative_with_respect_to_the_input_is_what_it_is_without_candidates(
    make: Callable[[], nn.Module], shape: tuple[int, ...], derive: Callable[..., Tensor], live: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    network, plain = started(make, live=live), started(make, live=live)
    plain.discard()
    found = derive(network.model, x)
    torch.testing.assert_close(found, derive(plain.model, x))
    if derive is not by_batched_backward:
        # A derivative that the step takes for itself is no error of the loss.
        assert not any(pool.moments.samples.any() for pool in network.candidates.values())
    loss = found.square().sum() + network.model(x).square().sum()
    loss.backward()
    assert set(network.layers_with_error()) == set(network.targets)
    assert all(torch.isfinite(value).all() for value in what_was_learned(network))
    assert any(p.grad is not None and p.grad.any() for p in network.candidate_parameters())
    network.integrate()
    assert all(p.requires_grad for p in network.trained_parameters().__next__())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_cell_under_vmap() -> None:
    """PyTorch's recurrent layers themselves know no ``vmap``."""
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    one, other = started(lambda: nn.GRUCell(3, 4)), started(lambda: nn.GRUCell(3, 4))
    found = vmap(one.model)(x)
    torch.testing.assert_close(found, torch.stack([other.model(sample) for sample in x]))
    found.square().sum().backward()
    assert one.layers_with_error() == [""]


@pytest.mark.parametrize("candidates", [True, False])
@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 4), lambda: nn.GRU(3, 4)], ids=["lstm", "gru"])
def test_a_sequence_in_pieces_within_a_transform(make: Callable[[], nn.Module], candidates: bool) -> None:
    network = started(make)
    if not candidates:
        network.discard()
    x = torch.randn(6, 2, 3, dtype=torch.float64)

    def whole(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(network.model, parameters, (x,))[0].square().sum()

    def pieces(parameters: dict[str, Tensor]) -> Tensor:
        first, state = functional_call(network.model, parameters, (x[:3],))
        rest, _ = functional_call(network.model, parameters, (x[3:], state))
        return first.square().sum() + rest.square().sum()

    parameters = {name: p.detach() for name, p in network.model.named_parameters()}
    found, expected = grad(pieces)(parameters), grad(whole)(parameters)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    assert network.layers_with_error() == [""] * candidates


def test_an_ensemble_of_weights_under_vmap() -> None:
    network = started(MODELS[0].values[0])
    x = torch.randn(7, 3, dtype=torch.float64)
    stacked = {name: torch.stack([p.detach(), p.detach() * 2]) for name, p in network.model.named_parameters()}
    vmap(lambda p: functional_call(network.model, p, (x,)))(stacked).square().sum().backward()
    assert network.candidates["0"].moments.samples.tolist() == [14.0] * 5


def test_a_mean_of_per_sample_losses() -> None:
    one, other = started(MODELS[0].values[0]), started(MODELS[0].values[0])
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64)
    vmap(lambda a, b: F.mse_loss(one.model(a), b))(x, y).mean().backward()
    F.mse_loss(other.model(x), y).backward()
    assert_learned_alike(one, other)


STACKS = [Form(2), Form(1, "relu"), Form(2)]


@pytest.mark.parametrize("name", ["0.weights.1", "1.nodes.weight", "1.links", "2.weights.0", "2.weights.1"])
def test_a_batch_of_values_of_one_parameter_of_dendrites(name: str) -> None:
    """What is a batch meets what is none: a sum that began without cannot take it in in place."""
    layer = nn.Linear(3, 4).double()
    attach(layer)
    layer.dendrites.reshape(layer, STACKS)
    randomise(layer.dendrites)
    parameters, x = dict(layer.named_parameters()), torch.randn(5, 3, dtype=torch.float64)
    values = torch.randn(2, *parameters[f"dendrites.{name}"].shape, dtype=torch.float64)

    def out(value: Tensor) -> Tensor:
        return functional_call(layer, {**parameters, f"dendrites.{name}": value}, (x,))

    torch.testing.assert_close(vmap(out)(values), torch.stack(list(map(out, values))))
