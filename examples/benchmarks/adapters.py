"""Placed dendrites on a frozen network beside other adapters with as many trainable parameters.

    python examples/benchmarks/adapters.py --data-dir DIR [--task questions] [--train 200 1000] [--seeds 3] [--jobs 2]

The last two layers of MiniLM-L6 learn to sort TREC's questions (see ``examples/finetune.py``) into six classes or fifty
(``--task "questions, fine"``), or the last three blocks of EfficientNet-Lite0 to read digits (``--task digits``). Every
method gets the same examples, epochs, optimizer and schedule, and of its learning rates the one whose mean validation
error is smallest. Dendrites are told a budget: what one of the rivals has. Each fit is in a process of its own, whose
peak memory stands in the table; seconds are those of one processor.
"""

from __future__ import annotations

import json
import logging
import resource
import statistics
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from adapter_tasks import TASKS, finetune

from pl_dendrites import DendriteCallback, dendrites_state_dict

BUDGETS = {
    "dendrites": "LoRA, rank 1",
    "dendrites, fewer": "LoRA, rank 1, query and value",
}
OWN_RATES = {"everything": [2e-4, 4e-4]}

Record = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """One of them."""

    task: str
    folder: str
    lower: str
    count: int
    method: str
    rate: float
    seed: int
    epochs: int
    precision: Any


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapted(fit: Fit, method: str, epochs: int) -> finetune.Classifier:
    """A model with a rival's trainable parameters, the head's included."""
    model = TASKS[fit.task].model(fit.rate, epochs)
    TASKS[fit.task].rivals[method](model.layers)
    return model


def prepared(fit: Fit) -> tuple[finetune.Classifier, DendriteCallback]:
    """What is trained. In all, every method has as many epochs."""
    if fit.method not in BUDGETS:
        return adapted(fit, fit.method, fit.epochs), DendriteCallback(
            "error", base_epochs=fit.epochs, max_dendrites=0, verbose=False
        )
    # In 32 batches the network stands still: an epoch, or of few examples two.
    last = fit.epochs - (1 if fit.count > 31 * 32 else 2)
    budget = trainable(adapted(fit, BUDGETS[fit.method], 1))
    L.seed_everything(fit.seed, verbose=False)
    return TASKS[fit.task].model(fit.rate, last), DendriteCallback(
        "error", targets="frozen", max_parameters=budget, base_epochs=last, verbose=False
    )


def run(fit: Fit) -> Record:
    """What came of one fit."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lower = torch.load(fit.lower, mmap=True)
    train, val, tests = TASKS[fit.task].loaders(lower, Path(fit.folder), fit.count, fit.seed)
    L.seed_everything(fit.seed, verbose=False)
    model, dendrites = prepared(fit)
    begun = time.process_time()
    trainer = finetune.trainer(dendrites, precision=fit.precision)
    trainer.fit(model, train, val)
    spent = {
        "seconds": time.process_time() - begun,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    learned = dendrites_state_dict(model, with_trainable=True)
    return {
        **asdict(fit),
        "val": dendrites.best_model_score,
        **{name: trainer.test(model, loader, verbose=False)[0]["error"] for name, loader in tests.items()},
        "parameters": trainable(model),
        "bytes": sum(value.numel() * value.element_size() for value in learned.values()),
        "trained": sum(record["epochs"] for record in dendrites.history),
        **spent,
    }


class Records:
    """Results in a file, so that none is computed twice."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._known = {_key(record): record for record in map(json.loads, lines)}

    def of(self, fits: list[Fit], work: ProcessPoolExecutor) -> Iterator[Record]:
        """What came of fits, in order."""
        for record in work.map(run, [fit for fit in fits if _key(asdict(fit)) not in self._known]):
            self._known[_key(record)] = record
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        yield from (self._known[_key(asdict(fit))] for fit in fits)


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in Fit.__annotations__ if name not in ("folder", "lower"))


def table(args: Namespace, count: int, lower: str, records: Records, work: ProcessPoolExecutor) -> None:
    """A row for each method."""
    task = TASKS[args.task]
    print(f"\n{args.task}, {count} to train with\n")
    errors = list(task.loaders(torch.load(lower, mmap=True), args.data_dir, count, 0)[2])
    headings = ["", "learning rate", "validation error, %", *(f"{name} error, %" for name in errors)]
    print("|", " | ".join((*headings, "trained", "bytes saved", "epochs", "seconds", "MiB")), "|")
    print("|---" * (len(headings) + 5) + "|")
    epochs = args.epochs or max(6, min(40, 12_000 // count))
    methods = args.methods or [*task.rivals, *(name for name, like in BUDGETS.items() if like in task.rivals)]
    for method in methods:
        rates = OWN_RATES.get(method, args.rates)
        fits = [
            Fit(args.task, str(args.data_dir), lower, count, method, rate, seed, epochs, args.precision)
            for rate in rates
            for seed in range(args.seeds)
        ]
        found = list(records.of(fits, work))
        best = min(([r for r in found if r["rate"] == rate] for rate in rates), key=lambda tried: mean(tried, "val"))
        cells = [method, f"{best[0]['rate']:g}", f"{mean(best, 'val'):.1f}", *(spread(best, name) for name in errors)]
        counts = [f"{best[0][name]:,}" for name in ("parameters", "bytes", "trained")]
        print(
            "|",
            " | ".join((*cells, *counts, *(f"{mean(best, name):.0f}" for name in ("seconds", "memory")))),
            "|",
            flush=True,
        )


def mean(records: list[Record], key: str) -> float:
    return statistics.mean(record[key] for record in records)


def spread(records: list[Record], key: str) -> str:
    """Mean and standard deviation."""
    values = [record[key] for record in records]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", choices=list(TASKS), default="questions")
    parser.add_argument("--train", type=int, nargs="+", default=[200, 1_000], help="examples to train with")
    parser.add_argument("--methods", nargs="+", help="as named in the table; all, if not given")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in all; not given: as many as see 12,000 examples, but 6 to 40")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--records", type=Path, help="a file that has every fit, a line each; none in it is done again")
    args = parser.parse_args()
    records = Records(args.records)
    alone = ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1)
    with TemporaryDirectory() as folder, alone as work:
        lower = f"{folder}/lower.pt"
        torch.save(TASKS[args.task].lower(args.data_dir), lower)
        for count in args.train:
            table(args, count, lower, records, work)


if __name__ == "__main__":
    main()
