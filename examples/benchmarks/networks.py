"""The networks of the benchmarks, by name and width, and how they are fed and scored. PyTorch alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

CHARACTERS = 65


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * channels * 3 * 3, 10),
    )


class GRU(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, 16)
        self.gru = nn.GRU(16, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(x))[0])


class Transformer(nn.Module):
    """Two layers of two heads, each ``width`` wide."""

    def __init__(self, width: int, window: int = 32) -> None:
        super().__init__()
        size = 2 * width
        self.embedding = nn.Embedding(CHARACTERS, size)
        self.positions = nn.Parameter(torch.randn(window, size) / 10)
        layer = nn.TransformerEncoderLayer(size, 2, 2 * size, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(size), enable_nested_tensor=False)
        self.head = nn.Linear(size, CHARACTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.positions, self.mask, is_causal=True))


def one_hidden(inputs: int, outputs: int) -> Callable[[int], nn.Module]:
    """By its width; without any it is neuron bodies alone, for dendrites to make a network of."""

    def network(width: int) -> nn.Module:
        if width:
            return mlp(inputs, width, outputs)
        from pl_dendrites.core import Soma

        return Soma(inputs, outputs)

    return network


# Of networks with one hidden layer: their inputs and outputs.
SHAPES = {
    "digits": (64, 10),
    "letters": (16, 26),
    "adult": (108, 2),
    "mnist": (784, 10),
    "tox21": (1024, 12),
    "lipophilicity": (1024, 1),
    "trec": (2000, 6),
}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    **{name: one_hidden(*shape) for name, shape in SHAPES.items()},
    "mnist-mlp": lambda width: mlp(784, width, width, 10),
    "mnist-cnn": cnn,
    "shakespeare-gru": GRU,
    "shakespeare-transformer": Transformer,
}


class Batches:
    """Batches of tensors that are in memory, without the cost of a DataLoader.

    Args:
        x: inputs.
        y: what they are.
        size: of a batch.
        shuffle: draw anew in every epoch.
        most: batches of an epoch.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int, shuffle: bool = False, most: int | None = None) -> None:
        self.x, self.y, self.size, self.shuffle = x, y, size, shuffle
        whole = math.ceil(len(y) / size)
        self.count = whole if most is None else min(most, whole)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y)) if self.shuffle else torch.arange(len(self.y))
        for rows in order[: self.count * self.size].split(self.size):
            yield self.x[rows], self.y[rows]


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def labels_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of the answers that there are."""
    there = ~y.isnan()
    return nn.functional.binary_cross_entropy_with_logits(logits[there], y[there])


def percent_wrong(logits: Tensor, y: Tensor) -> float:
    return 100 * (logits.argmax(-1) != y).float().mean().item()


def outside_roc(logits: Tensor, y: Tensor) -> float:
    """1 less the area under the ROC curve, mean over the labels that have both answers."""
    from sklearn.metrics import roc_auc_score

    areas = []
    for some, answers in zip(logits.T, y.T, strict=True):
        there = ~answers.isnan()
        if len(answers[there].unique()) == 2:
            areas.append(roc_auc_score(answers[there], some[there]))
    return 1 - sum(areas) / len(areas)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "error": cross_entropy,
    "bits": cross_entropy,
    "1 - AUC": labels_loss,
    "RMSE": nn.functional.mse_loss,
}
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "error": percent_wrong,
    "bits": lambda logits, y: cross_entropy(logits, y).item() / math.log(2),
    "1 - AUC": outside_roc,
    "RMSE": lambda out, y: nn.functional.mse_loss(out, y).sqrt().item(),
}


@torch.no_grad()
def scores(net: nn.Module, x: Tensor, y: Tensor, metric: str) -> dict[str, float]:
    """Of a network, on a part of the data: the loss, and the metric of the task."""
    net.eval()
    out = torch.cat([net(some) for some in x.split(1024)])
    return {"loss": LOSSES[metric](out, y).item(), metric: METRICS[metric](out, y)}
