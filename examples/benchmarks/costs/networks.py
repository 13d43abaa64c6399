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
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.past: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.past = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.past(x) + self.norm_two(self.two(self.norm_one(self.one(x)).relu()))).relu()


def resnet() -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *(Residual(64, 64) for _ in range(3)), *head)


def resnet18() -> nn.Module:
    """Of He et al. (arXiv:1512.03385), for 1,000 classes."""
    begin = (nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    blocks = [block for a, b, stride in widths for block in (Residual(a, b, stride), Residual(b, b))]
    return nn.Sequential(*begin, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def transformer(width: int = 256, heads: int = 4, layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


Networks = dict[str, tuple[Make, tuple[int, ...]]]
NETWORKS: Networks = {
    "mlp-letters": (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 26)), (256, 16)),
    "mlp-512": (lambda: mlp(512), (256, 512)),
    "mlp-2048": (lambda: mlp(2048), (256, 2048)),
    "resnet": (resnet, (16, 3, 16, 16)),
    "transformer": (transformer, (8, 32, 256)),
}
# For a GPU, in mixed precision.
GPU_NETWORKS: Networks = {
    "mlp-2048": (lambda: mlp(2048), (8192, 2048)),
    "resnet-18": (resnet18, (128, 3, 224, 224)),
    "transformer-12": (lambda: transformer(768, 12, 12), (32, 256, 768)),
}


def grown(make: Make, dendrites: int, live: bool = False, device: torch.device | str = "cpu") -> DendriticNetwork:
    torch.manual_seed(0)
    network = attach(make().to(device), activation="gelu" if live else "tanh", live=live)  # as the callback does
    for _ in range(dendrites):
        network.grow(network.can_grow())
    return network
