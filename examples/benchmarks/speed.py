"""What do dendrites cost in time? Each step beside the plain network's, and beside the limit of the matrix products.

    python examples/benchmarks/speed.py [--networks mlp-512 ...] [--repeats 7] [--out DIR]

All variants of a network take turns, so that what else the machine does meets all of them; shown is the median of the
ratios to the plain step of the same turn. With forward, input gradient and weight gradient of a layer costing 1 each, a
plain step costs 3, and k dendrites with a pool of P at least

    base step (3 + k) / 3,   correlation step (2 + k + 2 P) / 3,   gradient learning 1 + k,   inference 1 + k

times as much. One thread, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from pl_dendrites import DendriteCallback, DendriticNetwork, attach
from pl_dendrites.correlation import adam


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )


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


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp-letters": (lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 26)), (256, 16)),
    "mlp-512": (lambda: mlp(512), (256, 512)),
    "mlp-2048": (lambda: mlp(2048), (256, 2048)),
    "resnet": (resnet, (16, 3, 16, 16)),
    "transformer": (transformer, (8, 32, 256)),
}


@dataclass(frozen=True)
class Row:
    """A variant: times the plain network's step, and the limit."""

    network: str
    step: str
    dendrites: int
    pool: int
    ratio: float
    limit: float


def grown(make: Callable[[], nn.Module], dendrites: int, live: bool = False) -> DendriticNetwork:
    torch.manual_seed(0)
    network = attach(make(), live=live)
    for _ in range(dendrites):
        network.grow(network.can_grow())
    return network


def training(
    model: nn.Module, x: Tensor, parameters: list[nn.Parameter], make_optimizer: Any = torch.optim.Adam
) -> Callable[[], None]:
    optimizer = make_optimizer(parameters)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            model(x)

    return step


def variants(make: Callable[[], nn.Module], x: Tensor) -> dict[tuple[str, int, int], tuple[Callable[[], None], float]]:
    """The step of each variant by its name, dendrites and pool, with its limit."""
    steps: dict[tuple[str, int, int], tuple[Callable[[], None], float]] = {}
    torch.manual_seed(0)
    plain = make()
    steps["plain", 0, 0] = training(plain, x, list(plain.parameters())), 1.0
    steps["plain inference", 0, 0] = inference(plain, x), 1.0
    for k in range(6):
        model = grown(make, k).model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        steps["base", k, 0] = training(model, x, trained), (3 + k) / 3
        steps["inference", k, 0] = inference(model, x), 1.0 + k
    for k, pool in ((0, 1), (0, 4), (0, 8), (3, 4)):
        network = grown(make, k)
        network.start_candidates(pool)
        steps["correlation", k, pool] = (
            training(network.model, x, network.candidate_parameters(), adam),
            (2 + k + 2 * pool) / 3,
        )
    for k in (1, 2, 3):
        model = grown(make, k, live=True).model
        steps["gradient", k, 0] = training(model, x, [p for p in model.parameters() if p.requires_grad]), 1.0 + k
    return steps


def measure(name: str, repeats: int) -> list[Row]:
    make, shape = NETWORKS[name]
    steps = variants(make, torch.randn(shape))
    for step, _ in steps.values():
        step()
    start = time.perf_counter()
    steps["plain", 0, 0][0]()
    count = max(1, round(0.05 / (time.perf_counter() - start)))
    ratios: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(repeats):
        seconds = {}
        for key, (step, _) in steps.items():
            start = time.perf_counter()
            for _ in range(count):
                step()
            seconds[key] = time.perf_counter() - start
        for key, value in seconds.items():
            ratios[key].append(value / seconds["plain inference" if key[0] == "inference" else "plain", 0, 0])
    return [
        Row(name, key[0], key[1], key[2], statistics.median(ratios[key]), limit)
        for key, (_, limit) in steps.items()
        if not key[0].startswith("plain")
    ]


def once(repeats: int) -> dict[str, float]:
    """Times of what happens once: seconds, and microseconds a step for the idle callback."""
    attaching, switching = [], []
    for _ in range(repeats):
        deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(1000)))
        start = time.perf_counter()
        attach(deep)
        attaching.append(time.perf_counter() - start)
        network = grown(lambda: mlp(2048), 2)
        network.start_candidates(4)
        network.model(torch.randn(64, 2048)).square().mean().backward()
        start = time.perf_counter()
        network.integrate()
        switching.append(time.perf_counter() - start)
    idle = [fit(DendriteCallback("val_loss", patience=10**6, verbose=False)) - fit(None) for _ in range(repeats)]
    return {
        "attach to 1,000 layers, s": statistics.median(attaching),
        "integrate a third set, MLP 2048, s": statistics.median(switching),
        "idle callback, microseconds a step": statistics.median(idle),
    }


class Tiny(BoringModel):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))


def fit(callback: L.Callback | None, steps: int = 2000) -> float:
    """Microseconds of a training step of a network too small to matter."""
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=1,
        callbacks=[] if callback is None else [callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.randn(steps, 1, 32)
    start = time.perf_counter()
    trainer.fit(Tiny(), data, data[:1])
    return 1e6 * (time.perf_counter() - start) / steps


def table(rows: list[Row], times: dict[str, float]) -> str:
    lines = [
        "| network | step | dendrites | pool | times plain | limit | over the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.network} | {row.step} | {row.dendrites} | {row.pool or ''} | {row.ratio:.2f} | {row.limit:.2f} |"
            f" {row.ratio / row.limit:.2f} |"
        )
    return "\n".join([*lines, "", *(f"- {name}: {value:.3g}" for name, value in times.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = [row for name in options.networks for row in measure(name, options.repeats)]
    times = once(min(options.repeats, 5))
    print(table(rows, times))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "speed.md").write_text(table(rows, times) + "\n")
        (options.out / "speed.json").write_text(json.dumps({"rows": [asdict(row) for row in rows], "once": times}))


if __name__ == "__main__":
    main()
