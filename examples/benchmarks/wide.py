"""Shared dendrites on wide inputs beside all that could do as well with as many parameters.

    python examples/benchmarks/wide.py --data-dir DIR [--tasks tox21 ...] [--seeds 5] [--jobs 2] [--plain-as-good]

A network of neuron bodies alone grows up to a budget in one run, with the callback's own settings. Its controls have as
many parameters that are not zero and are trained for as many epochs: sparsely trained (RigL), pruned, plain, plain with
dropout, one more hidden layer. Validation data decide on epochs and variants; test data are read once for each network.
Bytes count indices. Tox21 and lipophilicity need rdkit (`pip install ".[molecules]"`).

`--plain-as-good` looks for the smallest plain network whose mean result is no worse: from one of as many parameters on,
each hidden layer is twice as wide as the last, until there are 32 times the parameters, or as many times as it is told.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from controls import CONTROLS, Room
from fits import Unit, work
from networks import SHAPES
from tasks import WIDE

BUDGETS = {"mnist": (6_100, 14_000), "tox21": (3_800,), "lipophilicity": (6_500,), "trec": (5_100,)}


def column(records: Iterable[dict[str, Any]], name: str) -> str:
    """One number, or a range."""
    values = sorted(record[name] for record in records)
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def mean(records: Iterable[dict[str, Any]]) -> float:
    return statistics.mean(record["result"] for record in records)


def row(name: str, records: list[dict[str, Any]]) -> str:
    found = [record["result"] for record in records]
    spread = f" ± {statistics.stdev(found):.3g}" if len(found) > 1 else ""
    figures = [column(records, key) for key in ("parameters", "bytes", "epochs")]
    return " | ".join([f"| {name}", f"{mean(records):.4g}{spread}", *figures]) + " |"


def as_good(grown: list[dict[str, Any]], most: float, plain_of: Callable[..., list[dict[str, Any]]]) -> Iterator[str]:
    """Rows of plain networks, each twice as wide as the last, and what the first that is as good says."""
    size = grown[0]["parameters"]
    width = Room(*SHAPES[grown[0]["task"]], 0, size).widest()
    while True:
        plain = plain_of(width=width)
        yield row(f"plain, {width} wide", plain)
        ratio = size / plain[0]["parameters"]
        found = mean(plain) <= mean(grown)
        if found or ratio * most <= 1:
            yield f"\nparameters over those of the plain network as good: {'' if found else 'below '}{ratio:.3g}"
            return
        width *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=WIDE, default=list(WIDE))
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--epochs", type=int, help="of the last, long phase")
    parser.add_argument("--plain-as-good", type=float, nargs="?", const=32.0, metavar="TIMES", help="look for it")
    options = parser.parse_args()
    do = partial(work, data_dir=options.data_dir, peer_python=None)
    chosen = {"base_epochs": options.epochs} if options.epochs else {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:

        def train(task: str, kind: str, arguments: dict[str, Any], **given: Any) -> list[dict[str, Any]]:
            units = [Unit(task, kind, seed, arguments=arguments, **given) for seed in range(options.seeds)]
            return list(pool.map(do, units))

        def control(task: str, kind: str, width: int = 0, **given: Any) -> list[dict[str, Any]]:
            return train(task, kind, {"max_dendrites": 0}, control=kind, width=width, **given)

        for task in options.tasks:
            for budget in BUDGETS[task]:
                arguments = {**chosen, "max_parameters": budget, "max_dendrites": 5}
                grown = train(task, "shared dendrites", arguments, width=0)
                print(f"\n| {task}, {WIDE[task].metric} | test | parameters | bytes | epochs |\n|---|---|---|---|---|")
                print(row("shared dendrites", grown), flush=True)
                size, epochs = grown[0]["parameters"], grown[0]["epochs"]
                for kind in options.controls:
                    print(row(kind, control(task, kind, epochs=epochs, parameters=size)), flush=True)
                if options.plain_as_good:
                    for line in as_good(grown, options.plain_as_good, partial(control, task, "plain", epochs=epochs)):
                        print(line, flush=True)


if __name__ == "__main__":
    main()
