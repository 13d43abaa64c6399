"""How much memory does a fit or a load take at its peak, beside what it needs?

    python examples/benchmarks/memory.py [--mib 1024] [--rows NAME ...]

A model of so many MiB in single precision, SGD, an epoch of one step, no correlation phase: what candidates need comes
on top (``speed.py --parts memory``). Each row is a process of its own. Needed are, in models: weights; gradients or,
in their place when Lightning saves, the file, which it puts together in memory first; and the best network where it is
in memory. A load needs the weights alone. Beside the peak of the process' own memory stands that with pages of files in
it, which the system takes back when anybody needs the room. Runs on Linux, and takes up to four times the model in
memory and on the disk.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_dendrites import DendriteCallback, load_from_checkpoint
from pl_dendrites.report import read_history

MIB, LAYERS, EPOCHS = 2**20, 4, 4


class Model(L.LightningModule):
    """Layers of one size; its score gets better with every epoch."""

    def __init__(self, mib: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        width = round((mib * MIB / 4 / LAYERS) ** 0.5)
        self.net = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(LAYERS)])

    def data(self) -> DataLoader:
        return DataLoader(torch.zeros(1, self.net[0].in_features))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", 1 / (1 + torch.tensor(self.global_step)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(mib: float, folder: Path, saves: bool = False, past: bool = False, **arguments: Any) -> None:
    callbacks: list[L.Callback] = [ModelCheckpoint(folder, save_on_train_epoch_end=True)] if saves else []
    if arguments:
        settings = {"base_epochs": EPOCHS + 1, "form": "private", "verbose": False} | arguments
        callbacks.insert(0, DendriteCallback("val_loss", **settings))
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        enable_checkpointing=saves,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
    )
    model = Model(mib)
    data = model.data()
    trainer.fit(model, data, data)
    if past:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        trainer.save_checkpoint(folder / "file.ckpt")


def in_memory(**more: Any) -> Callable[[float, Path], None]:
    return lambda mib, folder: fit(mib, folder, best_on="memory", **more)


# What is measured, and how many models it needs. One row writes the file that those after it load, with two networks.
ROWS: dict[str, tuple[Callable[[float, Path], Any], int]] = {
    "plain fit": (fit, 2),
    "plain fit, ModelCheckpoint": (lambda mib, folder: fit(mib, folder, saves=True), 2),
    "best in memory": (in_memory(), 3),
    "best in memory, ModelCheckpoint": (in_memory(saves=True), 3),
    "best in memory, saved past the best": (in_memory(past=True), 4),
    "best in memory and best.ckpt": (lambda mib, folder: in_memory(dirpath=folder / "best")(mib, folder), 3),
    "best on disk": (lambda mib, folder: fit(mib, folder, best_on="disk", dirpath=folder / "best"), 2),
    "best on disk, ModelCheckpoint": (
        lambda mib, folder: fit(mib, folder, saves=True, best_on="disk", dirpath=folder / "best"),
        2,
    ),
    "load, Lightning's own": (lambda mib, folder: Model.load_from_checkpoint(folder / "file.ckpt"), 1),
    "load": (lambda mib, folder: load_from_checkpoint(Model, folder / "file.ckpt"), 1),
    "read the history": (lambda mib, folder: read_history(folder / "file.ckpt"), 0),
}
FILE = "best in memory, saved past the best"


def resident() -> tuple[float, float]:
    """MiB of this process' own memory, and the most that it had with pages of files."""
    status = Path("/proc/self/status").read_text()
    own, most = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmHWM"))
    assert own is not None
    assert most is not None
    return int(own[1]) / 1024, int(most[1]) / 1024


def measure(row: str, mib: float, folder: Path) -> tuple[float, float]:
    act, _ = ROWS[row]
    warm = folder / "warm"
    for name in dict.fromkeys((FILE, row)):  # what is imported on the way is no part of it
        ROWS[name][0](0.1, warm)
    (own, most), peak, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident()[0])
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    act(mib, folder)
    done.set()
    watcher.join()
    return peak - own, resident()[1] - most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=float, default=1024)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        print(json.dumps(measure(options.one, options.mib, options.folder)))
        return
    rows = [row for row in ROWS if row in options.rows or (row == FILE and ROWS[options.rows[-1]][1] < 2)]
    print("| | needed | peak, own memory | over needed | peak with pages of files |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for row in rows:
            command = [sys.executable, __file__, "--mib", str(options.mib), "--one", row, "--folder", directory]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            own, most = json.loads(done.stdout.splitlines()[-1])
            needed = ROWS[row][1] * options.mib
            ratio = f"{own / needed:.2f}" if needed else ""
            print(f"| {row} | {needed:.0f} MiB | {own:.0f} MiB | {ratio} | {most:.0f} MiB |", flush=True)
            for file in Path(directory).rglob("*.ckpt"):
                if file.name != "file.ckpt":
                    file.unlink()


if __name__ == "__main__":
    main()
