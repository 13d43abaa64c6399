"""The data of the benchmarks, each in three parts: one to train on, one that decides, one that is read once.

Split at random by a fixed seed, 70 %, 15 % and 15 %; the text in its order, 90 %, 5 % and 5 %.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Parts = list[tuple[Tensor, Tensor]]

WINDOW = 32  # characters that a model of text reads at once


def digits(_: Path) -> Parts:
    """1,797 images of handwritten digits, 8 x 8 pixels; they come with scikit-learn."""
    from sklearn.datasets import load_digits

    images, y = load_digits(return_X_y=True)
    return split(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(y))


def letters(folder: Path) -> Parts:
    """20,000 printed letters in 16 measurements each (UCI 59)."""
    table = np.loadtxt(folder / "letter-recognition.csv.gz", delimiter=",", skiprows=1, dtype=str)
    (letter,) = (column for column in range(table.shape[1]) if table[0, column].isalpha())
    y = torch.tensor([ord(cell) - ord("A") for cell in table[:, letter]])
    return standardised(split(torch.tensor(np.delete(table, letter, 1).astype(np.float32)), y))


def adult(folder: Path) -> Parts:
    """32,561 people: does one earn more than 50,000 dollars (UCI 2)? Numbers, and an input for each word there is."""
    with gzip.open(folder / "adult.csv.gz", "rt") as file:
        rows = [[cell.strip() for cell in row] for row in list(csv.reader(file))[1:] if row]
    *columns, income = zip(*rows, strict=True)
    inputs = []
    for column in columns:
        if all(cell.isdigit() for cell in column):
            inputs.append(np.array([column], dtype=np.float32))
        else:
            inputs.append(np.array([[cell == word for cell in column] for word in sorted(set(column))], np.float32))
    y = torch.tensor([int(cell.startswith(">")) for cell in income])
    return standardised(split(torch.tensor(np.concatenate(inputs).T), y))


def mnist(folder: Path) -> Parts:
    """10,000 handwritten digits, 28 x 28 pixels."""
    with gzip.open(folder / "mnist-10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / "mnist-10k-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    return split(torch.tensor(images / 255, dtype=torch.float32), torch.tensor(y, dtype=torch.long))


def shakespeare(folder: Path) -> Parts:
    """1,115,394 characters: at each of some, what is the next one? Windows overlap in the first part alone."""
    with gzip.open(folder / "tinyshakespeare.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    code = {character: number for number, character in enumerate(sorted(set(text)))}
    train, *others = torch.tensor([code[c] for c in text]).tensor_split([9 * len(text) // 10, 19 * len(text) // 20])
    windows = [train.unfold(0, WINDOW + 1, 1), *(part.unfold(0, WINDOW + 1, WINDOW) for part in others)]
    return [(part[:, :-1], part[:, 1:]) for part in windows]


def split(x: Tensor, y: Tensor) -> Parts:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return [(x[rows], y[rows]) for rows in order.tensor_split([7 * len(y) // 10, 17 * len(y) // 20])]


def standardised(parts: Parts) -> Parts:
    x = parts[0][0]
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)
    return [((x - mean) / std, y) for x, y in parts]


DATA: dict[str, Callable[[Path], Parts]] = {f.__name__: f for f in (digits, letters, adult, mnist, shakespeare)}
