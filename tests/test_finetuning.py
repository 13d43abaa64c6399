"""Fits that thaw layers come before those that grow dendrites, or after them: what the refusal of both at once says."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn

from pl_dendrites import detach
from tests.models import Classifier, bits, quick, same_bits, train


class Finetuned(Classifier):
    """A backbone that comes frozen, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.net = nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


def thawed() -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05)


def test_first_it_is_finetuned_then_it_grows() -> None:
    model, dendrites = Finetuned(), quick(targets="frozen", learning="hybrid", max_dendrites=1)
    train(model, thawed(), max_epochs=3)
    before = bits(model.requires_grad_(False))
    train(model, dendrites)
    assert dendrites.best_model_score < dendrites.history[0]["score"]
    detach(model)
    assert same_bits(bits(model), before)


def test_first_it_grows_then_it_is_finetuned_with_its_dendrites() -> None:
    model, dendrites = Finetuned(), quick(targets=["backbone"], learning="hybrid", max_dendrites=1)
    train(model, dendrites)
    assert dendrites.num_dendrites == 1
    before = copy.deepcopy(model)
    train(model, thawed(), max_epochs=3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == {name for name, _ in model.named_parameters() if not name.endswith(".links")}
