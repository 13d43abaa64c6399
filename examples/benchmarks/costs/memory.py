"""How much memory does a step take at its peak?

The allocator itself reports every block that it gives and takes back (``torch.profiler``, ``profile_memory``), from an
empty start to the end of a second step; the first leaves the optimizer's state. So the figures are exact, the same in
every run, and know nothing of what else the process holds. What a matrix product takes within a kernel is not in them.
On a GPU the allocator counts by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from costs.networks import Make, Networks, grown
from costs.steps import PLAIN, PLAIN_INFERENCE, Key, step_of

VARIANTS = (
    *(Key("base", k) for k in (0, 1, 3, 5)),
    *(Key("correlation", k, pool) for k, pool in ((0, 1), (0, 4), (0, 8), (3, 4))),
    Key("gradient", 3),
    Key("inference", 3),
)
_SECOND = "second step"


@dataclass(frozen=True)
class Peak:
    """A variant's peak in bytes, times the plain step's, and what a base phase needs: see :func:`needed`."""

    network: str
    step: str
    dendrites: int
    pool: int
    peak: int
    ratio: float
    needed: int | None


def peak(key: Key, make: Make, shape: tuple[int, ...], device: str) -> int:
    """The most bytes that were in use during a second step: network, input, gradients and optimizer state with it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        step = step_of(key, make, torch.randn(shape, device=device))
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = step_of(key, make, torch.randn(shape))
        step()
        with record_function(_SECOND):
            step()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == _SECOND)
    used = most = 0
    for event in events:
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used if event.start_ns() >= begin else 0)
    return most


def needed(dendrites: int, make: Make, shape: tuple[int, ...], device: str) -> int:
    """Bytes beside a plain step's: parameters, what training adds to them, and an activation for each dendrite.

    Of what is trained there are a gradient and Adam's two averages; the activation is for that of an output weight.
    """
    network = grown(make, dendrites)
    parameters = [parameter for layer in network.layers.values() for parameter in layer.parameters()]
    total = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters)

    def count(module: nn.Module, args: object, out: torch.Tensor) -> None:
        nonlocal total
        total += dendrites * out.numel() * shape[0] * (2 if device == "cuda" else out.itemsize)

    for name in network.layers:
        network.model.get_submodule(name).register_forward_hook(count)
    network.model(torch.randn(1, *shape[1:]))
    return total


def measure(networks: Networks, name: str, device: str) -> list[Peak]:
    make, shape = networks[name]
    plain = {key: peak(key, make, shape, device) for key in (PLAIN, PLAIN_INFERENCE)}
    rows = []
    for key in VARIANTS:
        own, reference = peak(key, make, shape, device), plain[PLAIN_INFERENCE if key.step == "inference" else PLAIN]
        need = reference + needed(key.dendrites, make, shape, device) if key.step == "base" else None
        rows.append(Peak(name, *key, own, own / reference, need))
    return rows
