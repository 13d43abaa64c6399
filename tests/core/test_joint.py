"""Parts of a batch in several processes, which are threads here, teach candidates what the whole batch does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pl_dendrites.core import DendriticNetwork, attach
from pl_dendrites.core.rule import processes as gathering
from pl_dendrites.core.rule.processes import JointLearning

Loss = Callable[[nn.Module, Tensor], Tensor]  # a mean over examples


PAYS = gathering._pays


@pytest.fixture(autouse=True, params=["gradients are added up", "samples are gathered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds for both, whichever communicates less."""
    gathers = request.param == "samples are gathered"
    monkeypatch.setattr(gathering, "_pays", lambda pool, samples: gathers and min(samples) >= 0 < max(samples))


class Together:
    """Adds up over threads as a collective does, or gathers: all must come, or there is an error."""

    def __init__(self, count: int) -> None:
        self.barrier, self.parts, self.count = threading.Barrier(count, timeout=10), {}, count

    def add_up(self, tensor: Tensor) -> None:
        tensor.copy_(self.gather(tensor).sum(0))

    def gather(self, tensor: Tensor) -> Tensor:
        self.parts[threading.get_ident()] = tensor.clone()
        self.barrier.wait()
        found = torch.stack([self.parts[key] for key in sorted(self.parts)])
        self.barrier.wait()
        return found


def network(make_model: Callable[[], nn.Module], watch: bool) -> DendriticNetwork:
    torch.manual_seed(0)
    grown = attach(make_model().double())
    grown.start_candidates(2, torch.Generator().manual_seed(3))
    if not watch:
        grown.watch([])
    return grown


def whole(
    make_model: Callable[[], nn.Module], batches: Sequence[Tensor], loss: Loss, watch: bool = True
) -> DendriticNetwork:
    """A backward pass for each batch, in one process."""
    grown = network(make_model, watch)
    for batch in batches:
        loss(grown.model, batch).requires_grad_().backward()
    return grown


def in_parts(
    make_model: Callable[[], nn.Module], batches: Sequence[Sequence[Tensor]], loss: Loss, watch: bool = True
) -> list[DendriticNetwork]:
    """The same in several; of each batch there is a part for each of them."""
    together = Together(len(batches[0]))
    networks = [network(make_model, watch) for _ in batches[0]]

    def process(rank: int) -> None:
        joint = JointLearning(networks[rank].candidates.values(), together.add_up, together.count, together.gather)
        for parts in batches:
            loss(networks[rank].model, parts[rank]).requires_grad_().backward()
            joint.learn()
        joint.add_up_gradients()

    with ThreadPoolExecutor(together.count) as threads:
        list(threads.map(process, range(together.count)))
    return networks


def assert_same(parts: list[DendriticNetwork], reference: DendriticNetwork) -> None:
    close = {"atol": 1e-12, "rtol": 1e-9, "equal_nan": True}
    missed = reference.missed_error()
    for part in parts:
        for own, other, first in zip(
            part.candidate_parameters(),
            reference.candidate_parameters(),
            parts[0].candidate_parameters(),
            strict=True,
        ):
            torch.testing.assert_close(own.grad, other.grad, **close)
            torch.testing.assert_close(own.grad, first.grad, atol=0, rtol=0, equal_nan=True)
        for name, values in reference.candidate_state().items():
            torch.testing.assert_close(part.candidate_state()[name], values, **close)
        assert part.layers_with_error() == reference.layers_with_error()
        assert part.missed_error() == missed


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data(count: int, *size: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(*size, generator=random, dtype=torch.float64) for _ in range(count)]


def cubes(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flatten(1)[:, :1].unflatten(1, [1] * (x.ndim - 1))).pow(3).mean()


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_of_several_batches(processes: int) -> None:
    batches = data(5, 12, 3)
    assert_same(in_parts(mlp, [batch.chunk(processes) for batch in batches], cubes), whole(mlp, batches, cubes))


def test_the_running_covariance_of_the_whole_decides_not_that_of_a_part() -> None:
    """Signs of parts differ, so that this shows something."""
    (part,) = data(1, 4, 3)
    batch = torch.cat([part, -2 * part])
    alone = [whole(mlp, [part], cubes).candidate_state()["0"]["running_covariance"].sign() for part in batch.chunk(2)]
    assert not torch.equal(*alone)
    assert_same(in_parts(mlp, [batch.chunk(2)], cubes), whole(mlp, [batch], cubes))


def test_feature_maps() -> None:
    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2))

    batches = data(2, 6, 4, 5, 5)
    assert_same(in_parts(convolutions, [b.chunk(3) for b in batches], cubes), whole(convolutions, batches, cubes))


class Expert(nn.Module):
    """A layer for rows with a positive first input."""

    def __init__(self, empty_calls: bool) -> None:
        super().__init__()
        self.body, self.expert, self.unused = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
        self.empty_calls = empty_calls

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        out = self.body(x)
        if not (chosen.any() or self.empty_calls):
            return out
        return out.index_add(0, chosen.nonzero()[:, 0], self.expert(x[chosen]))


