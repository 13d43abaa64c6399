"""The networks that are measured, and how they grow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pl_dendrites import DendriticNetwork, attach

Make = Callable[[], nn.Module]


def mlp(width: int, layers: int = 3) -> nn.Module:
    linear = [nn.Linear(width, width) for _ in range(layers)]
    return nn.Sequential(*[module for layer in linear for module in (layer, nn.ReLU())][:-1])


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm_two(self.two(self.norm_one(self.one(x)).relu()))).relu()


def resnet() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *(Residual(64) for _ in range(3)), *head)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "mlp-letters": (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 26)), (256, 16)),
    "mlp-512": (lambda: mlp(512), (256, 512)),
    "mlp-2048": (lambda: mlp(2048), (256, 2048)),
    "resnet": (resnet, (16, 3, 16, 16)),
    "transformer": (transformer, (8, 32, 256)),
}


def grown(make: Make, dendrites: int, live: bool = False) -> DendriticNetwork:
    torch.manual_seed(0)
    network = attach(make(), activation="gelu" if live else "tanh", live=live)  # as the callback does
    for _ in range(dendrites):
        network.grow(network.can_grow())
    return network
