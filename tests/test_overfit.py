"""A network that overfits is told so, and if asked for, dendrites are not even tried."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites.training.score import TrainingLoss
from tests.models import QUIET, quick


class Memory(L.LightningModule):
    """Learns labels that mean nothing by heart; how the step returns its loss is up to each."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.returns, self.automatic_optimization = returns, not returns.startswith("manual")
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"dict": {"loss": loss, "n": 3}, "manual": loss, "manual, nothing": None}.get(self.returns, loss)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def noise(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(torch.randn(32, 8, generator=generator), torch.randn(32, 1, generator=generator)), 16
    )


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("returns", ["loss", "dict", "manual", "manual, nothing"])
def test_a_network_that_learns_by_heart_is_told_so(returns: str, stop: bool) -> None:
    torch.manual_seed(0)
    dendrites = quick(base_epochs=None, patience=5, max_dendrites=1, max_tries=0, stop_on_overfit=stop)
    L.Trainer(callbacks=[dendrites], **(QUIET | {"max_epochs": 80})).fit(Memory(returns), noise(0), noise(1))
    known = returns != "manual, nothing"
    assert ("it overfits (training loss " in dendrites.history[0]["reason"]) == known
    assert {record["phase"] for record in dendrites.history} == (
        {"base"} if stop and known else {"base", "correlation"}
    )


def test_a_running_mean_goes_on_where_it_was_saved() -> None:
    whole, part = TrainingLoss(), TrainingLoss()
    losses: list[Tensor] = list(torch.rand(7, generator=torch.Generator().manual_seed(0)))
    for number, loss in enumerate(losses):
        whole.add(loss)
        part.add(loss)
        if number == 3:
            state, part = part.state_dict(), TrainingLoss()
            part.load_state_dict(state)
    assert part.take() == whole.take() == pytest.approx(float(torch.stack(losses).mean()))
    part.add(torch.tensor(float("nan")))
    assert part.take() is None
