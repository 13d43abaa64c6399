"""Networks that could do as well: sparse ones have as many weights as they say, keep them so, and learn with these."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback
from pl_dendrites.controls import (
    Rewire,
    keep_largest,
    keep_some,
    masks_of,
    parameters_left,
    pruned,
    saved_bytes,
    sparse,
)
from pl_dendrites.core import Soma
from tests.models import QUIET, classifier, train

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import controls

    yield controls
    for name in ("controls", "networks"):
        sys.modules.pop(name, None)


class Model(L.LightningModule):
    def __init__(self, net: nn.Module, optimizer: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters()) if self.optimizer else torch.optim.Adam(self.parameters(), lr=0.01)


def fit(
    net: nn.Module,
    epochs: int,
    *,
    rate: float = 1.0,
    callbacks: tuple[L.Callback, ...] = (),
    optimizer: Any = None,
    batch: int = 8,
) -> None:
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 3] > 0).long()), batch)
    L.Trainer(callbacks=[*callbacks], max_epochs=epochs, **QUIET).fit(Model(net, optimizer), data)


def mlp(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 2))


def nonzero(net: nn.Module) -> int:
    return sum(int((p != 0).sum()) for p in net.parameters())


class Noise(torch.optim.SGD):
    """As optimizers that turn gradients do, it moves weights whose gradient is zero."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return loss


OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "noise": lambda parameters: Noise(parameters, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stages", [pruned, sparse])
def test_a_network_has_as_many_parameters_as_it_is_told_from_then_on(stages: Any, optimizer: Any) -> None:
    net, epochs = mlp(), []
    for stage in stages(net, 234, 10):
        epochs.append(stage.epochs)
        fit(net, stage.epochs, callbacks=stage.callbacks, optimizer=optimizer)
    assert sum(epochs) == 10
    assert parameters_left(net) == nonzero(net) == 234


@pytest.mark.parametrize("epochs", [1, 2, 5, 13])
def test_pruning_ends_with_a_fit_of_what_is_left(epochs: int) -> None:
    net = mlp()
    fits = [(stage.epochs, parameters_left(net)) for stage in pruned(net, 100, epochs)]
    assert sum(length for length, _ in fits) == epochs
    assert all(length > 0 for length, _ in fits)
    assert fits[-1][1] == 100
    assert [size for _, size in fits] == sorted({size for _, size in fits}, reverse=True)


def test_what_is_left_are_the_weights_that_torch_would_leave() -> None:
    net, other = mlp(), mlp()
    layers = [(other[0], "weight"), (other[2], "weight")]
    whole = sum(layer.weight.numel() for layer, _ in layers)
    for left in (300, 100):  # once more, of those that are left
        keep_largest(net, ["0.weight", "2.weight"], left)
        now = sum(int((layer.weight != 0).sum()) for layer, _ in layers)
        assert now in (whole, 300)
        prune.global_unstructured(layers, prune.L1Unstructured, amount=now - left)
        assert all(torch.equal(net.get_submodule(name).weight, other.get_submodule(name).weight) for name in "02")


def test_sparse_training_finds_the_input_that_tells() -> None:
    net = nn.Sequential(nn.Linear(20, 2))
    keep_largest(net, ["0.weight"], 4)
    masks_of(net)["0.weight"].zero_()[:, 8:10] = True
    fit(net, 60, callbacks=(Rewire(60),), optimizer=OPTIMIZERS["momentum"], batch=64)
    mask = masks_of(net)["0.weight"]
    assert mask[:, 3].all()
    assert int(mask.sum()) == 4


def test_the_weakest_weights_leave_and_those_with_the_largest_gradient_begin_at_zero_without_a_past() -> None:
    class Watch(Rewire):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weight, mask = pl_module.net[0].weight, masks_of(pl_module)["net.0.weight"]
            before, strength, gain = mask.clone(), weight.detach().abs(), weight.grad.abs()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            left, came = before & ~mask, mask & ~before
            if not left.any():
                return
            moves.append(int(left.sum()))
            assert came.sum() == left.sum()
            assert strength[left].max() < strength[before & mask].min()
            assert gain[came].min() >= gain[~before & ~mask].max()
            assert not weight.grad[came | ~mask].any()  # no moment knows them
            state = optimizer.state[weight]
            for value in (weight, state["exp_avg"], state["exp_avg_sq"]):
                assert not value[left | came].any()
                assert value[before & mask].all()

    moves: list[int] = []
    net = mlp()
    for _ in sparse(net, 234, 8):
        fit(net, 8, callbacks=(Watch(8),))
    # Of 64 steps the fifth, the fifteenth and so on, for epochs are short; none in the last quarter: a falling share.
    assert len(moves) == 5
    assert moves == sorted(moves, reverse=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gru = nn.MultiheadAttention(10, 2, batch_first=True), nn.GRU(10, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (2, 10))
        return self.head(self.gru(self.attention(x, x, x)[0])[0][:, -1])


@pytest.mark.parametrize("stages", [pruned, sparse])
def test_layers_that_hand_on_their_weights_are_sparse_too(stages: Any) -> None:
    net = Attention()
    for stage in stages(net, 250, 7):
        fit(net, stage.epochs, callbacks=stage.callbacks)
    assert parameters_left(net) == 250
    assert nonzero(net) <= 250
    left = {name: int(mask.sum()) for name, mask in masks_of(net).items()}
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "gru.weight_hh_l0"} < set(left)
    assert all(count > 0 for name, count in left.items() if stages is sparse)


def test_shares_of_layers_are_those_of_the_sum_of_their_dimensions() -> None:
    net = nn.ModuleList([nn.Linear(100, 100), nn.Linear(100, 20), nn.Linear(3, 2), nn.Conv2d(4, 8, 3)])
    keep_some(net, [f"{i}.weight" for i in range(4)], 700)
    left = [int(mask.sum()) for mask in masks_of(net).values()]
    assert sum(left) == 700
    assert left[2] == 6  # all of it, for the others are larger: 694 are left for dimensions of 200, 120 and 18
    assert left[0] == pytest.approx(694 * 200 / 338, abs=1)
    assert left[3] == pytest.approx(694 * 18 / 338, abs=1)


def test_what_cannot_be_sparse_is_refused() -> None:
    for parameters in (34, 739):  # biases alone; more than there are
        with pytest.raises(
            ValueError, match=f"of 738 parameters, 704 of them weights .* cannot have {parameters} left"
        ):
            next(sparse(mlp(), parameters, 1))
    frozen = mlp()
    frozen[0].weight.requires_grad_(False)
    next(sparse(frozen, 700, 1))
    assert list(masks_of(frozen)) == ["2.weight"]


def test_bytes_are_those_of_values_and_of_the_smallest_form_of_places() -> None:
    layer = nn.Linear(300, 4, bias=False)
    assert saved_bytes(layer) == 4 * 1200
    keep_largest(layer, ["weight"], 10)
    rows, bits = 2 * (10 + 4), math.ceil(1200 / 8)
    assert saved_bytes(layer) == 40 + rows
    keep_largest(layer, ["weight"], 9)
    assert saved_bytes(layer) == 36 + rows - 2
    dense = nn.Linear(300, 4, bias=False)
    keep_largest(dense, ["weight"], 600)
    assert saved_bytes(dense) == 2400 + bits
    tied = nn.ModuleList([layer, nn.Linear(300, 4, bias=False)])
    tied[1].weight = layer.weight
    assert saved_bytes(tied) == saved_bytes(layer)


def test_bytes_of_dendrites_count_the_places_of_their_inputs() -> None:
    model = classifier()
    model.net = Soma(4, 2)
    train(model, DendriteCallback("val_loss", base_epochs=2, max_parameters=40, sets=1, max_tries=5, verbose=False))
    saved = model.state_dict()
    values = sum(value.numel() for value in saved.values() if value.is_floating_point())
    field, code = saved["net.dendrites.0.field"], saved["net.dendrites.0.code"]
    assert parameters_left(model) == values
    assert field.shape == (5, 4)
    assert saved_bytes(model) == 4 * values + 5 + len(code)  # a bit for each of four inputs is less than their indices


@pytest.mark.parametrize("kind", ["sparsely trained", "pruned"])
def test_the_benchmark_has_networks_of_the_size_that_it_says(controls: Any, kind: str) -> None:
    room = controls.Room(inputs=20, outputs=2, epochs=10, parameters=200)
    _, make = next(controls.CONTROLS[kind](room))
    net = make(fit)
    assert parameters_left(net) == 200
    assert 190 < nonzero(net) <= 200
    assert saved_bytes(net) < 4 * 200 + 2 * 200
