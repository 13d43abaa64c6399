"""Several processes, which are threads here, find and move shared dendrites as one with all batches does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.core.fields.gathered import Alone, Processes, as_one, gather_samples
from pl_dendrites.core.fields.sample import Reservoir
from pl_dendrites.core.shared import SharedNetwork
from pl_dendrites.core.unit_set import UnitSet

T = TypeVar("T")
CPU = torch.device("cpu")
RANDOM = threading.Lock()  # all threads have the same generator


@dataclass
class Team:
    """Collectives of threads: all must come, or there is an error."""

    count: int
    parts: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=10)


@dataclass
class Member:
    """One process of a team."""

    team: Team
    rank: int

    @property
    def count(self) -> int:
        return self.team.count

    def gather(self, tensor: Tensor) -> Tensor:
        self.team.parts[self.rank] = tensor.clone()
        self.team.barrier.wait()
        found = torch.stack([self.team.parts[rank] for rank in range(self.count)])
        self.team.barrier.wait()
        return found

    def add_up(self, tensor: Tensor) -> None:
        tensor.copy_(self.gather(tensor).sum(0))


def in_processes(count: int, run: Callable[[Processes], T]) -> list[T]:
    team = Team(count)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, [Member(team, rank) for rank in range(count)]))


class Routed(nn.Module):
    """The module that dendrites hang around sees rows with a positive first input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.expert = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = x[:, 0] > 0, self.body(x)
        return out.index_add(0, chosen.nonzero()[:, 0], self.expert(x[chosen])) if chosen.any() else out


def network(processes: Processes, make: Callable[[], nn.Module] = lambda: nn.Linear(12, 3)) -> SharedNetwork:
    with RANDOM:
        torch.manual_seed(0)
        model = make().double()
    grown = SharedNetwork(model, ("expert" if isinstance(model, Routed) else "",), processes=processes)
    grown.set_next(UnitSet(units=6, field=3))
    return grown


def start(grown: SharedNetwork, state: Any = None) -> SharedNetwork:
    grown.start_candidates(8, torch.Generator().manual_seed(5), state=state)
    return grown


def batches(count: int = 4, rows: int = 24) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, rows, 12, generator=random, dtype=torch.float64)
    return [(part, (part[:, 0] * part[:, 1] > 0).long() + (part[:, 2] > 0).long()) for part in x]


def learn(grown: SharedNetwork, seen: Sequence[tuple[Tensor, Tensor]], processes: Processes) -> None:
    """Backward passes through this process' part of each batch."""
    for x, y in seen:
        own, wanted = x.chunk(processes.count)[processes.rank], y.chunk(processes.count)[processes.rank]
        F.cross_entropy(grown.model(own), wanted).requires_grad_().backward()


def values(grown: SharedNetwork) -> dict[str, Tensor]:
    return {**grown.model.state_dict(), **{f"deviation {n}": d for n, d in grown.moves.deviation.items()}}


def assert_as_one(parts: Sequence[SharedNetwork], one: SharedNetwork) -> None:
    assert one.units
    for part in parts:
        assert part.model.state_dict().keys() == one.model.state_dict().keys()
        for name, value in values(one).items():
            torch.testing.assert_close(values(part)[name], value, atol=1e-12, rtol=1e-9)
            assert torch.equal(values(part)[name], values(parts[0])[name])


def found(processes: Processes, seen: list[tuple[Tensor, Tensor]], make: Any = lambda: nn.Linear(12, 3)) -> Any:
    grown = network(processes, make)
    grown.model(seen[0][0])  # for a module that knows its outputs only then
    start(grown)
    learn(grown, seen, processes)
    assert len(grown.layers_with_error()) == 1
    grown.integrate()
    return grown


@pytest.mark.parametrize("count", [2, 3])
def test_a_set_is_found_in_the_samples_of_all(count: int) -> None:
    one = found(Alone(), batches())
    assert_as_one(in_processes(count, lambda own: found(own, batches())), one)


def test_a_module_that_one_process_never_reaches() -> None:
    """It is told by the others even how wide samples are."""
    seen = batches()
    for x, _ in seen:
        x[12:, 0] = -x[12:, 0].abs()
    assert_as_one(in_processes(2, lambda own: found(own, seen, Routed)), found(Alone(), seen, Routed))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (3, 2), (2, 3)])
