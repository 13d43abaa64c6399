"""Samples count the same in whatever batch they come, and what is no sample does not count."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.core import DendriticNetwork, attach
from pl_dendrites.core.rule.processes import JointLearning

Loss = Callable[[Tensor, Tensor], Tensor]


def summed(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().sum()


def mean(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def two_parts(out: Tensor, y: Tensor) -> Tensor:
    return F.l1_loss(out[..., :2], y[..., :2]) + 3 * mean(out[..., 2:], y[..., 2:])


def grown(model: nn.Module, activation: str = "tanh") -> DendriticNetwork:
    network = attach(model, activation=activation)
    network.start_candidates(4, torch.Generator().manual_seed(1))
    return network


def task(samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=random)
    y = torch.tanh(x @ torch.randn(6, 4, generator=random)) + 0.5 * torch.randn(samples, 4, generator=random)
    model = nn.Linear(6, 4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=random)
    return model, x, y


def batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    yield from torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).split(size)


def pearson(outputs: Tensor, errors: Tensor) -> Tensor:
    """``(P, C)`` by numpy's formula, of ``(P, N, C)`` and ``(N, C)``."""
    d, e = outputs - outputs.mean(1, keepdim=True), errors - errors.mean(0)
    return (d * e).sum(1) / (d.square().sum(1) * e.square().sum(0)).sqrt()


@pytest.mark.parametrize("loss", [mean, summed, two_parts])
@pytest.mark.parametrize(("samples", "size"), [(321, 64), (130, 32), (257, 128)])
def test_a_short_last_batch_weighs_what_its_samples_do(loss: Loss, samples: int, size: int) -> None:
    """Candidates stand still, so every epoch has the correlation over its samples, whatever their order."""
    model, x, y = task(samples)
    network = grown(model)
    seen: list[Tensor] = []
    network.candidates[""].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    for epoch in range(3):
        network.reset_correlations()
        seen.clear()
        errors = []
        for rows in batches(samples, size, epoch):
            out = model(x[rows])
            out.register_hook(errors.append)
            (loss(out, y[rows]) * (1 if epoch < 2 else 0.01)).backward()
        share = [1.0 if loss is summed else len(error) for error in errors]
        expected = pearson(torch.cat(seen, 1), torch.cat([n * error for n, error in zip(share, errors, strict=True)]))
        torch.testing.assert_close(network.correlations()[""], expected, atol=2e-3, rtol=0)


def test_a_short_batch_steps_candidates_as_little_as_it_has_samples() -> None:
    model, x, y = task(65)
    network = grown(model)
    mean(model(x[:64]), y[:64]).backward()
    (full,) = (p.grad.clone() for n, p in network.candidates[""].named_parameters() if n == "nodes.weight")
    for parameter in network.candidate_parameters():
        parameter.grad = None
    mean(model(x[63:]), y[63:]).backward()
    (short,) = (p.grad.clone() for n, p in network.candidates[""].named_parameters() if n == "nodes.weight")
    assert short.norm() < full.norm() / 4


@pytest.mark.parametrize("uses", [1, 5])
def test_uses_of_a_layer_in_one_pass_are_one_batch(uses: int) -> None:
    """A cell in a loop: its steps are no short batches, and the last batch of an epoch is one."""
    model, x, y = task(80)
    network = grown(model)
    for rows in torch.arange(80).split(32):
        sum(mean(model(x[rows] + t), y[rows]) for t in range(uses)).backward()
    assert network.candidates[""].common_scale.first == 32 * uses
    weights = network.candidates[""].moments
    assert weights.samples.tolist() == [80.0 * uses] * 4
    rate = weights.square_error / weights.samples
    network.reset_correlations()
    for rows in torch.arange(64).split(32):
        sum(mean(model(x[rows] + t), y[rows]) for t in range(uses)).backward()
    full = network.candidates[""].moments
    torch.testing.assert_close(rate, full.square_error / full.samples, rtol=0.3, atol=0)


