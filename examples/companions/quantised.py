"""Quantisation-aware training (QAT) of a network that grows: prepared before growth, after it, or both?

    python examples/companions/quantised.py --seeds 3

Weights have three bits, by rows; gradients go straight through. Prepared before growth, what there is learns to live
with three bits, and dendrites are rounded at the end. Prepared after growth, `fuse` first makes the network one of
PyTorch's own layers, whose weights are those of layers and dendrites, and all of them learn on with three bits. All
rows but those that are never trained after growth have as many epochs. The control is a plain network of as many
parameters that has three bits in every epoch. `torch.ao.quantization.prepare_qat` has its place after `fuse` as well.
"""

from __future__ import annotations

import math

import lightning as L
from common import Classifier, Row, Settings, accuracy, fit, growing, main, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pl_dendrites import fuse
from pl_dendrites.controls import closest_width, parameters_left

HIDDEN, BITS = 8, 3


class Rounded(nn.Module):
    """A weight as so many bits hold it, with a scale for each row; the gradient is that of the weight itself."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.most = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / self.most
        return weight - weight.detach() + (weight.detach() / scale).round() * scale


def prepare(net: nn.Module, bits: int = BITS) -> nn.Module:
    """Give each Linear a rounded weight; values are what they were, as long as nothing reads them."""
    for layer in list(net.modules()):
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", Rounded(bits))
    return net


def stored_bytes(net: nn.Module, bits: int = BITS) -> int:
    """What matrices take in so many bits, with a bit for each place where some are zero, and all else in 32."""
    total = 0.0
    for name, values in net.named_parameters():
        left = int(values.count_nonzero())
        if not name.endswith(("weight", "weight.original")):
            total += 4 * values.numel()
            continue
        places = values.numel() if left < values.numel() else 0
        scales = 4 * len(values) if bits < 32 else 0
        total += (left * bits + places) / 8 + scales
    return math.ceil(total)


def trained(seed: int, settings: Settings, before: bool, after: bool) -> tuple[Classifier, int]:
    """A grown and fused network with rounded weights, and the epochs of all its fits."""
    L.seed_everything(seed, verbose=False)
    model = Classifier(prepare(mlp(HIDDEN)) if before else mlp(HIDDEN))
    more = settings.epochs if after else 0
    epochs = fit(model, growing(settings))
    fused = Classifier(prepare(fuse(model.net)), rate=0.003)
    return fused, epochs + (fit(fused, epochs=more) if more else 0)


def compare(seed: int, settings: Settings) -> dict[str, Row]:
    rows = {}
    orders = {"before growth": (True, False), "after growth": (False, True), "before and after": (True, True)}
    for name, (before, after) in {"never: rounded at the end": (False, False), **orders}.items():
        model, epochs = trained(seed, settings, before, after)
        rows[f"QAT {name}"] = Row(parameters_left(model.net), epochs, accuracy(model))

    L.seed_everything(seed, verbose=False)
    wider = closest_width(lambda hidden: 75 * hidden + 10, rows["QAT before and after"].size)
    control = Classifier(prepare(mlp(wider)))
    epochs = fit(control, epochs=rows["QAT before and after"].epochs)
    rows["control: plain, QAT, equal parameters"] = Row(parameters_left(control.net), epochs, accuracy(control))
    return rows


if __name__ == "__main__":
    main(compare, __doc__)
