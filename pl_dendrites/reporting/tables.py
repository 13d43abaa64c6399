"""The tables that sum up finished phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["decisions_markdown", "summary_table"]

_COLUMNS = ("cycle", "dendrites", "parameters", "epochs", "best score", "accepted", "why")


def summary_table(history: Sequence[Mapping[str, Any]]) -> str:
    """A row per cycle, as text.

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
        ...             }
        ...         ]
        ...     )
        ... )
        cycle  dendrites  parameters  epochs  best score  accepted  why
        -----  ---------  ----------  ------  ----------  --------  -------------------------------
            0          0          10       7         0.5            no improvement in 3 validations
    """
    rows = [_COLUMNS, *_cycles(history)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = (
        "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def decisions_markdown(history: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table and, in the order of time, why each phase ended, in Markdown.

    Args:
        history: records of finished phases.
    """
    table = [_COLUMNS, ["---"] * len(_COLUMNS), *_cycles(history)]
    lines = ["| " + " | ".join(row[:-1]) + " |" for row in table]  # the reasons follow, one for each phase
    return "\n".join(["#### Cycles", "", *lines, "", "#### Why each phase ended", "", *map(_decision, history)])


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
    return cell.ljust(width) if _COLUMNS[column] in ("accepted", "why") or not cell else cell.rjust(width)
