"""Other ways to train a few parameters of a frozen encoder: what dendrites stand beside."""

from __future__ import annotations

from collections.abc import Callable

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


def lora(layers: nn.ModuleList, rank: int = 1) -> None:
    """LoRA (arXiv:2106.09685) on every Linear, by peft; its output is scaled by two."""
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), layers)


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


RIVALS: dict[str, Callable[[nn.ModuleList], None]] = {
    "head alone": head,
    "BitFit": biases,
    "LoRA, rank 1": lora,
    "bottleneck, 4 wide": bottleneck,
    "2 largest weights a neuron": largest_weights,
    "everything": everything,
}