def test_samples_are_saved_together_and_go_on_in_any_number_of_processes(before: int, after: int) -> None:
    def first(own: Processes) -> Any:
        grown = start(network(own))
        learn(grown, batches()[:2], own)
        return grown.candidate_state(together=True)

    states = in_processes(before, first)
    assert [state[""]["kept"].tolist() for state in states] == [[48 // before] * before] * before
    for state in states[1:]:
        assert all(torch.equal(value, states[0][""][name]) for name, value in state[""].items())

    def second(own: Processes) -> SharedNetwork:
        grown = start(network(own), states[0])
        learn(grown, batches()[2:], own)
        grown.integrate()
        return grown

    assert_as_one(in_processes(after, second), found(Alone(), batches()))


def test_samples_of_all_are_no_more_than_were_asked_for() -> None:
    def sizes(own: Processes) -> list[int]:
        grown = network(own)
        grown.set_next(UnitSet(units=6, field=3), samples=30)
        learn(start(grown), batches(), own)
        (kept,) = (samples["kept"].tolist() for samples in grown.candidate_state(together=True).values())
        grown.integrate()
        return kept

    assert in_processes(3, sizes) == [[10, 10, 10]] * 3


def test_every_sample_has_the_same_chance_whichever_process_it_came_to() -> None:
    """Of two that keep ten each, one saw three times as many as the other."""
    counts = torch.zeros(80)
    for seed in range(300):

        def gathered(own: Processes, seed: int = seed) -> Tensor:
            reservoir = Reservoir(10, 1000 * seed + own.rank * 2**40)
            for batch in torch.arange(60.0, 80.0).split(5) if own.rank else torch.arange(60.0).split(15):
                reservoir.add(batch[:, None], torch.ones(len(batch), 1))
            (samples,) = gather_samples([reservoir.samples], own, CPU)
            return as_one(samples, seed)["inputs"][:, 0]

        kept, other = in_processes(2, gathered)
        assert torch.equal(kept, other)
        counts[kept.long()] += 1
    chance = counts / 300  # a sixth of 60, and of 20 so many as come next to that: three
    assert chance[:60].mean().item() == pytest.approx(1 / 6, abs=1e-6)
    assert chance[60:].mean().item() == pytest.approx(3 / 20, abs=1e-6)
    assert chance.min() > 0.07
    assert chance.max() < 0.28  # deviation 0.02


def moved(own: Processes, spoil: bool = False, saved: list[Any] | None = None) -> SharedNetwork:
    grown = found(own, batches())
    nn.init.constant_(grown.blocks[0][1].out, 0.3)
    first, second = batches(2)
    first[0].add_(torch.linspace(0, 3, 24, dtype=torch.float64)[:, None])  # means of the parts differ
    grown.look()
    learn(grown, [first], own)
    if spoil and own.rank == 1:
        gains = grown.blocks[0][1].gains
        assert gains is not None
        gains.sums[0][:, 4] = torch.inf
    if saved is not None:
        saved.append(grown.moves.state_dict())
    learn(grown, [second], own)
    grown.rewire(0.4)
    return grown


def test_fields_move_by_the_gradients_of_all() -> None:
    before, one = found(Alone(), batches()), moved(Alone())
    assert (one.blocks[0][1].field != before.blocks[0][1].field).any()
    assert_as_one(in_processes(2, moved), one)


def test_gradients_that_are_not_finite_in_one_process_move_nothing_in_any() -> None:
    before = found(Alone(), batches())
    for part in in_processes(2, lambda own: moved(own, spoil=True)):
        assert torch.equal(part.blocks[0][1].field, before.blocks[0][1].field)


@pytest.mark.parametrize("after", [1, 2])
def test_a_window_that_is_saved_in_its_middle_goes_on(after: int) -> None:
    saved: list[Any] = []
    whole = in_processes(2, lambda own: moved(own, saved=saved))
    first = next(state for state in saved if any(part.any() for part in state["gains"]))

    def resumed(own: Processes) -> SharedNetwork:
        grown = found(own, batches())
        nn.init.constant_(grown.blocks[0][1].out, 0.3)
        grown.moves.load_state_dict(first)
        learn(grown, batches(2)[1:], own)
        grown.rewire(0.4)
        return grown

    assert_as_one(in_processes(after, resumed), whole[0])
    assert_as_one(whole, moved(Alone()))
