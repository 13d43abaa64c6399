"""The tables that sum up finished phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from pl_dendrites.core.markup import Table
from pl_dendrites.reporting.notebook import Printed

__all__ = ["decisions_markdown", "summary", "summary_table"]

_WIDTH, _NARROWEST, _GAP = 100, 24, "  "
_LEFT = (5, 6)  # columns of text: accepted, why


def summary(history: Sequence[Mapping[str, Any]]) -> Printed:
    """A row per cycle: text, and in a notebook a table.

    Args:
        history: records of finished phases.
    """
    words = [column for i, column in enumerate(_columns(history)) if i in _LEFT]
    return Printed(summary_table(history), Table("Cycles", _columns(history), _cycles(history), words))


def summary_table(history: Sequence[Mapping[str, Any]]) -> str:
    """A row per cycle, as text of at most 100 columns: what is longer goes on in the next line.

    Args:
        history: records of finished phases.

    Example:
        >>> print(
        ...     summary_table(
        ...         [
        ...             {
        ...                 "phase": "base",
        ...                 "cycle": 0,
        ...                 "dendrites": 0,
        ...                 "parameters": 10,
        ...                 "epochs": 7,
        ...                 "score": 0.5,
        ...                 "accepted": None,
        ...                 "reason": "no improvement in 3 validations",
        ...                 "monitor": "val_loss",
        ...             }
        ...         ]
        ...     )
        ... )
        cycle  dendrites  parameters  epochs  best val_loss  accepted  why
        -----  ---------  ----------  ------  -------------  --------  -------------------------------
            0          0          10       7            0.5            no improvement in 3 validations
    """
    rows = [_columns(history), *_cycles(history)]
    limits = [_NARROWEST] * (len(rows[0]) - 1)
    widths = [min(limit, max(len(row[i]) for row in rows)) for i, limit in enumerate(limits)]
    left = max(_NARROWEST, _WIDTH - sum(widths) - len(_GAP) * len(widths))
    widths.append(min(left, max(len(row[-1]) for row in rows)))
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(line for row in rows for line in _lines(row, widths))


def _lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    wrapped = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        _GAP.join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))).rstrip()
        for cells in zip_longest(*wrapped, fillvalue="")
    ]


def decisions_markdown(history: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table and, in the order of time, why each phase ended, in Markdown.

    Args:
        history: records of finished phases.
    """
    columns = _columns(history)
    table = [columns, ["---"] * len(columns), *_cycles(history)]
    lines = ["| " + " | ".join(row[:-1]) + " |" for row in table]  # the reasons follow, one for each phase
    return "\n".join(["#### Cycles", "", *lines, "", "#### Why each phase ended", "", *map(_decision, history)])


def _columns(history: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    metric = history[0].get("monitor", "score") if history else "score"
    return "cycle", "dendrites", "parameters", "epochs", f"best {metric}", "accepted", "why"


def _cycles(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    cycles: dict[int, list[Mapping[str, Any]]] = {}
    for record in history:
        cycles.setdefault(record["cycle"], []).append(record)
    return [_cycle(cycle, records) for cycle, records in cycles.items()]


def _cycle(cycle: int, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    last = records[-1]
    return (
        str(cycle),
        str(last["dendrites"]),
        f"{last['parameters']:,}",
        " + ".join(str(record["epochs"]) for record in records),
        _number(last.get("score")),
        {True: "yes", False: "no", None: ""}[last.get("accepted")],
        last["reason"],
    )


def _decision(record: Mapping[str, Any]) -> str:
    facts = [f"{record['epochs']} epochs"]
    if record["score"] is not None:
        facts.append(f"best score {_number(record['score'])}")
    if record["correlation"]:
        name, figures = max(record["correlation"].items(), key=lambda item: item[1]["max"])
        facts.append(f"largest correlation {figures['max']:.3f} in `{name or 'model'}`")
    return f"1. **{record['phase']} phase of cycle {record['cycle']}** ({', '.join(facts)}): {record['reason']}"


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column in _LEFT or not cell else cell.rjust(width)
