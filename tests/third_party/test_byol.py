"""BYOL as lightly's own example has it: momentum networks are found, grow, and are averages by name.

Run by ``make test-byol``, which installs lightly into an environment of its own: a torchvision of another build than
torch's (PyPI's beside a torch for CPUs alone) cannot be imported, nor can Lightning beside it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_dendrites import DendriteCallback, detach, load_from_checkpoint
from tests.models import bits, quick, same_bits, train

pytestmark = pytest.mark.slow

pytest.importorskip("lightly")
from lightly.loss import NegativeCosineSimilarity  # noqa: E402
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead  # noqa: E402
from lightly.models.utils import deactivate_requires_grad, update_momentum  # noqa: E402
from lightly.utils.scheduler import cosine_schedule  # noqa: E402

PAIRS = {"backbone_momentum": "backbone", "projection_head_momentum": "projection_head"}


class BYOL(L.LightningModule):
    """The example's model on a small backbone; what it averages is checked by name."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(1)
        )
        self.projection_head = BYOLProjectionHead(16, 12, 6)
        self.prediction_head = BYOLPredictionHead(6, 12, 6)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()
        self.checked = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x)).detach()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.current_epoch, 20, 0.9, 1)
        expected = self.averages(momentum)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        now = dict(self.named_parameters())
        for name, value in expected.items():
            torch.testing.assert_close(now[name], value)
        self.checked += any("dendrites" in name for name in expected)
        one, other = batch
        loss = self.criterion(self(one), self.forward_momentum(other))
        loss = 0.5 * (loss + self.criterion(self(other), self.forward_momentum(one)))
        self.log("train_loss_ssl", loss, on_step=False, on_epoch=True)
        self.log("falls", -float(self.global_step), on_step=False, on_epoch=True)
        return loss

    def averages(self, momentum: float) -> dict[str, Tensor]:
        return {
            f"{mirror}.{name}": momentum * self.get_parameter(f"{mirror}.{name}").detach()
            + (1 - momentum) * parameter.detach()
            for mirror, source in PAIRS.items()
            for name, parameter in self.get_submodule(source).named_parameters()
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


def views() -> tuple[DataLoader]:
    """Four batches of two views each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    noise = torch.randn(2, *x.shape, generator=generator) * 0.1
    return (DataLoader(list(zip(x + noise[0], x + noise[1], strict=True)), 16),)


def grown(path: Path, *callbacks: L.Callback, **settings: Any) -> tuple[BYOL, DendriteCallback]:
    torch.manual_seed(0)
    model, dendrites = BYOL(), quick("falls", dirpath=path, **settings)
    train(model, dendrites, *callbacks, data=views(), enable_checkpointing=bool(callbacks))
    return model, dendrites


@pytest.mark.parametrize("learning", ["correlation", "hybrid"])
@pytest.mark.parametrize("mirrors", [None, PAIRS])
def test_byol_grows_for_two_cycles(mirrors: dict[str, str] | None, learning: str, tmp_path: Path) -> None:
    model, dendrites = grown(tmp_path, mirrors=mirrors, learning=learning)
    assert [record["accepted"] for record in dendrites.history if record["phase"] == "base"] == [None, True, True]
    assert dendrites.network.mirrors == PAIRS
    assert model.checked > 5
    for mirror, source in PAIRS.items():
        own, other = model.get_submodule(source), model.get_submodule(mirror)
        assert [(n, p.shape) for n, p in own.named_parameters()] == [(n, p.shape) for n, p in other.named_parameters()]
        assert any(".weights.1" in name for name, _ in other.named_parameters())
        assert not any(parameter.requires_grad for parameter in other.parameters())

    x = views()[0].dataset[0][0][None]
    teacher = model.eval().forward_momentum(x)
    assert not torch.allclose(detach(copy.deepcopy(model)).forward_momentum(x), teacher)
    again = load_from_checkpoint(BYOL, dendrites.best_model_path).eval()
    assert torch.equal(again.forward_momentum(x), teacher)
    assert torch.equal(again(x), model(x))


def test_a_resumed_byol_is_the_same(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, dendrites = grown(tmp_path, saver)
    torch.manual_seed(0)
    resumed, again = BYOL(), quick("falls")
    train(resumed, again, data=views(), ckpt_path=tmp_path / "epoch=5.ckpt")
    assert again.history == dendrites.history
    assert same_bits(bits(whole), bits(resumed))
