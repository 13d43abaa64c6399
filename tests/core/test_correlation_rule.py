"""Candidates get the gradient of their covariance with the error, however the backward pass comes about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import PearsonCorrCoef

from pl_dendrites.core import DendriticNetwork, attach
from pl_dendrites.core.kinds import Inputs
from tests.core.helpers import (
    LAYERS,
    assert_gradients,
    grow,
    neuron_dim,
    randomise,
    reference_dendrites,
    reference_error,
    reference_forward,
    reference_gradients,
    reference_pool,
    samples,
)

MakeLayer = Callable[[], nn.Module]


def started(layer: nn.Module, dendrites: int = 1, pool: int = 3, model: nn.Module | None = None) -> DendriticNetwork:
    """A network whose layer has dendrites and candidates, random in every part, in double precision."""
    layer.double()
    randomise(layer, 1)
    network = attach(layer if model is None else model)
    grow(layer, dendrites, 2)
    network.start_candidates(pool)
    randomise(layer.dendrites.candidates, 3)
    return network


def wavy(out: Tensor) -> Tensor:
    """A loss whose error differs from sample to sample and from neuron to neuron."""
    factors = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return (factors * (out + 0.3).sin()).sum() + out.square().mean()


def pearson_of(outputs: Tensor, errors: Tensor) -> Tensor:
    """torchmetrics' Pearson correlation ``(P, C)`` of ``(P, samples, C)`` outputs and ``(samples, C)`` errors."""
    metric = PearsonCorrCoef(num_outputs=outputs.shape[0] * outputs.shape[2]).set_dtype(torch.float64)
    wide = outputs.movedim(1, 0).flatten(1)
    metric.update(wide, errors.repeat(1, outputs.shape[0]))
    return metric.compute().reshape(outputs.shape[0], -1)


