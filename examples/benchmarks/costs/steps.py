"""What does a step cost? Each variant beside the plain network's step, and beside the limit of the matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from costs.networks import Make, Networks, grown
from pl_dendrites.training.correlation_phase import adam

Step = Callable[[], object]


class Key(NamedTuple):
    """A variant of a network's step."""

    step: str
    dendrites: int = 0
    pool: int = 0


PLAIN, PLAIN_INFERENCE = Key("plain"), Key("plain inference")


@dataclass(frozen=True)
class Row:
    """A variant: times the plain network's step, and the limit."""

    network: str
    step: str
    dendrites: int
    pool: int
    ratio: float
    limit: float


def turns(steps: Mapping[Hashable, Step], repeats: int, least: float = 0.05) -> dict[Any, list[float]]:
    """Seconds of each step, one figure a repeat. All take turns, and each turn lasts at least so many seconds."""
    counts = {}
    for key, step in steps.items():
        timed(step, 1)
        counts[key] = max(1, round(least / timed(step, 1)))
    seconds: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(repeats):
        for key, step in steps.items():
            seconds[key].append(timed(step, counts[key]) / counts[key])
    return seconds


def timed(step: Step, times: int) -> float:
    """Seconds of so many steps, until a GPU has done its part too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(seconds: list[float], reference: list[float]) -> float:
    """The median of the ratios, turn by turn."""
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training(model: nn.Module, x: Tensor, parameters: list[nn.Parameter], optimizer: Any = torch.optim.Adam) -> Step:
    made = optimizer(parameters)

    def step() -> None:
        made.zero_grad()
        with mixed(x):
            loss = model(x).square().mean()
        loss.backward()
        made.step()

    return step


def inference(model: nn.Module, x: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad(), mixed(x):
            model(x)

    return step


def mixed(x: Tensor) -> torch.autocast:
    """On a GPU networks compute in bfloat16."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def step_of(key: Key, make: Make, x: Tensor) -> Step:
    """The step of one variant, on a network of its own."""
    if key in (PLAIN, PLAIN_INFERENCE):
        torch.manual_seed(0)
        plain = make().to(x.device)
        return training(plain, x, trained(plain)) if key == PLAIN else inference(plain, x)
    network = grown(make, key.dendrites, live=key.step == "gradient", device=x.device)
    if key.step == "inference":
        return inference(network.model, x)
    if key.step == "correlation":
        network.start_candidates(key.pool)
        return training(network.model, x, network.candidate_parameters(), adam)
    return training(network.model, x, trained(network.model))


def limit(key: Key) -> float:
    """With forward, input gradient and weight gradient of a layer costing 1 each, times a plain step."""
    k = key.dendrites
    return {
        "base": (3 + k) / 3,
        "correlation": (2 + k + 2 * key.pool) / 3,
        "gradient": 1.0 + k,
        "inference": 1.0 + k,
    }[key.step]


VARIANTS = (
    *(Key(step, k) for k in range(6) for step in ("base", "inference")),
    *(Key("correlation", k, pool) for k, pool in ((0, 1), (0, 4), (0, 8), (3, 4))),
    *(Key("gradient", k) for k in (1, 2, 3)),
)


def measure(networks: Networks, name: str, repeats: int, device: str) -> list[Row]:
    make, shape = networks[name]
    x = torch.randn(shape, device=device)
    seconds = turns({key: step_of(key, make, x) for key in (PLAIN, PLAIN_INFERENCE, *VARIANTS)}, repeats)
    rows = []
    for key in VARIANTS:
        reference = PLAIN_INFERENCE if key.step == "inference" else PLAIN
        rows.append(Row(name, *key, ratio(seconds[key], seconds[reference]), limit(key)))
    return rows
