"""The data of the benchmarks, each in three parts: one to train on, one that decides, one that is read once.

Split at random by a fixed seed, 70 %, 15 % and 15 %; molecules 80, 10 and 10 %, and the digits beside them 70, 10 and
20 %; questions as they were published, the last 852 to decide; the text in its order, 90 %, 5 % and 5 %.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections import Counter
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
    return split(*images(folder))


def grey_mnist(folder: Path) -> Parts:
    """The same digits about 0, in deviations of their grey."""
    x, y = images(folder)
    return cut((x - 0.13) / 0.31, y, 7_000, 8_000)


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """10,000 digits in grey levels of 0 to 1, shape ``(10000, 784)``, and which they are."""
    with gzip.open(folder / "mnist-10k-images-idx3-ubyte.gz") as file:
        levels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / "mnist-10k-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(levels / 255, dtype=torch.float32), torch.tensor(y, dtype=torch.long)


def tox21(folder: Path) -> Parts:
    """7,823 substances: how do twelve assays of toxicity come out? Not a number where none was made."""
    x, y = molecules(folder / "tox21.csv.gz")
    return cut(x, y, 8 * len(y) // 10, 9 * len(y) // 10)


def lipophilicity(folder: Path) -> Parts:
    """4,200 substances: how much better do they dissolve in octanol than in water (log D at pH 7.4, standardised)?"""
    x, y = molecules(folder / "lipophilicity.csv.gz")
    train, *others = cut(x, y, 8 * len(y) // 10, 9 * len(y) // 10)
    mean, std = train[1].mean(0), train[1].std(0)
    return [(x, (y - mean) / std) for x, y in (train, *others)]


def trec(folder: Path, most: int = 2_000) -> Parts:
    """5,952 questions: of which of six kinds is the answer? An input for each of the most frequent words."""
    train, test = (_questions(folder / f"trec-{part}.txt.gz") for part in ("train", "test"))
    counts = Counter(word for _, words in train for word in words)
    place = {word: number for number, (word, _) in enumerate(counts.most_common(most))}
    kinds = sorted({kind for kind, _ in train})

    def tensors(questions: list[tuple[str, list[str]]]) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(questions), most)
        for row, (_, words) in enumerate(questions):
            x[row, [place[word] for word in words if word in place]] = 1
        return x, torch.tensor([kinds.index(kind) for kind, _ in questions])

    return [*cut(*tensors(train), 4_600), tensors(test)]


def _questions(path: Path) -> list[tuple[str, list[str]]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = [line.split(" ", 1) for line in file.read().strip().split("\n")]
    # A word counts once; in order, for of words that are as frequent those that came first are inputs.
    words = [list(dict.fromkeys(re.findall(r"[a-z']+|\d+|\?", text.lower()))) for _, text in lines]
    return [(label.partition(":")[0], found) for (label, _), found in zip(lines, words, strict=True)]


def molecules(path: Path) -> tuple[Tensor, Tensor]:
    """Substances as they come, and the numbers beside each; those that cannot be read are left out.

    An input says how often one of 1,024 groups of fragments is in the molecule (Morgan fingerprint of radius 2), as the
    logarithm of one more.
    """
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
    except ImportError as error:
        raise ImportError('fingerprints of molecules need rdkit: pip install ".[molecules]"') from error
    RDLogger.DisableLog("rdApp.*")
    morgan = GetMorganGenerator(radius=2, fpSize=1024)
    x, y = [], []
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            molecule = Chem.MolFromSmiles(row.pop("smiles"))
            if molecule is not None:
                x.append(morgan.GetCountFingerprintAsNumPy(molecule).astype(np.float32))
                y.append([float(cell) if cell else np.nan for cell in row.values()])
    return torch.tensor(np.log1p(np.stack(x))), torch.tensor(y, dtype=torch.float32)


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


def cut(x: Tensor, y: Tensor, *at: int) -> Parts:
    order = torch.tensor(np.random.RandomState(0).permutation(len(y)))
    return [(x[rows], y[rows]) for rows in order.tensor_split(at)]


def standardised(parts: Parts) -> Parts:
    x = parts[0][0]
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)
    return [((x - mean) / std, y) for x, y in parts]


DATA: dict[str, Callable[[Path], Parts]] = {
    f.__name__: f for f in (digits, letters, adult, mnist, grey_mnist, tox21, lipophilicity, trec, shakespeare)
}
