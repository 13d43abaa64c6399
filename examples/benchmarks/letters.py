"""Do dendrites help an underfit network? UCI letters, an MLP 16-16-26.

    python examples/benchmarks/letters.py --data-dir DIR [--seeds 3] [--max-dendrites 3]

DIR holds ``letter-recognition.csv.gz`` (UCI 59, CC BY 4.0). The validation part decides, the test part is read once per
model. Dendrites learn by each rule in turn. Beside the grown networks stand the same network without dendrites, and a
plain one of as many parameters; both train until their own plateau, and as often again from a restarted optimizer as
the grown one did.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from pl_dendrites import DendriteCallback


class Batches:
    """Batches of tensors that are in memory, without the cost of a DataLoader."""

    def __init__(self, x: Tensor, y: Tensor, size: int, shuffle: bool = False) -> None:
        self.x, self.y, self.size, self.shuffle = x, y, size, shuffle

    def __len__(self) -> int:
        return (len(self.y) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y)) if self.shuffle else torch.arange(len(self.y))
        for rows in order.split(self.size):
            yield self.x[rows], self.y[rows]


class Classifier(L.LightningModule):
    """An MLP with one hidden layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 26))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("error", (logits.argmax(1) != batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def load(data_dir: Path) -> list[tuple[Tensor, Tensor]]:
    """70 % for training, 15 % that decide, 15 % that are read once."""
    table = np.loadtxt(data_dir / "letter-recognition.csv.gz", delimiter=",", skiprows=1, dtype=str)
    (letter,) = (column for column in range(table.shape[1]) if table[0, column].isalpha())
    y = torch.tensor([ord(cell) - ord("A") for cell in table[:, letter]])
    x = torch.tensor(np.delete(table, letter, 1).astype(np.float32))
    parts = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split([14000, 3000, 3000])
    x = (x - x[parts[0]].mean(0)) / x[parts[0]].std(0)
    return [(x[rows], y[rows]) for rows in parts]


def fit(
    data: list[Any], seed: int, hidden: int, max_dendrites: int, *, restarts: int = 0, learning: Any = "correlation"
) -> dict[str, Any]:
    """Train until growth ends; error on the test part, parameters, epochs and seconds of the fits."""
    L.seed_everything(seed, verbose=False)
    (train, val, test), model = data, Classifier(hidden)
    seconds = epochs = 0
    for _ in range(1 + restarts):
        dendrites = DendriteCallback("loss", patience=12, max_dendrites=max_dendrites, learning=learning, verbose=False)
        trainer = L.Trainer(
            max_epochs=-1,
            callbacks=[dendrites],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        start = time.perf_counter()
        trainer.fit(model, Batches(*train, 256, shuffle=True), Batches(*val, 3000))
        seconds, epochs = seconds + time.perf_counter() - start, epochs + trainer.current_epoch
    error = trainer.test(model, Batches(*test, 3000), verbose=False)[0]["error"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "error": 100 * error,
        "parameters": parameters,
        "epochs": epochs,
        "seconds": seconds,
        "dendrites": dendrites.num_dendrites,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-dendrites", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = load(options.data_dir)
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        rules = ("correlation", "hybrid", "gradient")
        grown = {rule: fit(data, seed, 16, options.max_dendrites, learning=rule) for rule in rules}
        largest = max(grown.values(), key=lambda run: run["parameters"])
        wider = round((largest["parameters"] - 26) / (16 + 1 + 26))
        row = {
            "16 hidden": fit(data, seed, 16, 0),
            "16 hidden, restarted as often": fit(data, seed, 16, 0, restarts=largest["dendrites"]),
            **{f"with dendrites, {rule}": run for rule, run in grown.items()},
            "wider, restarted as often": fit(data, seed, wider, 0, restarts=largest["dendrites"]),
        }
        for name, result in row.items():
            results.setdefault(name, []).append(result)
            print(f"seed {seed}: {name:30} {result['error']:5.1f} %", flush=True)
    head = f"mean of {options.seeds} seeds"
    print(f"\n{head:30} {'test error':>14} {'parameters':>10} {'epochs':>7} {'seconds':>8}")
    for name, runs in results.items():
        errors = [run["error"] for run in runs]
        spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
        mean = {key: statistics.mean(run[key] for run in runs) for key in ("parameters", "epochs", "seconds")}
        print(
            f"{name:30} {statistics.mean(errors):6.1f} ± {spread:3.1f} % {mean['parameters']:10,.0f}"
            f" {mean['epochs']:7.0f} {mean['seconds']:8.1f}"
        )


if __name__ == "__main__":
    main()
