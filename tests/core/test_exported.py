"""Networks with shared dendrites as programs that PyTorch runs by itself."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pl_dendrites.core import Soma, attach, restore_structure
from pl_dendrites.core.shared import attach_shared
from pl_dendrites.core.unit_set import UnitSet
from tests.core.conftest import DEVICE
from tests.core.helpers import TORCH

pytestmark = [
    pytest.mark.skipif(DEVICE is not None, reason="the mode that makes tensors elsewhere is not exported"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of comparisons of sizes, which stay as they are
]


@dataclass
class Case:
    """A network, what it is called with, and what its shared dendrites are like."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    around: str = ""
    like: dict[str, Any] = field(default_factory=dict)

    def inputs(self, examples: int) -> Tensor:
        return torch.randn(examples, *self.shape)

    def grown(self) -> nn.Module:
        model, x = self.make(), self.inputs(32)
        network = attach_shared(model, (self.around,))
        model(x)
        network.set_next(UnitSet(units=4, **{"field": 3, **self.like}))
        network.start_candidates(pool=4)
        (model(x) - torch.randn(6)).square().sum().backward()
        network.integrate()
        for _, block in network.blocks:
            nn.init.normal_(block.out)
        assert network.units == 4
        return model.eval()

    def fresh(self, state: dict[str, Tensor], assign: bool = False) -> nn.Module:
        """Another one from what was saved, which was never called."""
        model = self.make()
        restore_structure(model, state)
        model.load_state_dict(state, assign=assign)
        return model.eval()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6))


CASES = {
    "feeds": Case(lambda: Soma(12, 6), (12,), like={"feeds": 2}),
    "fetched": Case(lambda: Soma(150, 6), (150,), like={"feeds": 2}),
    "base": Case(normed, (12,)),
    "head": Case(normed, (12,), "3", {"feeds": 2}),
    "frozen": Case(normed, (12,), like={"live": False, "activation": "tanh"}),
    "images": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 6)), (1, 6, 6)),
    "tokens": Case(lambda: nn.Sequential(nn.Linear(12, 6), nn.LayerNorm(6)), (7, 12)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def exported(model: nn.Module, x: Tensor, free: tuple[int, ...] = (0,)) -> nn.Module:
    """The program for any number of examples, or any size along other dimensions too; once on a disk."""
    file = io.BytesIO()
    sizes = {dim: torch.export.Dim(f"size_{dim}") for dim in free}
    program = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@every_case
def test_a_program_takes_any_number_of_examples(case: Case) -> None:
    model = case.grown()
    program = exported(case.fresh(model.state_dict()), case.inputs(8))
    for examples in (8, 5, 1):
        x = case.inputs(examples)
        assert_close(program(x), model(x))


def test_a_program_takes_any_number_of_tokens() -> None:
    model, x = CASES["tokens"].grown(), torch.randn(3, 9, 12)
    assert_close(exported(model, torch.randn(2, 5, 12), (0, 1))(x), model(x))


@every_case
def test_a_trace_takes_any_number_of_examples(case: Case) -> None:
    model = case.grown()
    with torch.no_grad():  # as the second trace is with which PyTorch compares the first
        traced = torch.jit.trace(case.fresh(model.state_dict()), case.inputs(8))
    for examples in (8, 5, 1):
        x = case.inputs(examples)
        assert_close(traced(x), model(x))


@every_case
@pytest.mark.skipif(TORCH < (2, 13), reason="README: attach before the first compiled pass")
def test_a_network_and_its_shared_dendrites_are_one_graph(case: Case) -> None:
    torch.compiler.reset()
    model, x = case.grown(), case.inputs(8)
    fresh = case.fresh(model.state_dict())

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> Any:
        return fresh(x)  # hooks of what is itself compiled are outside of its graph

    assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["feeds", "fetched"])
def test_a_copy_and_a_file_with_indices_in_16_bits_make_the_same_program(name: str) -> None:
    case = CASES[name]
    model, x = case.grown(), case.inputs(8)
    narrow = {k: v if v.is_floating_point() else v.to(torch.int16) for k, v in model.state_dict().items()}
    for other in (copy.deepcopy(model), case.fresh(narrow, assign=True)):
        assert_close(exported(other, x)(x), model(x))


def test_a_trace_of_copies_of_a_module_is_the_same_each_time() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)))

    model, x = make(), torch.randn(8, 4)
    network = attach(model, targets=["0"], live=True)
    model(x)
    network.grow(["0"])
    nn.init.ones_(model[0].dendrites[0].weights[0])
    fresh = make()
    restore_structure(fresh, model.state_dict())
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_close(torch.jit.trace(fresh, x)(x), model(x))
