"""Is a substance toxic? A network with a few thousand parameters reads it off a fingerprint of the molecule.

    pip install ".[molecules]"
    python examples/fingerprints.py --data-dir DIR

Tox21: twelve assays, most substances in a part of them; DIR holds ``tox21.csv.gz``, SMILES and answers. Neuron bodies
grow shared dendrites within a budget, and a plain network with one hidden layer stands beside them, trained for as many
epochs in all. Validation data choose the epoch; test data are read once. Shown is 1 less the area under the ROC curve,
the mean of the assays.
"""

from __future__ import annotations

import logging
import statistics
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmarks.data import DATA
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAUROC

from pl_dendrites import DendriteCallback
from pl_dendrites.core import Soma


class Toxicity(L.LightningModule):
    """An ordinary LightningModule; it knows nothing of dendrites."""

    def __init__(self, net: nn.Module, assays: int, epochs: int) -> None:
        super().__init__()
        self.net, self.epochs = net, epochs
        self.auc = MultilabelAUROC(assays, ignore_index=-1)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        made = ~batch[1].isnan()
        return nn.functional.binary_cross_entropy_with_logits(self.net(batch[0])[made], batch[1][made])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.auc(self.net(batch[0]), batch[1].nan_to_num(-1).long())
        self.log("auc", self.auc)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)]


def fit(net: nn.Module, parts: Any, epochs: int, seed: int, **arguments: Any) -> tuple[float, int, int]:
    """What the ROC curves leave out, parameters and epochs of one fit."""
    L.seed_everything(seed, verbose=False)
    model = Toxicity(net, parts[0][1].shape[1], epochs)
    dendrites = DendriteCallback("val_loss", base_epochs=epochs, verbose=False, **arguments)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=-1, callbacks=[dendrites], accelerator="cpu", **quiet)
    train, val, test = (TensorDataset(*part) for part in parts)
    trainer.fit(model, DataLoader(train, 128, shuffle=True), DataLoader(val, 4096))
    missed = 1 - trainer.test(model, DataLoader(test, 4096), verbose=False)[0]["auc"]
    return missed, sum(p.numel() for p in model.parameters()), sum(record["epochs"] for record in dendrites.history)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--max-parameters", type=int, default=3_800)
    parser.add_argument("--hidden", type=int, default=32, help="neurons of the plain network")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40, help="of the last, long phase")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = DATA["tox21"](options.data_dir)
    bits, assays = parts[0][0].shape[1], parts[0][1].shape[1]

    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(bits, options.hidden), nn.ReLU(), nn.Linear(options.hidden, assays))

    def row(name: str, make: Any, epochs: int, **arguments: Any) -> int:
        runs = [fit(make(), parts, epochs, seed, **arguments) for seed in range(options.seeds)]
        missed = [run[0] for run in runs]
        spread = f" ± {statistics.stdev(missed):.3f}" if len(missed) > 1 else ""
        _, parameters, seen = runs[0]
        shown = f"{parameters:8,} parameters {seen:4} epochs  {statistics.mean(missed):.3f}{spread}"
        print(f"{name:28} {shown}", flush=True)
        return seen

    seen = row("shared dendrites", lambda: Soma(bits, assays), options.epochs, max_parameters=options.max_parameters)
    row(f"plain, {options.hidden} hidden neurons", plain, seen, max_dendrites=0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    main()
