"""How few parameters does a network need whose only hidden units are shared dendrites?

    python examples/shared.py
    python examples/shared.py --data mnist --data-dir DIR

A model of neuron bodies alone grows units around itself, each with a few inputs that vary together and are replaced
while it learns. Plain networks with one hidden layer stand beside it, trained for as many epochs in all with the same
optimizer and schedule. Validation data choose the epoch; test data are read once. Mean and standard deviation over
seeds.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from benchmarks.data import DATA
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback
from pl_dendrites.core import Soma


class Task(NamedTuple):
    """What is chosen for a data set: batch, epochs, budgets of parameters, hidden neurons of plain networks."""

    batch: int
    epochs: int
    budgets: tuple[int, ...]
    plain: tuple[int, ...]


TASKS = {
    "digits": Task(64, 100, (450, 900), (8, 16, 32)),
    "mnist": Task(128, 30, (6_100, 14_000), (8, 16, 128)),
}


class Classifier(L.LightningModule):
    """An ordinary LightningModule; it knows nothing of dendrites."""

    def __init__(self, net: nn.Module, epochs: int) -> None:
        super().__init__()
        self.net, self.epochs = net, epochs

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("error", 100 * (logits.argmax(1) != batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def fit(net: nn.Module, task: Task, epochs: int, parts: Any, seed: int, **arguments: Any) -> tuple[float, int, int]:
    """Test error in %, parameters and epochs of one fit."""
    L.seed_everything(seed, verbose=False)
    model = Classifier(net, epochs)
    dendrites = DendriteCallback("val_loss", base_epochs=epochs, verbose=False, **arguments)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites], accelerator="cpu", **quiet)
    train, val, test = (TensorDataset(*part) for part in parts)
    trainer.fit(model, DataLoader(train, task.batch, shuffle=True), DataLoader(val, 4096))
    error = trainer.test(model, DataLoader(test, 4096), verbose=False)[0]["error"]
    return error, sum(p.numel() for p in model.parameters()), sum(record["epochs"] for record in dendrites.history)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=TASKS, default="digits")
    parser.add_argument("--data-dir", type=Path, help="where the files of MNIST are")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="of the last, long phase and of plain networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.data]
    epochs = options.epochs or task.epochs
    parts = DATA[options.data](options.data_dir)
    inputs, outputs = parts[0][0].shape[1], int(parts[0][1].max()) + 1

    def row(name: str, make: Any, epochs: int, **arguments: Any) -> int:
        runs = [fit(make(), task, epochs, parts, seed, **arguments) for seed in range(options.seeds)]
        errors = [error for error, _, _ in runs]
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        _, parameters, seen = runs[0]
        shown = f"{parameters:8,} parameters {seen:4} epochs  {statistics.mean(errors):5.2f}{spread} %"
        print(f"{name:28} {shown}", flush=True)
        return seen

    for most in task.budgets:
        seen = row("shared dendrites", lambda: Soma(inputs, outputs), epochs, max_parameters=most)
    for hidden in task.plain:
        row(f"plain, {hidden} hidden neurons", lambda h=hidden: mlp(inputs, h, outputs), seen, max_dendrites=0)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    main()
