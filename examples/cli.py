"""Can a run be configured instead of coded? A classifier, a regressor and a character model, in YAML.

    python examples/cli.py fit --config examples/configs/digits.yaml
    python examples/cli.py fit --config examples/configs/letters.yaml --data.data_dir DIR

Any argument of the callback can be changed on the command line too: ``--trainer.callbacks.patience 5``. All of them,
with their meaning: ``python examples/cli.py fit --trainer.callbacks.help DendriteCallback``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning as L
import torch
from benchmarks import data
from lightning.pytorch.cli import ArgsType, LightningCLI, OptimizerCallable
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback

# -- data ---------------------------------------------------------------------------------------------------------


class InMemory(L.LightningDataModule):
    """60 % for training, 20 % decide, 20 % are read once.

    Args:
        batch_size: examples in a batch of training.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def load(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def split(self) -> Sequence[tuple[Tensor, Tensor]]:
        x, y = self.load()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        return [(x[rows], y[rows]) for rows in order.tensor_split([3 * len(y) // 5, 4 * len(y) // 5])]

    def setup(self, stage: str) -> None:
        self.train, self.val, self.test = (TensorDataset(*part) for part in self.split())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=4096)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=4096)


class Digits(InMemory):
    """1,797 images of handwritten digits, 8 x 8 pixels."""

    def load(self) -> tuple[Tensor, Tensor]:
        images, digits = datasets.load_digits(return_X_y=True)
        return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)


class Diabetes(InMemory):
    """442 patients: ten measurements, and how far the disease went in a year."""

    def load(self) -> tuple[Tensor, Tensor]:
        x, y = (torch.tensor(values, dtype=torch.float32) for values in datasets.load_diabetes(return_X_y=True))
        return x / x.std(0), ((y - y.mean()) / y.std())[:, None]


class Characters(InMemory):
    """English prose, what scikit-learn says of its data sets: some characters, and the one that follows.

    Args:
        context: characters that are given.
        batch_size: examples in a batch of training.
    """

    def __init__(self, context: int = 8, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.context = context

    def load(self) -> tuple[Tensor, Tensor]:
        sets = (datasets.load_diabetes, datasets.load_digits, datasets.load_iris, datasets.load_wine)
        prose = " ".join(load().DESCR for load in sets).lower()
        words = " ".join("".join(c if "a" <= c <= "z" else " " for c in prose).split())
        windows = torch.tensor([" abcdefghijklmnopqrstuvwxyz".index(c) for c in words]).unfold(0, self.context + 1, 1)
        return windows[:, :-1], windows[:, -1]


class Letters(InMemory):
    """20,000 printed letters in 16 measurements each: UCI 59, *Letter Recognition*, as ``letter-recognition.csv.gz``.

    Args:
        data_dir: directory of that file.
        batch_size: examples in a batch of training.
    """

    def __init__(self, data_dir: Path, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.data_dir = data_dir

    def split(self) -> Sequence[tuple[Tensor, Tensor]]:
        file = self.data_dir / "letter-recognition.csv.gz"
        if not file.is_file():
            raise FileNotFoundError(f"there is no '{file}': name the directory it is in with --data.data_dir DIR")
        return data.letters(self.data_dir)


# -- models -------------------------------------------------------------------------------------------------------


class Model(L.LightningModule):
    """What all three have in common; nothing here knows of dendrites."""

    def __init__(self, optimizer: OptimizerCallable) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.net: nn.Module

    def scores(self, out: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.scores(self.net(batch[0]), batch[1])["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scores = self.scores(self.net(batch[0]), batch[1])
        self.log_dict({f"val_{name}": value for name, value in scores.items()}, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scores = self.scores(self.net(batch[0]), batch[1])
        self.log_dict({f"test_{name}": value for name, value in scores.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class MLPClassifier(Model):
    """A perceptron with one hidden layer.

    Args:
        inputs: features of an example.
        classes: to tell apart.
        hidden: neurons of the hidden layer.
        optimizer: of the network.
    """

    def __init__(self, inputs: int, classes: int, hidden: int, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class MLPRegressor(Model):
    """A perceptron with one hidden layer and one output.

    Args:
        inputs: features of an example.
        hidden: neurons of the hidden layer.
        optimizer: of the network.
    """

    def __init__(self, inputs: int, hidden: int, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def scores(self, out: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(out, y), "absolute_error": nn.functional.l1_loss(out, y)}


class CharacterModel(Model):
    """Reads the last few characters and guesses the next one.

    Args:
        context: characters that it reads.
        embedding: size of a character's vector.
        hidden: neurons of the hidden layer.
        characters: in the alphabet.
        optimizer: of the network.
    """

    def __init__(
        self,
        context: int = 8,
        embedding: int = 8,
        hidden: int = 24,
        characters: int = 27,
        optimizer: OptimizerCallable = torch.optim.Adam,
    ) -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(
            nn.Embedding(characters, embedding),
            nn.Flatten(),
            nn.Linear(context * embedding, hidden),
            nn.ReLU(),
            nn.Linear(hidden, characters),
        )


# -- command line -------------------------------------------------------------------------------------------------


class CLI(LightningCLI):
    def after_fit(self) -> None:
        callbacks: Iterable[L.Callback] = self.trainer.callbacks
        for callback in callbacks:
            if isinstance(callback, DendriteCallback):
                print(f"\n{callback.summary()}\n")
        self.trainer.test(self.model, self.datamodule)


def main(args: ArgsType = None) -> CLI:
    return CLI(L.LightningModule, L.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