def test_padded_positions_are_no_samples() -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 12, 6, generator=random), torch.randint(0, 4, (8, 12), generator=random)
    real = torch.arange(12) < torch.randint(2, 7, (8, 1), generator=random)
    x[~real], y[~real] = 0.0, -100
    found = []
    for padded in (True, False):
        model, _, _ = task(1)
        network = grown(model)
        out, target = (model(x), y) if padded else (model(x[real]), y[real])
        F.cross_entropy(out.flatten(0, -2), target.flatten()).backward()
        gradients = [parameter.grad for parameter in network.candidate_parameters()]
        found.append((network.correlations()[""], network.candidates[""].moments.samples, *gradients))
    assert found[0][1].tolist() == [int(real.sum())] * 4
    for padded, alone in zip(*found, strict=True):
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-6)


def test_padded_feature_maps() -> None:
    model = nn.Conv1d(3, 4, 3, padding=1)
    network = grown(model)
    x = torch.randn(5, 3, 9)
    model(x)[:, :, :6].square().mean().backward()
    assert network.candidates[""].moments.samples.tolist() == [30.0] * 4


def test_errors_that_are_very_small_are_errors() -> None:
    found = []
    for scale in (1.0, 2.0**-70):
        model, x, y = task(64)
        network = grown(model)
        (mean(model(x), y) * scale).backward()
        assert network.layers_with_error() == [""]
        found.append(network.correlations()[""])
    torch.testing.assert_close(*found)


def test_a_batch_without_any_error_changes_nothing() -> None:
    model, x, y = task(64)
    network = grown(model)
    (mean(model(x), y) * 0).backward()
    assert network.layers_with_error() == []
    mean(model(x), y).backward()
    assert network.layers_with_error() == [""]


def test_what_the_first_batches_showed_is_part_of_the_state() -> None:
    """A short batch right after a resume is told by what came before it."""
    model, x, y = task(80)
    network = grown(model)
    for rows in torch.arange(80).split(32):
        mean(model(x[rows]), y[rows]).backward()
    state, weights = network.candidate_state(), model.state_dict()
    network.reset_correlations()
    fresh = task(80)[0]
    fresh.load_state_dict(weights)
    resumed = attach(fresh)
    resumed.start_candidates(4, torch.Generator().manual_seed(1), state=state)
    resumed.reset_correlations()
    for one in (network, resumed):
        for rows in (torch.arange(8), torch.arange(32)):
            mean(one.model(x[rows]), y[rows]).backward()
    assert all(
        torch.equal(network.candidate_state()[""][key], value) for key, value in resumed.candidate_state()[""].items()
    )


def test_candidates_saved_before_there_was_a_common_scale_go_on() -> None:
    model, x, y = task(32)
    network = grown(model)
    mean(model(x), y).backward()
    old = {key: value for key, value in network.candidate_state()[""].items() if not key.startswith("common_scale.")}
    network.discard()
    network.start_candidates(4, state={"": old})
    assert network.candidates[""].moments.samples.tolist() == [32.0] * 4


@pytest.mark.parametrize("bad", [torch.tensor([-1, 0, 0]), torch.tensor([1, 2, 0]), torch.tensor([1, 0, 500]), "x"])
def test_a_state_that_cannot_be_is_refused(bad: object) -> None:
    model, _, _ = task(1)
    network = grown(model)
    state = network.candidate_state()
    state[""]["common_scale._extra_state"] = bad
    with pytest.raises((ValueError, TypeError, AttributeError)):
        network.load_candidate_state(state)


def test_processes_count_a_short_last_batch_and_padding_as_one_does() -> None:
    """One process that learns after the backward pass, and one that learns in it."""
    found = []
    for later in (False, True):
        model, x, y = task(80)
        network = grown(model)
        joint = JointLearning(network.candidates.values(), lambda tensor: None, 1) if later else None
        for rows in torch.arange(80).split(32):
            out = model(x[rows].unflatten(0, (-1, 4)))[:, :3]
            mean(out, y[rows].unflatten(0, (-1, 4))[:, :3]).backward()
            if joint is not None:
                joint.learn()
        if joint is not None:
            joint.add_up_gradients()
        state = network.candidate_state()[""]
        found.append([*(parameter.grad for parameter in network.candidate_parameters()), *state.values()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
