"""Does a small network grow better with dendrites, and would a wider one have done as well?

    python examples/digits.py
    python examples/digits.py --report digits.html

Trains a narrow classifier on scikit-learn's digits, lets it grow, and puts two controls beside it: the same network
without dendrites, and a plain network with as many parameters, trained for as many epochs. `--report` writes a page
that shows what grew and what it gained.
"""

from __future__ import annotations

from argparse import ArgumentParser

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback


class Digits(L.LightningDataModule):
    """1,797 images of 8 x 8 pixels: 60 % for training, 20 % decide, 20 % are read once."""

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        rest, test = train_test_split(range(len(y)), test_size=0.2, stratify=y, random_state=0)
        train, val = train_test_split(rest, test_size=0.25, stratify=y[rest], random_state=0)
        self.parts = {"train": train, "val": val, "test": test}
        self.parts = {name: TensorDataset(x[rows], y[rows]) for name, rows in self.parts.items()}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["train"], batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"], batch_size=512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["test"], batch_size=512)


class Classifier(L.LightningModule):
    """An ordinary LightningModule; it knows nothing of dendrites."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train(hidden: int, dendrites: DendriteCallback, max_epochs: int = -1) -> dict:
    """One fit from a fixed seed; the test part is read with the best network."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[dendrites], accelerator="cpu", log_every_n_steps=10)
    model, data = Classifier(hidden), Digits()
    trainer.fit(model, data)
    accuracy = trainer.test(model, data, verbose=False)[0]["accuracy"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"accuracy": accuracy, "parameters": parameters, "epochs": trainer.current_epoch}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", metavar="FILE", help="write a report to this file, .html or .md")
    report = parser.parse_args().report
    torch.set_num_threads(1)
    hidden = 8
    dendrites = DendriteCallback("val_loss", max_dendrites=3)
    grown = train(hidden, dendrites)

    # The controls have as many epochs; the callback only keeps the best network for them, as it does for the other.
    wider = round((grown["parameters"] - 10) / (64 + 1 + 10))
    rows = {f"{hidden} hidden neurons, with dendrites": grown}
    controls = {}
    for neurons in (hidden, wider):
        keep_best = DendriteCallback("val_loss", max_dendrites=0, patience=10**6, verbose=False)
        name = f"{neurons} hidden neurons, plain"
        rows[name] = train(neurons, keep_best, max_epochs=grown["epochs"])
        controls[name] = {"score": keep_best.best_model_score, **{k: rows[name][k] for k in ("parameters", "epochs")}}

    print(f"\n{dendrites.summary()}\n")
    for name, row in rows.items():
        figures = f"{row['parameters']:6,} parameters {row['epochs']:4} epochs"
        print(f"{name:34} test accuracy {row['accuracy']:.3f} {figures}")
    if report:
        dendrites.report(report, controls)


if __name__ == "__main__":
    main()
