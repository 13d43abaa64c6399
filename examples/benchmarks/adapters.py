"""Placed dendrites on a frozen encoder beside other adapters with as many trainable parameters.

    python examples/benchmarks/adapters.py --data-dir DIR [--questions 200 1000] [--seeds 3] [--fine] [--jobs 2]

The last two layers of MiniLM-L6 learn to sort TREC's questions (see ``examples/finetune.py``), six classes or fifty
(``--fine``). Every method gets the same questions, epochs, optimizer and schedule; of its learning rates the one counts
whose mean error on 500 validation questions is smallest. Dendrites are told a budget: what LoRA has, which peft
computes. Seconds, of one processor, and peak memory are those of one fit in a process of its own.
"""

from __future__ import annotations

import json
import logging
import resource
import statistics
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rivals import RIVALS
from torch.utils.data import DataLoader

from pl_dendrites import DendriteCallback, dendrites_state_dict

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune

RATES = (2e-3, 4e-3)
OWN_RATES = {"everything": (2e-4, 4e-4)}
GROWTH = 6  # epochs of the head alone, before there are dendrites; the others train as many more


@dataclass(frozen=True)
class Fit:
    """One of them."""

    folder: str
    fine: bool
    count: int
    method: str
    rate: float
    seed: int
    epochs: int
    precision: Any


@cache
def data(folder: str, count: int, seed: int, fine: bool) -> tuple[list[finetune.Question], ...]:
    return finetune.questions(Path(folder), count, seed, fine)


@cache
def adapter_size(fine: bool) -> int:
    """Trainable parameters of LoRA with its head."""
    model = finetune.Sorter(50 if fine else 6)
    RIVALS["LoRA, rank 1"](model.layers)
    return trainable(model)


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def run(fit: Fit) -> dict[str, Any]:
    """What came of one fit."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    train, val, test = data(fit.folder, fit.count, fit.seed, fit.fine)
    L.seed_everything(fit.seed, verbose=False)
    grows = fit.method not in RIVALS
    epochs = fit.epochs if grows else fit.epochs + GROWTH
    model = finetune.Sorter(50 if fit.fine else 6, fit.rate, epochs)
    if grows:
        arguments: dict[str, Any] = {"targets": "frozen", "max_parameters": adapter_size(fit.fine)}
        arguments["growth_epochs"] = GROWTH
    else:
        RIVALS[fit.method](model.layers)
        arguments = {"max_dendrites": 0}
    begun = time.process_time()
    dendrites = DendriteCallback("error", base_epochs=epochs, verbose=False, **arguments)
    trainer = finetune.trainer(dendrites, precision=fit.precision)
    trainer.fit(model, *finetune.loaders(train, val))
    seconds = time.process_time() - begun
    (last,) = trainer.test(model, DataLoader(test, 128, collate_fn=finetune.collate), verbose=False)
    learned = dendrites_state_dict(model, with_trainable=True)
    return {
        **asdict(fit),
        "val": dendrites.best_model_score,
        "test": last["error"],
        "parameters": trainable(model),
        "bytes": sum(value.numel() * value.element_size() for value in learned.values()),
        "epochs": sum(record["epochs"] for record in dendrites.history),
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def mean(records: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(record[key] for record in records)


def table(args: Namespace, count: int, work: ProcessPoolExecutor) -> None:
    """A row for each method."""
    print(f"\n{count} questions, {50 if args.fine else 6} classes\n")
    print("| | learning rate | test error, % | trained | bytes saved | epochs | seconds | MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for method in [*RIVALS, "dendrites"]:
        fit = Fit(str(args.data_dir), args.fine, count, method, 0.0, 0, args.epochs, args.precision)
        pairs = list(product(OWN_RATES.get(method, RATES), range(args.seeds)))
        tried = list(work.map(run, [replace(fit, rate=rate, seed=seed) for rate, seed in pairs]))
        by_rate = {rate: [r for r in tried if r["rate"] == rate] for rate in OWN_RATES.get(method, RATES)}
        rate = min(by_rate, key=lambda rate: mean(by_rate[rate], "val"))
        best = by_rate[rate]
        if args.records:
            with args.records.open("a") as file:
                file.writelines(json.dumps(record | {"chosen": record["rate"] == rate}) + "\n" for record in tried)
        errors = [record["test"] for record in best]
        spread = f" ± {statistics.stdev(errors):.1f}" if len(errors) > 1 else ""
        with get_context("spawn").Pool(1) as alone:
            (apart,) = alone.map(run, [replace(fit, rate=rate)])
        figures = (f"{best[0]['parameters']:,}", f"{best[0]['bytes']:,}", f"{mean(best, 'epochs'):.0f}")
        costs = (f"{apart['seconds']:.0f}", f"{apart['memory']:.0f}")
        print(
            f"| {method} | {rate:g} | {mean(best, 'test'):.1f}{spread} | {' | '.join((*figures, *costs))} |", flush=True
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--questions", type=int, nargs="+", default=[200, 1_000])
    parser.add_argument("--fine", action="store_true", help="fifty classes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--records", type=Path, help="a file to which every fit is added, a line each")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as work:
        for count in args.questions:
            table(args, count, work)


if __name__ == "__main__":
    main()
