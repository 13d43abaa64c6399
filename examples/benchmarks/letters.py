"""Do dendrites help an underfit network? UCI letters, an MLP 16-16-26, against the same network without them.

    python examples/benchmarks/letters.py --data-dir DIR [--seeds 3] [--max-dendrites 3]

DIR holds ``letter-recognition.csv.gz`` (UCI 59, CC BY 4.0). The validation part decides, the test part is read once. Two
controls: the same network without dendrites, and a plain network of as many parameters, both with as many restarts.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pl_dendrites import DendriteCallback


class Batches:
    """Shuffled batches of tensors, without the cost of a DataLoader for data that are in memory."""

    def __init__(self, data: TensorDataset, size: int, shuffle: bool) -> None:
        self.tensors, self.size, self.shuffle = data.tensors, size, shuffle

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.tensors[0]) // self.size)

    def __iter__(self):  # noqa: ANN204
        """One epoch."""
        count = len(self.tensors[0])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for rows in order.split(self.size):
            yield tuple(tensor[rows] for tensor in self.tensors)


class Classifier(L.LightningModule):
    """An MLP with one hidden layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 26))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Error rate and loss."""
        x, y = batch
        logits = self.net(x)
        self.log("error", (logits.argmax(1) != y).float().mean(), batch_size=len(y))
        self.log("loss", nn.functional.cross_entropy(logits, y), batch_size=len(y))

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        """Adam, its learning rate halved on a plateau."""
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def load(data_dir: Path) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """70 % for training, 15 % decide, 15 % are read once."""
    table = np.genfromtxt(data_dir / "letter-recognition.csv.gz", delimiter=",", skip_header=1, dtype=str)
    is_letter = [not cell.lstrip("-").replace(".", "").isdigit() for cell in table[0]]
    (label,) = np.flatnonzero(is_letter)
    y = torch.tensor([ord(cell) - ord("A") for cell in table[:, label]])
    x = torch.tensor(np.delete(table, label, 1).astype(np.float32))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, val, test = order.split([14000, 3000, 3000])
    x = (x - x[train].mean(0)) / x[train].std(0)
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val]), TensorDataset(x[test], y[test])


def run(data: tuple, seed: int, hidden: int, max_dendrites: int, max_epochs: int = -1, **settings: object) -> dict:
    """One fit; its test error, parameters and epochs."""
    L.seed_everything(seed, verbose=False)
    train, val, test = data
    model = Classifier(hidden)
    dendrites = DendriteCallback("loss", patience=12, max_dendrites=max_dendrites, verbose=False, **settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[dendrites], accelerator="cpu", **quiet)
    start = time.perf_counter()
    trainer.fit(model, Batches(train, 256, True), Batches(val, 3000, False))
    seconds = time.perf_counter() - start
    error = trainer.test(model, Batches(test, 3000, False), verbose=False)[0]["error"]
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"error": 100 * error, "parameters": count, "epochs": trainer.current_epoch, "seconds": seconds,
            "dendrites": dendrites.num_dendrites, "summary": dendrites.summary()}


if __name__ == "__main__":
    import sys
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING); warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = load(Path("/work/shared/data"))
    mon = sys.argv[1] if len(sys.argv)>1 else ''
    for s in range(3):
        a=run(data,s,16,0); b=run(data,s,16,3); print(b.pop('summary'));a.pop('summary'); print(a,b,flush=True)
