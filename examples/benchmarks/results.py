"""What came out, as a table and a picture: networks with dendrites, and their controls beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks import task_of

Key = tuple[str, str, int]
Records = dict[Key, dict[str, Any]]

UNITS = {"error": "Test error in %", "bits": "Bits per character of the test text"}


def plain_row(width: int) -> str:
    return f"plain, {width} wide"


def stage(record: dict[str, Any], epochs: int, restarts: int) -> dict[str, Any] | None:
    """Of a plain network: the first one that had as much training and as many restarts, or nothing if none had."""
    enough = [one for one in record["stages"][restarts:] if one["epochs"] >= epochs]
    return {**enough[0], "parameters": record["parameters"]} if enough else None


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    found = {name: statistics.mean(run[name] for run in runs) for name in ("parameters", "epochs", "seconds")}
    values = [run["result"] for run in runs]
    spread = statistics.stdev(values) if len(runs) > 1 else None
    return {"result": statistics.mean(values), "spread": spread, "runs": len(runs), **found}


def shown(cell: dict[str, Any]) -> str:
    spread = "" if cell["spread"] is None else f" ± {cell['spread']:.2g}"
    return f"{cell['result']:.3g}{spread}"


def as_good(result: float, plain: Sequence[tuple[float, float]]) -> float | None:
    """About how many parameters a plain network needs for a result, between those that were trained.

    Args:
        result: smaller is better.
        plain: parameters and results of plain networks.

    Returns:
        ``None`` if none of them is as good; of the smallest one, its own, if that is.

    Example:
        >>> round(as_good(6.0, [(100, 8.0), (400, 4.0), (200, 9.0)]))
        200
        >>> as_good(3.0, [(100, 8.0), (400, 4.0)]), as_good(9.0, [(100, 8.0), (400, 4.0)])
        (None, 100)
    """
    frontier = [point for point in sorted(plain) if all(point[1] < one[1] for one in plain if one < point)]
    reach = next((place for place, (_, best) in enumerate(frontier) if best <= result), None)
    if not reach:
        return frontier[0][0] if reach == 0 else None
    (few, bad), (many, good) = frontier[reach - 1 : reach + 1]
    return few * (many / few) ** ((bad - result) / (bad - good))


class Table:
    """Of one task.

    Args:
        name: of the task.
        rows: what grew.
        seeds: 0, 1, ...; one that lacks a result or a control is left out of that row.
        records: what was found.
        as_wide: the width that gives a plain network as many parameters.
    """

    def __init__(
        self, name: str, rows: Iterable[str], seeds: int, records: Records, as_wide: Callable[[str, int], int]
    ) -> None:
        self.name, self.task = name, task_of(name)
        self._records, self._as_wide, self._seeds = records, as_wide, range(seeds)
        plain = self._plain()
        self._points = [(row["parameters"], row["result"]) for row in plain if row["kind"] == "restarted"]
        self.rows = [*plain, *(row for row in map(self._grown, rows) if row)]

    def _plain(self) -> list[dict[str, Any]]:
        widths = sorted({width for width in range(1, 4097) if (self.name, plain_row(width), 0) in self._records})
        rows = []
        for width in widths:
            runs = [self._records.get((self.name, plain_row(width), seed)) for seed in self._seeds]
            if not all(runs):
                continue  # a control of some seeds alone
            stages = [[{**one, "parameters": run["parameters"]} for one in run["stages"]] for run in runs if run]
            if width == self.task.width:
                rows.append({"row": plain_row(width), "kind": "plain", **summary([s[0] for s in stages])})
            row = f"{plain_row(width)}, restarted"
            rows.append({"row": row, "kind": "restarted", **summary([s[-1] for s in stages])})
        return rows

    def _grown(self, row: str) -> dict[str, Any] | None:
        runs, same, wider = [], [], []
        for seed in self._seeds:
            run = self._records.get((self.name, row, seed))
            if run is None:
                continue
            widths = [self.task.width, self._as_wide(self.task.network, run["parameters"])]
            plain = [self._records.get((self.name, plain_row(width), seed)) for width in widths]
            controls = [one and stage(one, run["epochs"], run["restarts"]) for one in plain]
            if all(controls):
                runs, same, wider = [*runs, run], [*same, controls[0]], [*wider, controls[1]]
        if not runs:
            return None
        found = {"row": row, "kind": "grown", **summary(runs)}
        found["dendrites"] = statistics.mean(run["dendrites"] for run in runs)
        found["as good"] = as_good(found["result"], self._points)
        for name, controls in (("same network", same), ("as many parameters", wider)):
            control = summary(controls)
            ratio = found["result"] / control["result"] if control["result"] else None
            better = sum(run["result"] < one["result"] for run, one in zip(runs, controls, strict=True))
            found[name] = {**control, "ratio": ratio, "better in": better}
        return found

    def markdown(self) -> str:
        lines = [
            f"## {self.name}\n",
            f"{UNITS[self.task.metric]}; mean ± sample standard deviation over the seeds. Behind a control: what the"
            " dendrites have, as a multiple of it, and the seeds in which they have less. Last, about the parameters of"
            " a plain network that is as good.\n",
            "| network | result | parameters | epochs | seconds | dendrites | same network, restarted"
            " | as many parameters, restarted | plain, as good |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = [row["row"], shown(row), *(f"{row[key]:,.0f}" for key in ("parameters", "epochs", "seconds"))]
            cells.append(f"{row['dendrites']:.1f}" if "dendrites" in row else "")
            for name in ("same network", "as many parameters"):
                control = row.get(name)
                ratio = "" if not control or control["ratio"] is None else f"x {control['ratio']:.2f}, "
                cells.append(f"{shown(control)} ({ratio}{control['better in']} of {row['runs']})" if control else "")
            equal = row.get("as good", "")
            cells.append("none is" if equal is None else equal and f"{equal:,.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """The results over the parameters, with the frontier: plain networks that no smaller one beats."""
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator

        style.use(Path(__file__).parent / "pictures.mplstyle")
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel="parameters", ylabel=UNITS[self.task.metric], title=self.name)
        plain = sorted((row for row in self.rows if row["kind"] == "restarted"), key=lambda row: row["parameters"])
        frontier = [row for i, row in enumerate(plain) if all(row["result"] < one["result"] for one in plain[:i])]
        axes.plot(*_points(frontier), color="0.6", label="frontier of plain networks")
        axes.errorbar(*_points(plain), _spreads(plain), fmt=".", color="0.4", label="plain, restarted")
        for row in (row for row in self.rows if row["kind"] == "grown"):
            axes.errorbar(*_points([row]), _spreads([row]), fmt="o", capsize=2, label=row["row"])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["parameters"] for row in rows], [row["result"] for row in rows]


def _spreads(rows: list[dict[str, Any]]) -> list[float]:
    return [row["spread"] or 0 for row in rows]
