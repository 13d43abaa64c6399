"""What users look at in a notebook: a text, a list of records and a comparison that are shown as tables there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pl_dendrites.core.markup import Name, Table, in_notebook

__all__ = ["Printed", "Records", "Sizes", "comparison_table"]


class Printed(str):
    """A text that a notebook shows as a table.

    Args:
        text: what is printed.
        table: what a notebook shows; ``None``: the text.

    Example:
        >>> shown = Printed("a table", Table("Layers", ("layer", "neurons"), [("net.0", "8")]))
        >>> print(shown)
        a table
        >>> "<table>" in shown._repr_html_()
        True
    """

    table: Table | None = None

    def __new__(cls, text: str, table: Table | None = None) -> Printed:  # noqa: D102 - the class says it
        self = super().__new__(cls, text)
        self.table = table
        return self

    def _repr_html_(self) -> str | None:
        return None if self.table is None else in_notebook(self.table)


class Records(list[dict[str, Any]]):
    """A list of dicts of plain values that a notebook shows as a table.

    Attributes:
        title: what they are.
        columns: the keys that a table has, where any of the dicts does.

    Example:
        >>> class Scores(Records):
        ...     title, columns = "Scores", ("cycle", "score")
        >>> scores = Scores([{"cycle": 0, "score": 0.51234}, {"cycle": 1, "units": 16}])
        >>> scores == [{"cycle": 0, "score": 0.51234}, {"cycle": 1, "units": 16}]
        True
        >>> "<td>0.5123</td>" in scores._repr_html_(), "units" in scores._repr_html_()
        (True, False)
    """

    title = ""
    columns: Sequence[str] = ()

    def _repr_html_(self) -> str:
        columns = [key for key in self.columns if any(key in record for record in self)]
        rows = [[_cell(record.get(key)) for key in columns] for record in self]
        words = {key for key in columns for record in self if isinstance(record.get(key), str | bool)}
        return in_notebook(Table(self.title, columns, rows, tuple(words)))


class Sizes(Records):
    """The networks that a fit passed, as :attr:`~pl_dendrites.DendriteCallback.frontier` has them."""

    title = "Networks to take"
    columns = ("parameters", "score", "cycle", "dendrites", "units")


def comparison_table(metric: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row for every network of a comparison: means over the seeds, of the metric with the standard deviation.

    Args:
        metric: name of the metric on test data.
        runs: every run as a dict, as :meth:`~pl_dendrites.comparison.Comparison.rows` returns them.

    Example:
        >>> run = {"name": "plain", "result": 0.5, "parameters": 10, "bytes": 40, "epochs": 3, "seconds": 0.5}
        >>> print(comparison_table("error", [run, run | {"result": 0.7}]))
        network       error  parameters  bytes  epochs  seconds  seeds
        plain    0.6 ± 0.14          10     40       3      0.5      2
    """
    of_network: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        of_network.setdefault(run["name"], []).append(run)
    formats = {"parameters": ",.0f", "bytes": ",.0f", "epochs": ",.0f", "seconds": ",.1f"}
    rows = []
    for name, own in of_network.items():
        results = [run["result"] for run in own]
        spread = f" ± {statistics.stdev(results):.2g}" if len(own) > 1 else ""
        means = (format(statistics.mean(run[key] for run in own), shown) for key, shown in formats.items())
        rows.append((name, f"{statistics.mean(results):.4g}{spread}", *means, str(len(own))))
    return Table("Means over the seeds, on test data", ("network", Name(metric), *formats, "seeds"), rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
