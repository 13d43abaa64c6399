"""Can one neuron with dendrites solve two spirals?

A single ``nn.Linear(2, 1)`` with a sigmoid loss cannot; with the callback it grows the dendrites that it needs. This is
the benchmark of the Cascade-Correlation report (Fahlman & Lebiere 1990; generator of Lang & Witbrock: 194 points, three
turns), which solved it with 12 to 19 hidden units, 15.2 on average.

    python examples/two_spirals.py [--seeds 10] [--picture two_spirals.png]
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback

STEPS_PER_EPOCH = 50


def spirals() -> tuple[Tensor, Tensor]:
    """Points ``(194, 2)`` and classes ``(194, 1)``."""
    i = torch.arange(97)
    radius, angle = 6.5 * (104 - i) / 104, i * math.pi / 16
    arm = torch.stack([radius * angle.sin(), radius * angle.cos()], 1)
    return torch.cat([arm, -arm]), torch.cat([torch.ones(97, 1), torch.zeros(97, 1)])


class OneNeuron(L.LightningModule):
    """A linear layer with one output: everything else has to grow."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = nn.Linear(2, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.neuron(x)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y)
        wrong = ((logits > 0) != (y > 0)).float().sum()
        self.log_dict({"loss": loss, "wrong": wrong}, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.03)


def solve(seed: int, *watching: L.Callback) -> tuple[OneNeuron, int, int]:
    """Train until no point is on the wrong side; the model, its dendrites and the points still wrong."""
    L.seed_everything(seed, verbose=False)
    model = OneNeuron()
    dendrites = DendriteCallback(
        "loss",
        form="private",
        max_dendrites=20,
        candidates=16,
        patience=2,
        max_tries=3,
        min_delta=0.02,
        min_delta_mode="rel",
        correlation_patience=3,
        correlation_min_delta=0.01,
        verbose=False,
    )
    solved = EarlyStopping("wrong", stopping_threshold=0.01, patience=10**6, check_on_train_epoch_end=True)
    trainer = L.Trainer(
        max_epochs=-1,
        callbacks=[dendrites, solved, *watching],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = spirals()
    every_point = [torch.arange(len(data[0]))] * STEPS_PER_EPOCH
    trainer.fit(model, DataLoader(TensorDataset(*data), batch_size=None, sampler=every_point))
    with torch.no_grad():
        wrong = int(((model.neuron(data[0]) > 0) != (data[1] > 0)).sum())
    return model, dendrites.num_dendrites, wrong


def draw(model: OneNeuron, path: str) -> None:
    """The decision regions with the points on them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axis = torch.linspace(-7, 7, 400)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        regions = torch.sigmoid(model.neuron(grid)).reshape(400, 400).T
    x, y = spirals()
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.contourf(axis, axis, regions, levels=20, cmap="coolwarm", alpha=0.7)
    for label, colour in ((0, "#1f3c88"), (1, "#a4161a")):
        points = x[y[:, 0] == label]
        axes.scatter(points[:, 0], points[:, 1], s=14, color=colour, edgecolors="white", linewidths=0.4)
    axes.set(title=f"One neuron, {model.neuron.dendrites.count} dendrites", aspect="equal")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", help="write the decision regions of the last solution to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    counts = []
    for seed in range(options.seeds):
        model, count, wrong = solve(seed)
        print(f"seed {seed}: {count} dendrites, {wrong} of 194 points wrong", flush=True)
        if wrong == 0:
            counts.append(count)
            if options.picture:
                draw(model, options.picture)
    mean = statistics.mean(counts) if counts else math.nan
    print(f"solved in {len(counts)} of {options.seeds} seeds with {mean:.1f} dendrites on average")


if __name__ == "__main__":
    main()