@pytest.mark.parametrize("empty_calls", [False, True])
def test_a_layer_that_no_row_of_a_part_or_of_a_batch_reaches(empty_calls: bool) -> None:
    batches = data(4, 8, 3)
    for i, batch in enumerate(batches):
        batch[:, 0] = -batch[:, 0].abs()
        if i % 2 == 0:
            batch[1:4, 0] *= -1

    def make() -> nn.Module:
        return Expert(empty_calls)

    parts, reference = in_parts(make, [batch.chunk(2) for batch in batches], cubes), whole(make, batches, cubes)
    assert_same(parts, reference)
    assert parts[1].layers_with_error() == ["body", "expert"]
    assert all(parameter.grad is None for parameter in parts[0].candidates["unused"].parameters())


def test_an_error_that_is_not_finite_in_one_part_counts_as_in_the_whole() -> None:
    batches = data(3, 8, 3)

    def overflow(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return (out * torch.where(x[:, :1] == batches[1][6, 0], torch.tensor([[1.0, torch.inf]]), 1)).pow(3).mean()

    def layer() -> nn.Module:
        return nn.Linear(3, 2)

    parts, reference = in_parts(layer, [b.chunk(2) for b in batches], overflow), whole(layer, batches, overflow)
    assert reference.candidates[""].moments.samples.tolist() == [24, 16]
    assert bool(reference.candidates[""].missed)
    assert_same(parts, reference)


def test_a_layer_that_is_not_to_watch() -> None:
    batches = data(2, 8, 3)
    reference = whole(mlp, batches, cubes, watch=False)
    assert not any(parameter.grad.any() for parameter in reference.candidates["0"].nodes.parameters())
    assert_same(in_parts(mlp, [b.chunk(2) for b in batches], cubes, watch=False), reference)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant: bool) -> None:
    def recomputed(model: nn.Module, x: Tensor) -> Tensor:
        out = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        return (out - x[:, :1]).pow(3).mean()

    batches = data(3, 8, 3)
    assert_same(in_parts(mlp, [b.chunk(2) for b in batches], recomputed), whole(mlp, batches, cubes))


def test_uses_of_a_layer_in_one_pass_count_as_one_batch() -> None:
    def twice(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([cubes(model, part) for part in x.chunk(2)]).mean()

    batches = data(3, 8, 3)
    assert_same(in_parts(mlp, [b.chunk(2) for b in batches], twice), whole(mlp, batches, cubes))


def test_two_passes_through_one_graph() -> None:
    (batch,) = data(1, 8, 3)
    joint_network, plain = network(mlp, True), network(mlp, True)
    joint = JointLearning(joint_network.candidates.values(), lambda tensor: None, 1)
    losses = [cubes(grown.model, batch) for grown in (joint_network, plain)]
    for last in (False, True):
        for loss in losses:
            loss.backward(retain_graph=not last)
        joint.learn()
    joint.add_up_gradients()
    assert_same([joint_network], plain)


def test_samples_are_gathered_where_they_are_fewer_numbers_than_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the wide layer. Then the batch is too large, and gradients of both batches make one."""
    monkeypatch.setattr(gathering, "_pays", PAYS)
    sizes: list[int] = []
    plain = Together.gather
    monkeypatch.setattr(Together, "gather", lambda *args: (sizes.append(args[1].numel()), plain(*args))[1])

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2))

    batches = [*data(1, 20, 30), *data(1, 60, 30)]
    parts, reference = in_parts(wide, [b.chunk(2) for b in batches], cubes), whole(wide, batches, cubes)
    assert_same(parts, reference)
    assert sizes.count(10 * (30 + 40)) == 2, "once in each process: half a batch of inputs and errors"


def test_a_process_without_samples_computes_in_the_precision_of_the_others() -> None:
    """Autocast is known to those alone that used the layer."""

    class Single(Expert):
        def double(self) -> Single:
            return self  # autocast leaves double precision alone

    def in_half(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cubes(model, x.float())

    (batch,) = data(1, 8, 3)
    batch[:, 0] = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    first, second = in_parts(lambda: Single(empty_calls=False), [batch.chunk(2)], in_half)
    for own, other in zip(first.candidate_parameters(), second.candidate_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=0, rtol=0)


def test_compiled() -> None:
    def compiled(model: nn.Module, x: Tensor) -> Tensor:
        return cubes(torch.compile(model, backend="aot_eager"), x)

    (batch,) = data(1, 8, 3)
    grown = network(mlp, True)
    joint = JointLearning(grown.candidates.values(), lambda tensor: None, 1)
    compiled(grown.model, batch).requires_grad_().backward()
    joint.learn()
    joint.add_up_gradients()
    assert_same([grown], whole(mlp, [batch], cubes))
