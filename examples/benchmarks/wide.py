"""Shared dendrites on wide inputs beside all that could do as well with as many parameters.

    python examples/benchmarks/wide.py --data-dir DIR [--tasks tox21 ...] [--seeds 5] [--jobs 2]

A network of neuron bodies alone grows up to a budget in one run, with the callback's own settings. Its controls have as
many parameters that are not zero and are trained for as many epochs: sparsely trained (RigL), pruned, plain, plain with
dropout, one more hidden layer. Validation data decide on epochs and variants; test data are read once for each network.
Bytes count indices. Tox21 and lipophilicity need rdkit (`pip install ".[molecules]"`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from controls import CONTROLS
from fits import Unit, work
from tasks import WIDE

BUDGETS = {"mnist": (6_100, 14_000), "tox21": (3_800,), "lipophilicity": (6_500,), "trec": (5_100,)}


def column(records: Iterable[dict[str, Any]], name: str) -> str:
    """One number, or a range."""
    values = sorted(record[name] for record in records)
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def row(name: str, records: list[dict[str, Any]]) -> str:
    found = [record["result"] for record in records]
    spread = f" ± {statistics.stdev(found):.3g}" if len(found) > 1 else ""
    figures = [column(records, key) for key in ("parameters", "bytes", "epochs")]
    return " | ".join([f"| {name}", f"{statistics.mean(found):.4g}{spread}", *figures]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=WIDE, default=list(WIDE))
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--epochs", type=int, help="of the last, long phase")
    options = parser.parse_args()
    do = partial(work, data_dir=options.data_dir, peer_python=None)
    chosen = {"base_epochs": options.epochs} if options.epochs else {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for task in options.tasks:
            for budget in BUDGETS[task]:
                arguments = {**chosen, "max_parameters": budget, "max_dendrites": 5}
                units = [Unit(task, "shared dendrites", seed, 0, arguments) for seed in range(options.seeds)]
                grown = list(pool.map(do, units))
                print(f"\n| {task}, {WIDE[task].metric} | test | parameters | bytes | epochs |\n|---|---|---|---|---|")
                print(row("shared dendrites", grown), flush=True)
                size, epochs = grown[0]["parameters"], grown[0]["epochs"]
                for kind in options.controls:
                    units = [
                        Unit(task, kind, seed, 0, {"max_dendrites": 0}, epochs=epochs, control=kind, parameters=size)
                        for seed in range(options.seeds)
                    ]
                    print(row(kind, list(pool.map(do, units))), flush=True)


if __name__ == "__main__":
    main()
