"""The benchmark's sparse controls have as many weights as they say, and learn with these."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.models import QUIET

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import controls

    yield controls
    for name in ("controls", "networks"):
        sys.modules.pop(name, None)


class Model(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(net: nn.Module, epochs: int, *, rate: float = 1.0, callbacks: tuple[L.Callback, ...] = ()) -> None:
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 3] > 0).long()), 8)
    L.Trainer(callbacks=[*callbacks], max_epochs=epochs, **QUIET).fit(Model(net), data)


@pytest.mark.parametrize("kind", ["sparsely trained", "pruned"])
def test_sparse_networks_have_as_many_weights_as_they_may(controls: Any, kind: str) -> None:
    room = controls.Room(inputs=20, outputs=2, epochs=10, parameters=200)
    _, make = next(controls.CONTROLS[kind](room))
    net = make(fit)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    left = sum(int((layer.weight != 0).sum()) + layer.bias.numel() for layer in layers)
    assert left <= controls.size(net) == 200
    assert left > 190  # one that just came is zero
    assert controls.bytes_of(net) < 4 * 200 + 2 * 200


def test_sparse_training_moves_weights_and_keeps_their_number(controls: Any) -> None:
    torch.manual_seed(0)
    room = controls.Room(inputs=20, outputs=2, epochs=20, parameters=200)
    ((_, make),) = controls.CONTROLS["sparsely trained"](room)
    before: list[Tensor] = []

    def watched(net: nn.Module, epochs: int, **given: Any) -> None:
        before.append(net[0].weight_mask.clone())
        fit(net, epochs, **given)

    net = make(watched)
    mask = net[0].weight_mask
    assert int(mask.sum()) == int(before[0].sum())
    assert int((mask != before[0]).sum()) > 10
