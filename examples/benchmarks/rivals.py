"""Other ways to train a few parameters of a frozen encoder: what dendrites stand beside."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def head(layers: nn.ModuleList) -> None:
    """Nothing of the encoder."""


def biases(layers: nn.ModuleList) -> None:
    """BitFit (arXiv:2106.10199): all biases, those of normalisations too."""
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def everything(layers: nn.ModuleList) -> None:
    """Full fine-tuning."""
    layers.requires_grad_(True)


def lora(layers: nn.ModuleList, rank: int = 1, ends: tuple[str, ...] = ("",)) -> None:
    """LoRA (arXiv:2106.09685), by peft, on every Linear and convolution without groups; its output is scaled by two.

    Args:
        layers: where they are.
        rank: of each.
        ends: with one of them ends the name of a layer that gets it.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in layers.named_modules() if name.endswith(ends) and _is_plain(module)]
    whole = "|".join(map(re.escape, names))  # of a list it would take names that end alike
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=whole), layers)


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


class Bottleneck(nn.Module):
    """An adapter (arXiv:1902.00751) behind a Linear: down, GELU, up, added; the way up begins at zero."""

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.out_features, width), nn.Linear(width, layer.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out + self.up(F.gelu(self.down(out)))


def bottleneck(layers: nn.ModuleList, width: int = 4) -> None:
    """Two adapters a layer, behind attention and behind the last Linear."""
    for layer in layers:
        layer.attention.output.dense = Bottleneck(layer.attention.output.dense, width)
        layer.output.dense = Bottleneck(layer.output.dense, width)


class LargestWeights(nn.Module):
    """A Linear with a difference for the largest weights of each neuron, as in NeuroAda (arXiv:2510.18940)."""

    def __init__(self, layer: nn.Linear, each: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("places", layer.weight.abs().topk(each, 1).indices)
        self.difference = nn.Parameter(torch.zeros(layer.out_features, each))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.scatter_add(1, self.places, self.difference)
        return F.linear(x, weight, self.layer.bias)


def largest_weights(layers: nn.ModuleList, each: int = 2) -> None:
    """On every Linear."""
    for module in [module for module in layers.modules() if not isinstance(module, LargestWeights)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LargestWeights(child, each))
