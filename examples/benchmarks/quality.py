"""Do dendrites help, and would a wider network, or the same one trained for longer, have done as well?

    python examples/benchmarks/quality.py --data-dir DIR [--tasks letters ...] [--rows hybrid ...] [--jobs 2]

Each task is a network and data. Each row is the network with dendrites by one setting of the callback: a name in
``tasks.ROWS``, or JSON of the callback's arguments, as ``'{"learning": "hybrid", "candidates": 8}'``. Beside a row
stand two plain networks, trained for at least as many epochs, and restarted from their best weights with fresh
optimizers at least as often: the same network, and a wider one with as many parameters. Restarts alone gain up to a
point: the controls always have them.

All decisions are made on validation data; test data is read once for each network. Every result goes into
``results.jsonl`` at once, and a run that is started again goes on where it was. ``quality.md`` and ``quality.json`` sum
up, and there is a picture for every task: the results over the parameters.

``--peer-python`` names the Python of an environment with ``perforatedai`` 3.2.9, whose dendrites are then one more row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import results
from fits import Unit, work
from networks import NETWORKS
from tasks import PEER, ROWS, TASKS, task_of

from pl_dendrites.controls import closest_width, parameters_left

# What a network takes, in plain fits: it trains in as many phases, and steps with dendrites cost more.
COST = {"grown": 5, "peer": 5, "plain": 3}


@cache
def as_wide(network: str, parameters: int) -> int:
    """The width that gives a plain network as many parameters."""
    return closest_width(lambda width: parameters_left(NETWORKS[network](width)), parameters)


class Plan:
    """What was found, and what is still to be done, which depends on it: on the size and the epochs of what grew."""

    def __init__(
        self,
        tasks: list[str],
        rows: Mapping[str, Mapping[str, Any]],
        seeds: int,
        arguments: Mapping[str, Any],
        found: Iterable[dict[str, Any]],
    ) -> None:
        self.tasks, self.rows, self.seeds, self.arguments = tasks, rows, seeds, arguments
        self.none = {**arguments, "max_dendrites": 0}
        self.records: results.Records = {}
        for record in found:
            self.take(record)
        self.failed: set[results.Key] = set()

    def take(self, record: dict[str, Any]) -> None:
        """Keep a result, unless it is one of other settings, or of a row that was not asked for."""
        task, row, seed = key = record["task"], record["row"], record["seed"]
        if row in self.rows:
            unit = Unit(task, row, seed, task_of(task).width, {**self.rows[row], **self.arguments})
        else:
            unit = Unit(task, row, seed, record["settings"]["width"], self.none)
        if record["settings"] == unit.settings:
            self.records[key] = record

    def grown(self, task: str, seed: int) -> list[Unit]:
        chosen = task_of(task)
        rows = self.rows if chosen.peer is not None else {name: row for name, row in self.rows.items() if name != PEER}
        units = [Unit(task, name, seed, chosen.width, {**row, **self.arguments}) for name, row in rows.items()]
        return [unit for unit in units if chosen.sparse or unit.arguments.get("fan_in") is None]

    def plain(self, task: str, seed: int) -> list[Unit]:
        """The controls of all that grew, and the other networks of the picture."""
        grown = [self.records[unit.key] for unit in self.grown(task, seed) if self.done(unit)]
        most = {name: max([record[name] for record in grown], default=0) for name in ("epochs", "restarts")}
        chosen = task_of(task)
        controls = [as_wide(chosen.network, record["parameters"]) for record in grown]
        widths = sorted({chosen.width, *chosen.widths, *controls})
        return [Unit(task, results.plain_row(width), seed, width, self.none, **most) for width in widths]

    def done(self, unit: Unit) -> bool:
        record = self.records.get(unit.key)
        if record is None:
            return False
        return "stages" not in record or results.stage(record, unit.epochs, unit.restarts) is not None

    def missing(self, units: list[Unit]) -> list[Unit]:
        return [unit for unit in units if unit.key not in self.failed and not self.done(unit)]

    def next(self) -> Iterator[Unit]:
        """What is missing and can be done now, in the order in which it is best done."""
        for seed in range(self.seeds):
            for task in self.tasks:
                grown = self.missing(self.grown(task, seed))
                yield from grown or self.missing(self.plain(task, seed))

    def hours(self) -> float:
        """About what is missing, on one thread."""
        total = 0.0
        for seed in range(self.seeds):
            for task in self.tasks:
                grown = self.missing(self.grown(task, seed))
                # Before it is known what grew: rows with as many dendrites share a control.
                plain = len(self.missing(self.plain(task, seed))) + (len(grown) + 1) // 2
                fits = sum(COST["peer" if unit.row == PEER else "grown"] for unit in grown) + plain * COST["plain"]
                total += fits * task_of(task).seconds
        return total / 3600


def recorded(path: Path) -> Iterator[dict[str, Any]]:
    """What was found before; a line that was cut off in writing counts for nothing."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


