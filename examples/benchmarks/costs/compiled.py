"""What does ``torch.compile`` gain, without dendrites and with them?"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from costs.networks import Networks, grown
from costs.steps import Step, ratio, trained, training, turns


@dataclass(frozen=True)
class Gain:
    """A training step of a network, and how many times as fast it is when compiled."""

    network: str
    dendrites: int
    milliseconds: float
    compiled: float
    gain: float


def measure(networks: Networks, name: str, repeats: int, device: str) -> list[Gain]:
    make, shape = networks[name]
    x = torch.randn(shape, device=device)
    steps: dict[tuple[int, bool], Step] = {}
    for dendrites in (0, 3):
        for compiled in (False, True):
            model = grown(make, dendrites, device=device).model
            steps[dendrites, compiled] = training(torch.compile(model) if compiled else model, x, trained(model))
    seconds = turns(steps, repeats)
    return [
        Gain(
            *(name, dendrites, 1e3 * statistics.median(seconds[dendrites, False])),
            1e3 * statistics.median(seconds[dendrites, True]),
            ratio(seconds[dendrites, False], seconds[dendrites, True]),
        )
        for dendrites in (0, 3)
    ]
