"""What mirrors a network without being trained grows with it: averages of weights, target networks, teachers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pl_dendrites import attach
from pl_dendrites.core.mirrors import find_mirrors
from tests.models import Classifier, bits, loaders, quick, same_bits, train


class Mirrored(Classifier):
    """Validated by its mirror, which follows in one of the ways that people write."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        if way == "AveragedModel":
            self.teacher = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        else:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.way == "AveragedModel":
            self.teacher.update_parameters(self.net)
        elif self.way == "a copy now and then":
            if self.global_step % 3 == 0:
                self.teacher.load_state_dict(self.net.state_dict())
        elif self.way == "by name":
            own = dict(self.net.named_parameters())
            with torch.no_grad():
                for name, parameter in self.teacher.named_parameters():
                    parameter.lerp_(own[name], 0.2)
        else:
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    mine.data = mine.data * 0.8 + theirs.data * 0.2

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.teacher(batch[0]), batch[1]))
        self.log("falls", -float(self.global_step))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.02)


WAYS = ["in order", "by name", "a copy now and then", "AveragedModel"]


def mirrored(way: str) -> Mirrored:
    torch.manual_seed(0)
    return Mirrored(way)


def inner(model: Mirrored) -> nn.Module:
    return model.teacher.module if isinstance(model.teacher, AveragedModel) else model.teacher


@pytest.mark.parametrize("learning", ["correlation", "gradient", "hybrid"])
@pytest.mark.parametrize("way", WAYS)
def test_a_mirror_has_the_dendrites_of_what_it_mirrors(way: str, learning: str) -> None:
    model, dendrites = mirrored(way), quick("falls", learning=learning)
    train(model, dendrites)
    assert dendrites.num_dendrites > 0
    assert dendrites.network.targets == ["net.0", "net.2"]
    teacher = inner(model)
    own, others = dict(model.net.named_parameters()), dict(teacher.named_parameters())
    assert [(name, p.shape) for name, p in own.items()] == [(name, p.shape) for name, p in others.items()]
    for name, parameter in others.items():
        assert way == "AveragedModel" or not parameter.requires_grad
        if ".weights." in name:
            assert parameter.abs().max() > 0  # the average of output weights has begun to follow
        if learning == "correlation" and (".nodes." in name or ".links" in name):
            torch.testing.assert_close(parameter, own[name])  # frozen here and there
    held = {id(p) for optimizer in model.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
    assert not any(id(parameter) in held for parameter in others.values())


@pytest.mark.parametrize("way", ["in order", "AveragedModel"])
def test_a_resumed_fit_has_its_mirrors(way: str, tmp_path: Path) -> None:
    """Also from a checkpoint before any growth, when the mirror is no copy any more."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, told = mirrored(way), quick(max_dendrites=1)
    train(whole, told, saver, enable_checkpointing=True)
    for epoch in (0, 2, 3, 4):
        resumed, again = mirrored(way), quick(max_dendrites=1)
        train(resumed, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.history == told.history
        assert same_bits(bits(whole), bits(resumed)), epoch


def test_a_second_fit_goes_on_with_the_mirror() -> None:
    model = mirrored("in order")
    for _ in range(2):
        dendrites = quick(max_dendrites=1, base_epochs=1, max_tries=0)
        train(model, dendrites, data=loaders())
        assert dendrites.network.mirrors == {"teacher": "net"}


def test_what_is_frozen_and_only_looks_alike_is_no_mirror() -> None:
    """Half of the blocks of a network are frozen, and all have one shape."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(4)))
    blocks[0].requires_grad_(False)
    blocks[1].requires_grad_(False)
    network = attach(blocks)
    assert network.mirrors == {}
    assert list(network.layers) == ["2.0", "3.0"]


def test_the_outermost_of_modules_that_mirror() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    model = nn.ModuleDict({"q": encoder, "head": nn.Linear(3, 2), "k": copy.deepcopy(encoder).requires_grad_(False)})
    assert find_mirrors(model, ["q.0.0", "q.1", "head"]) == {"k": "q"}


def test_two_networks_with_a_target_each() -> None:
    torch.manual_seed(0)
    critics = {f"q{i}": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for i in range(2)}
    copies = {f"target{i}": copy.deepcopy(critics[f"q{i}"]).requires_grad_(False) for i in range(2)}
    model = nn.ModuleDict(critics | copies)
    network = attach(model)
    assert network.mirrors == {"target0": "q0", "target1": "q1"}
    network.start_candidates(2)
    x = torch.randn(32, 3)
    sum(model[name](x).square().mean() for name in critics).backward()
    network.integrate()
    for i in range(2):
        model[f"target{i}"].load_state_dict(model[f"q{i}"].state_dict())
        assert torch.equal(model[f"target{i}"](x), model[f"q{i}"](x))