class Here(Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, do: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(do(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def carry_out(plan: Plan, path: Path, jobs: int, do: Callable[[Unit], dict[str, Any]]) -> None:
    """Do what is missing, several units at a time, and write down every result at once."""
    running: dict[Future[dict[str, Any]], Unit] = {}
    executor = Here() if jobs == 1 else ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    with executor as pool, path.open("a") as file:
        if file.tell():
            file.write("\n")  # after a line that may have been cut off
        while True:
            under_way = {unit.key for unit in running.values()}
            ready = [unit for unit in plan.next() if unit.key not in under_way]
            running |= {pool.submit(do, unit): unit for unit in ready[: jobs - len(running)]}
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                name = f"{unit.task}, {unit.row}, seed {unit.seed}"
                if error := future.exception():
                    plan.failed.add(unit.key)
                    print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                record = future.result()
                plan.take(record)
                file.write(json.dumps(record) + "\n")
                file.flush()
                last = record["stages"][-1] if "stages" in record else record
                print(
                    f"{name}: {last['result']:.4g}, {record['parameters']:,} parameters, {last['epochs']} epochs,"
                    f" {last['seconds']:.0f} s; about {plan.hours() / jobs:.1f} h to go",
                    flush=True,
                )


def known(task: str) -> str:
    """A task's name, if there is such a one."""
    try:
        task_of(task)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{task!r} is none of {', '.join(TASKS)}") from None
    return task


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the files are; digits need none")
    tasks = f"{', '.join(TASKS)}; with another width, as letters@64"
    parser.add_argument("--tasks", nargs="+", type=known, default=list(TASKS), metavar="TASK", help=tasks)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"{', '.join(ROWS)}, or JSON")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of every DendriteCallback, as JSON")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--peer-python", type=Path, help="of an environment with perforatedai 3.2.9")
    options = parser.parse_args(argv)
    rows = {}
    for row in options.rows:
        if row not in ROWS and not row.startswith("{"):
            parser.error(f"unknown row {row!r}: there are {', '.join(ROWS)}, and JSON of arguments")
        given = ROWS.get(row) or json.loads(row)
        rows[row if row in ROWS else ", ".join(f"{name}={value}" for name, value in given.items())] = given
    if options.peer_python is not None:
        rows[PEER] = {}
    os.environ["OMP_NUM_THREADS"] = "1"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    plan = Plan(options.tasks, rows, options.seeds, options.arguments, recorded(path))
    print(f"about {plan.hours() / options.jobs:.1f} hours, {options.jobs} at a time", flush=True)
    do = partial(work, data_dir=options.data_dir, peer_python=options.peer_python)
    carry_out(plan, path, options.jobs, do)
    tables = {name: results.Table(name, rows, options.seeds, plan.records, as_wide) for name in options.tasks}
    text = "\n\n".join(table.markdown() for table in tables.values())
    (options.out / "quality.md").write_text(f"{text}\n")
    (options.out / "quality.json").write_text(
        json.dumps({name: table.rows for name, table in tables.items()}, indent=1)
    )
    for name, table in tables.items():
        table.draw(options.out / f"{name}.png")
    print(f"\n{text}")
    if plan.failed:
        sys.exit(f"failed: {sorted(plan.failed)}")


if __name__ == "__main__":
    main()
