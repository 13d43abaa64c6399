"""What do two processes tell each other? Bytes of every collective in a training step, by phase and dendrites.

    python examples/benchmarks/communication.py [--strategy ddp|fsdp2] [--network mlp|convolutions|transformer]
        [--batch 32] [--candidates 4] [--candidate-batches 1]

In single precision, gloo, on a CPU. Counted is what the first process hands over, in the mean over the steps of a
phase: its gradients to a sum, its part of what is gathered to those who gather. ``--batch`` is of one process.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback


class Transformer(nn.Module):
    """Two layers on 16 tokens of 49 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(49, 128), nn.Linear(128, 10)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.unflatten(1, (16, 49)))).mean(1))


def make_network(name: str) -> nn.Module:
    if name == "transformer":
        return Transformer()
    if name == "mlp":
        return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Classifier(L.LightningModule):
    def __init__(self, network: str = "mlp") -> None:
        super().__init__()
        self.net = make_network(network)

    def configure_model(self) -> None:
        if getattr(self, "device_mesh", None) is not None:
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("score", -self.global_step * torch.ones(()), sync_dist=True)  # every set is kept

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Collectives(TorchDispatchMode):
    """Bytes by the name of the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = str(func).partition(".")
        if space == "c10d" and not name.startswith("barrier"):
            given = args[1] if "base" in name else args[0]  # out first, where there is one
            self.bytes[name.partition(".")[0].strip("_")] += size(given)
        return func(*args, **(kwargs or {}))


def size(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(map(size, value))


class Count(L.Callback):
    """What each step of each phase handed over."""

    def __init__(self, dendrites: DendriteCallback) -> None:
        self.dendrites = dendrites
        self.steps: dict[tuple[int, str, int], list[Counter[str]]] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.collectives = Collectives()
        self.collectives.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.collectives.__exit__(None, None, None)
        phase = self.dendrites.cycle, self.dendrites.phase, self.dendrites.num_dendrites
        self.steps.setdefault(phase, []).append(self.collectives.bytes)


@rank_zero_only
def show(steps: dict[tuple[int, str, int], list[Counter[str]]]) -> None:
    base = 1.0
    for (_, phase, count), found in steps.items():
        # The first step of a base phase also copies the first process' parameters to all.
        counted = found[1:] if phase == "base" else found
        total = sum(counted, Counter[str]())
        mean = {name: size / len(counted) for name, size in sorted(total.items())}
        whole = sum(mean.values())
        base = whole if phase == "base" else base
        parts = ", ".join(f"{name} {size / 1e6:.3f} MB" for name, size in mean.items() if size > 500)
        print(f"{phase:11} phase, {count} dendrites per neuron: {whole / base:.3f} of a base step: {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--network", choices=("mlp", "convolutions", "transformer"), default="mlp")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--candidate-batches", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dendrites = DendriteCallback(
        "score",
        form="private",
        base_epochs=1,
        max_correlation_epochs=1,
        max_dendrites=2,
        candidates=options.candidates,
        candidate_batches=options.candidate_batches,
        verbose=False,
    )
    count = Count(dendrites)
    strategies = {
        "ddp": DDPStrategy(process_group_backend="gloo"),
        "fsdp2": ModelParallelStrategy(2, 1, process_group_backend="gloo"),
    }
    trainer = L.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=2,
        strategy=strategies[options.strategy],
        callbacks=[dendrites, count],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    size = 40 * options.batch  # of both processes: 20 batches an epoch
    data = TensorDataset(torch.randn(size, 784), torch.randint(10, (size,)))
    loader = DataLoader(data, options.batch)
    trainer.fit(Classifier(options.network), loader, loader)
    show(count.steps)


if __name__ == "__main__":
    main()