def random_input(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("dendrites", [0, 1, 2])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_gradients_equal_those_of_the_absolute_covariance(
    make: MakeLayer, shape: tuple[int, ...], dendrites: int, pool: int
) -> None:
    layer = make()
    network = started(layer, dendrites, pool)
    x = random_input(shape)
    wavy(network.model(x)).backward()
    assert_gradients(layer, reference_gradients(layer, [(x, reference_error(layer, x, wavy))]))
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_correlations_of_an_epoch_are_those_of_torchmetrics(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = make()
    network = started(layer, dendrites=2)
    wavy(network.model(random_input(shape, 9))).backward()
    network.reset_correlations()
    outputs, errors = [], []
    for batch in range(3):
        x = random_input(shape, batch)
        wavy(network.model(x)).backward()
        outputs.append(samples(reference_pool(layer, x).detach(), layer, 1))
        errors.append(samples(reference_error(layer, x, wavy), layer))
    expected = pearson_of(torch.cat(outputs, 1), torch.cat(errors))
    torch.testing.assert_close(network.correlations()[""], expected, rtol=1e-6, atol=1e-8)


def test_the_error_of_an_earlier_layer_does_not_come_through_later_dendrites() -> None:
    first, second = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    model = nn.Sequential(first, nn.Tanh(), second)
    randomise(model, 1)
    network = attach(model)
    grow(first, 1, 2)
    grow(second, 2, 3)
    network.start_candidates(pool=2)
    x = random_input((9, 4))
    wavy(model(x)).backward()

    out = reference_forward(first, x).detach().requires_grad_()
    hidden = out.tanh()
    error, error_hidden = torch.autograd.grad(wavy(reference_forward(second, hidden)), (out, hidden))
    assert not torch.equal(error, error_hidden)
    assert_gradients(first, reference_gradients(first, [(x, error)]))
    at_second = reference_error(second, hidden.detach(), wavy)
    assert_gradients(second, reference_gradients(second, [(hidden.detach(), at_second)]))


def two_uses(layer: nn.Module, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Loss of ``UsedTwice``, and the layer's inputs and errors in it, last use first."""
    first = reference_forward(layer, x).detach().requires_grad_()
    second_input = first.flip(0).tanh()
    second = reference_forward(layer, second_input)
    loss = used_twice_loss(first, second)
    errors = torch.autograd.grad(loss, (second, first))
    return loss.detach(), [(second_input.detach(), errors[0]), (x, errors[1])]


def used_twice_loss(first: Tensor, second: Tensor) -> Tensor:
    return wavy(second) + 0.2 * first.cos().sum()


class UsedTwice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        return used_twice_loss(first, self.layer(first.flip(0).tanh()))


@pytest.mark.parametrize("dendrites", [0, 2])
def test_uses_of_one_layer_add_up_with_one_sign(dendrites: int) -> None:
    layer = nn.Linear(6, 6)
    network = started(layer, dendrites, model=UsedTwice(layer))
    x = random_input((11, 6))
    network.model(x).backward()
    _, uses = two_uses(layer, x)
    expected = reference_gradients(layer, uses, together=True)
    with_signs_that_move = reference_gradients(layer, uses)[1]
    assert (with_signs_that_move - expected[1]).norm() > 1e-3, "no sign differs: a case that tests nothing"
    assert_gradients(layer, expected)
    errors = torch.cat([error for _, error in uses])
    outputs = torch.cat([reference_pool(layer, seen).detach() for seen, _ in uses], 1)
    torch.testing.assert_close(network.correlations()["layer"], pearson_of(outputs, errors), rtol=1e-6, atol=1e-8)


def test_the_sign_follows_an_average_over_batches_not_one_batch() -> None:
    layer = nn.Linear(3, 4)
    network = started(layer)
    uses = []
    for batch, size in enumerate([1.0, 0.1, -0.3, 0.5, -2.0]):
        x = random_input((6, 3), batch)
        for parameter in network.candidate_parameters():
            parameter.grad = None
        (size * wavy(network.model(x))).backward()
        uses.append((x, reference_error(layer, x, lambda out, size=size: size * wavy(out))))
        before = reference_gradients(layer, uses[:-1]) if batch else [0.0] * len(network.candidate_parameters())
        now = reference_gradients(layer, uses)
        assert_gradients(layer, [b - a for a, b in zip(before, now, strict=True)])


def test_micro_batches_accumulate() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    network = started(layer, dendrites=2)
    uses = []
    for batch in range(2):
        x = random_input((2, 3, 4, 4), batch)
        (wavy(network.model(x)) / 2).backward()
        uses.append((x, reference_error(layer, x, lambda out: wavy(out) / 2)))
    assert_gradients(layer, reference_gradients(layer, uses))


@pytest.mark.parametrize("dendrites", [0, 2])
def test_activation_checkpointing_changes_no_gradient_and_counts_no_sample_twice(dendrites: int) -> None:
    layer = nn.Linear(6, 6)
    network = started(layer, dendrites, model=UsedTwice(layer))
    x = random_input((11, 6))
    checkpoint(network.model, x, use_reentrant=False).backward()
    _, uses = two_uses(layer, x)
    assert_gradients(layer, reference_gradients(layer, uses, together=True))
    assert layer.dendrites.candidates.moments.samples.tolist() == [22.0] * 6


def test_reentrant_checkpointing_works_behind_a_layer_that_learns() -> None:
    layer = nn.Linear(4, 4)
    network = started(layer)
    x = random_input((5, 4))
    checkpoint(lambda seen: wavy(network.model(seen)), x.clone().requires_grad_(), use_reentrant=True).backward()
    assert_gradients(layer, reference_gradients(layer, [(x, reference_error(layer, x, wavy))]))
    assert layer.dendrites.candidates.moments.samples.tolist() == [5.0] * 4


def test_validation_and_forwards_without_a_backward_leave_the_statistics_alone() -> None:
    layer = nn.Linear(4, 3)
    network = started(layer)
    wavy(network.model(random_input((5, 4)))).backward()
    before = {key: value.clone() for key, value in network.candidate_state()[""].items()}
    watch = layer.dendrites.candidates.register_forward_hook(lambda *_: pytest.fail("candidates run in validation"))
    with torch.no_grad():
        network.model(random_input((7, 4), 1))
    watch.remove()
    network.model.eval()(random_input((7, 4), 2))
    after = network.candidate_state()[""]
    assert before["samples"].tolist() == [5.0] * 3
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**16])
def test_a_loss_scale_scales_gradients_and_no_correlation(scale: float) -> None:
    layer = nn.Linear(4, 3)
    network = started(layer)
    x = random_input((9, 4))
    (scale * wavy(network.model(x))).backward()
    error = reference_error(layer, x, wavy)
    assert_gradients(layer, [scale * gradient for gradient in reference_gradients(layer, [(x, error)])])
    expected = pearson_of(reference_pool(layer, x).detach(), error)
    torch.testing.assert_close(network.correlations()[""], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dendrites", [0, 1])
def test_an_activation_that_works_in_place_may_follow(dendrites: int) -> None:
    layer = nn.Linear(4, 3)
    network = started(layer, dendrites, model=nn.Sequential(layer, nn.ReLU(inplace=True)))
    x = random_input((9, 4))
    wavy(network.model(x)).backward()
    error = reference_error(layer, x, lambda out: wavy(out.relu()))
    assert_gradients(layer, reference_gradients(layer, [(x, error)]))


@pytest.mark.parametrize(("make", "shape"), [LAYERS[0].values, LAYERS[6].values], ids=["linear", "conv2d-groups"])
def test_autocast_keeps_the_output_type_and_the_direction(make: MakeLayer, shape: tuple[int, ...]) -> None:
    layer = make()
    network = started(layer, dendrites=2)
    layer.float().dendrites.candidates.float()
    x = random_input(shape).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = network.model(x)
        assert out.dtype == layer.forward(x).dtype == torch.bfloat16
    wavy(out.float()).backward()
    expected = reference_gradients(layer, [(x, reference_error(layer, x, wavy))])
    for parameter, reference in zip(network.candidate_parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert torch.cosine_similarity(parameter.grad.flatten(), reference.flatten(), 0) > 0.99


def test_one_unbatched_sample_gives_no_gradient_and_no_error() -> None:
    layer = nn.Linear(4, 3)
    network = started(layer)
    wavy(network.model(random_input((4,)))).backward()
    assert all(not parameter.grad.any() for parameter in network.candidate_parameters())


def test_an_overflow_in_one_neuron_leaves_the_gradients_of_the_others() -> None:
    layer = nn.Linear(4, 3)
    network = started(layer, pool=2)
    x = random_input((9, 4))
    error = reference_error(layer, x, wavy)
    spoilt = error.clone()
    spoilt[3, 1] = torch.inf
    network.model(x).backward(spoilt)
    error[:, 1] = 0
    assert_gradients(layer, reference_gradients(layer, [(x, error)]))
    assert layer.dendrites.candidates.moments.samples.tolist() == [9, 0, 9]


def test_a_batch_that_overflows_everywhere_spoils_no_later_gradient() -> None:
    layer = nn.Linear(4, 3)
    network = started(layer)
    x = random_input((9, 4))
    wavy(network.model(x * torch.nan)).backward()
    for parameter in network.candidate_parameters():
        parameter.grad = None
    wavy(network.model(x)).backward()
    error = reference_error(layer, x, wavy)
    assert_gradients(layer, reference_gradients(layer, [(x, error)]))
    expected = pearson_of(reference_pool(layer, x).detach(), error)
    torch.testing.assert_close(network.correlations()[""], expected, rtol=1e-6, atol=1e-8)


def test_an_error_that_is_not_finite_is_missed_once() -> None:
    layer = nn.Linear(4, 3)
    network = started(layer)
    network.model(random_input((9, 4))).sum().backward()
    assert not network.missed_error()
    error = torch.ones(9, 3, dtype=torch.float64)
    error[0, 0] = torch.nan
    network.model(random_input((9, 4))).backward(error)
    network.model(random_input((0, 4))).sum().backward()
    assert network.missed_error()
    network.model(random_input((0, 4))).sum().backward()
    assert not network.missed_error()


def test_a_backward_pass_teaches_only_the_layers_that_it_would_train() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    network = started(second, 0, model=nn.Sequential(first.double(), nn.Tanh(), second))
    network.watch(second.parameters())
    x = random_input((9, 4))
    wavy(network.model(x)).backward()
    assert network.layers_with_error() == ["2"]
    assert all(not p.grad.any() for p in first.dendrites.candidates.parameters() if p.grad is not None)
    error = reference_error(second, first(x).tanh().detach(), wavy)
    assert_gradients(second, reference_gradients(second, [(first(x).tanh().detach(), error)]))
    network.watch(None)
    wavy(network.model(x)).backward()
    assert network.layers_with_error() == ["0", "2"]


def test_only_the_network_sees_the_error_and_it_sees_all_of_it() -> None:
    layer = nn.Linear(4, 3)
    network = started(layer, dendrites=2)
    x = random_input((9, 4)).requires_grad_()
    wavy(network.model(x)).backward()
    (expected,) = torch.autograd.grad(wavy(reference_forward(layer, x)), x)
    torch.testing.assert_close(x.grad, expected)


def test_candidates_see_the_dendrites_there_are() -> None:
    layer = nn.Conv1d(2, 4, 3, groups=2)
    network = started(layer, dendrites=2)
    x = random_input((3, 2, 6))
    dendrites = reference_dendrites(layer, x)
    torch.testing.assert_close(
        layer.dendrites.candidates(Inputs((x,), {}), layer(x), dendrites), reference_pool(layer, x)
    )
    assert reference_pool(layer, x).shape == (3, *network.model(x).shape)
    assert neuron_dim(layer) == layer.dendrites.kind.dim
