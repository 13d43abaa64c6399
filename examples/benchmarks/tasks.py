"""What the benchmark of quality trains: a network on data, with everything that was chosen for it in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Of every fit's DendriteCallback, with dendrites or without; a task may say otherwise. What is recorded is from before
# there were defaults that end phases earlier.
ALWAYS = {
    "monitor": "loss",
    "max_dendrites": 3,
    "patience": 12,
    "min_delta": 0.0,
    "correlation_patience": 5,
    "verbose": False,
}


@dataclass(frozen=True)
class Cosine:
    """A fit of a length that is known: the learning rate falls as a cosine from its first epoch to its last.

    Attributes:
        epochs: of a fit without dendrites, and of the last phase of one with them.
        decay: of the weights.
    """

    epochs: int
    decay: float = 0.0


@dataclass(frozen=True)
class Task:
    """A network and data for it.

    Attributes:
        data: its name in ``data.DATA``.
        network: its name in ``networks.NETWORKS``.
        width: of the network that dendrites are added to; 0: it has no hidden layer, and shared dendrites make it.
        widths: of other plain networks, for the picture.
        metric: what is compared, a name in ``networks.METRICS``. The loss decides, unless the callback's arguments
            name the ``"score"``, in which a classifier's error counts and the loss is no more than a tie-break.
        seconds: that a plain fit took, on one thread.
        batch: size of a batch.
        most: batches of an epoch; ``None``: all.
        rate: the learning rate of Adam.
        decay: it is halved when the loss on validation data has not fallen in more epochs than this.
        arguments: of the ``DendriteCallback``.
        peer: settings of the peer that this network needs; ``None``: it does not train it without code of its own.
        sparse: whether layers that grow can have sparse dendrites; else such rows would repeat the dense ones.
        cosine: how the learning rate falls instead. Its controls are then trained once, for as many epochs as what
            grew, and there are more kinds of them.
    """

    data: str
    network: str
    width: int
    widths: tuple[int, ...]
    seconds: float
    metric: str = "error"
    batch: int = 256
    most: int | None = None
    rate: float = 3e-3
    decay: int = 4
    arguments: Mapping[str, Any] = field(default_factory=dict)
    peer: Mapping[str, Any] | None = field(default_factory=dict)
    sparse: bool = True
    cosine: Cosine | None = None

    def settings(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """All that a result depends on but the seed, as plain values."""
        left_out = {"widths", "seconds", "sparse", *(["cosine"] if self.cosine is None else [])}
        plain = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {**plain, "arguments": {**ALWAYS, **self.arguments, **arguments}}


# Text is endless here, and its loss creeps down for ever: what a phase has to gain is a share of it.
_TEXT: dict[str, Any] = {
    "metric": "bits",
    "batch": 32,
    "most": 50,
    "decay": 1,
}
_TEXT_PHASES = {"patience": 5, "min_delta": 0.003, "min_delta_mode": "rel", "max_correlation_epochs": 10}


def _wide(data: str, network: str, *, seconds: float, epochs: int, decay: float, metric: str) -> Task:
    """Of many inputs: a network of shared dendrites alone, and its controls."""
    cosine = Cosine(epochs, decay)
    arguments = {"monitor": "score", "base_epochs": epochs, "verbose": False}
    return Task(
        data,
        network,
        0,
        (32, 128),
        seconds,
        metric,
        batch=128,
        rate=2e-3,
        arguments=arguments,
        peer=None,
        cosine=cosine,
    )


TASKS = {
    "digits": Task("digits", "digits", 8, (4, 16, 64, 512), 2.5, batch=64),
    "letters": Task("letters", "letters", 16, (8, 32, 128), 12),
    "adult": Task("adult", "adult", 8, (2, 16, 64, 256), 3),
    "mnist-mlp": Task("mnist", "mnist-mlp", 16, (8, 32, 128), 3, batch=128),
    "mnist-cnn": Task("mnist", "mnist-cnn", 4, (8,), 17, batch=128),
    # All of it grows as one. By the loss on validation data this is as good as its two layers, and better than the GRU.
    "shakespeare-gru": Task(
        "shakespeare",
        "shakespeare-gru",
        64,
        (32, 96, 192),
        30,
        **_TEXT,
        peer=None,
        sparse=False,
        arguments={**_TEXT_PHASES, "targets": ["net"]},
    ),
    # The feed-forward layers grow: attention uses its projections' weights and never calls them.
    "shakespeare-transformer": Task(
        "shakespeare",
        "shakespeare-transformer",
        16,
        (24,),
        30,
        **_TEXT,
        peer={"output_dimensions": [-1, -1, 0], "module_ids_to_track": [".head"]},
        arguments={**_TEXT_PHASES, "targets": ["*.linear1", "*.linear2"]},
    ),
}
# Tasks whose controls are those of ``controls``.
WIDE = {
    "mnist": _wide("grey_mnist", "mnist", seconds=4, epochs=30, decay=0.0, metric="error"),
    "tox21": _wide("tox21", "tox21", seconds=5, epochs=40, decay=1e-4, metric="1 - AUC"),
    "lipophilicity": _wide("lipophilicity", "lipophilicity", seconds=4, epochs=40, decay=1e-4, metric="RMSE"),
    "trec": _wide("trec", "trec", seconds=5, epochs=40, decay=1e-4, metric="error"),
}


def task_of(name: str) -> Task:
    """The task of a name; behind an @ there may be another width for its network.

    Raises:
        KeyError: if there is none of that name.
        ValueError: if what is behind the @ is no width.

    Example:
        >>> task_of("letters").width, task_of("letters@64").width
        (16, 64)
    """
    name, at, width = name.partition("@")
    if not at:
        return {**TASKS, **WIDE}[name]
    if int(width) < 1:
        raise ValueError(f"a width is at least 1, got {width}")
    return replace({**TASKS, **WIDE}[name], width=int(width))


ROWS: dict[str, dict[str, Any]] = {
    "correlation": {"learning": "correlation"},
    "gradient": {"learning": "gradient"},
    "hybrid": {"learning": "hybrid"},
    "sparse correlation": {"learning": "correlation", "fan_in": 4},
    "sparse gradient": {"learning": "gradient", "fan_in": 4},
    "sparse hybrid": {"learning": "hybrid", "fan_in": 4},
}
PEER = "peer"
