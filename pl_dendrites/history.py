"""What is kept of finished phases, and the table that sums them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.monitor import correlation_figures, parameter_count

__all__ = ["phase_record", "summary_table"]

_COLUMNS = ("cycle", "dendrites", "parameters", "epochs", "best score", "accepted", "why")


def phase_record(machine: PhaseMachine, network: DendriticNetwork, reason: str) -> dict[str, Any]:
    """Describe the phase that ends, as plain values.

    Args:
        machine: before it goes on to the next phase.
        network: before it changes.
        reason: why the phase ends.

    Returns:
        A dict with ``cycle``, ``phase``, ``dendrites`` (per neuron), ``parameters`` (of the model), ``epochs``,
        ``score`` (best one of a base phase), ``best_score`` (of the network that is kept), ``accepted`` (whether the
        set on trial was; ``None`` where none was), ``correlation`` (by layer) and ``reason``.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> record = phase_record(PhaseMachine(), attach(nn.Linear(4, 2)), "training ended")
        >>> record["phase"], record["dendrites"], record["parameters"]
        ('base', 0, 10)
    """
    base = machine.phase == "base"
    return {
        "cycle": machine.cycle,
        "phase": machine.phase,
        "dendrites": network.num_dendrites,
        "parameters": parameter_count(network.model),
        "epochs": machine.epochs,
        "score": machine.phase_best if base else None,
        "best_score": machine.best,
        "accepted": not machine.on_trial if base and machine.cycle > 0 else None,
        "correlation": correlation_figures(network.correlations()),
        "reason": reason,
    }


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
    cycles: dict[int, list[Mapping[str, Any]]] = {}
    for record in history:
        cycles.setdefault(record["cycle"], []).append(record)
    rows = [_COLUMNS, *(_row(cycle, records) for cycle, records in cycles.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = (
        "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _row(cycle: int, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    last = records[-1]
    score, accepted = last.get("score"), last.get("accepted")
    return (
        str(cycle),
        str(last["dendrites"]),
        f"{last['parameters']:,}",
        " + ".join(str(record["epochs"]) for record in records),
        "" if score is None else f"{score:.4g}",
        {True: "yes", False: "no", None: ""}[accepted],
        last["reason"],
    )


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if _COLUMNS[column] in ("accepted", "why") or not cell else cell.rjust(width)
