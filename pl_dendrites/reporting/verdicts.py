"""Whether dendrites helped, each set and all of them, in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["result_line", "set_line"]

Record = Mapping[str, Any]


def set_line(history: Sequence[Record], stays: bool = False) -> str:
    """Whether the set that the last phase began with helped.

    Args:
        history: records of finished phases.
        stays: whether every set stays, be the score better or not.

    Returns:
        A line; an empty one where the last phase is none with a new set.

    Example:
        >>> before = {"accepted": None, "best_score": 0.2781}
        >>> after = {"accepted": True, "cycle": 1, "score": 0.2438, "parameters": 1390, "monitor": "val_loss"}
        >>> set_line([before, after])
        'set 1 kept: val_loss 0.2781 -> 0.2438 (-12.3 %), 1,390 parameters'
    """
    record = history[-1]
    if record["accepted"] is None:
        return ""
    before = history[-2]["best_score"] if len(history) > 1 else None
    change = _change(record, before, record["score"])
    if stays:
        added = {name: value - history[-2].get(name, 0) for name, value in _sizes(record).items()}
        what = _count(added["units"], "shared dendrite") if "units" in added else f"{added['parameters']:,} more"
        size = f"{record['parameters']:,} parameters"
        return f"set {record['cycle']} added: {what}, {change}, {size}"
    if record["accepted"]:
        return f"set {record['cycle']} kept: {change}, {record['parameters']:,} parameters"
    small = ", less than min_delta asks for" if _is_better(record, before) else ""
    return f"set {record['cycle']} did not help and was taken away: {change}{small}"


def result_line(history: Sequence[Record], left: Record, stays: bool = False) -> str:
    """What all sets together achieved, and what is in the model now.

    Args:
        history: records of all phases of a fit.
        left: ``dendrites`` (per neuron), ``parameters`` and, of shared ones, ``units`` of the best network.
        stays: as in :func:`set_line`.

    Example:
        >>> first = {"accepted": None, "score": 0.2781, "best_score": 0.2781, "monitor": "val_loss"}
        >>> last = {"accepted": True, "score": 0.2438, "best_score": 0.2438}
        >>> result_line([first, last], {"dendrites": 1, "parameters": 1390})
        'val_loss 0.2781 -> 0.2438 (-12.3 %): 1 of 1 set kept; the best network, 1 dendrite per neuron, 1,390 parameters, is in the model'
    """  # noqa: E501
    tried = [record for record in history if record["accepted"] is not None]
    kept = len(tried) if stays else sum(record["accepted"] for record in tried)
    first, best = history[0], history[-1]["best_score"]
    has = _count(left["dendrites"], "dendrite") + " per neuron"
    if "units" in left:
        has = _count(left["units"], "shared dendrite")
    size = f"{has}, {left['parameters']:,} parameters"
    if best is None:
        return f"{_metric(first)} was never finite; the model, {size}, is as training left it"
    sets = f"{kept} of {_count(len(tried), 'set')} kept" if tried else "no set was tried"
    sets = f"{_count(kept, 'set')} added" if stays and tried else sets
    change = _change(first, first["score"], best) if kept else f"best {_metric(first)} {best:.4g}"
    return f"{change}: {sets}; the best network, {size}, is in the model"


def _sizes(record: Record) -> dict[str, int]:
    return {name: record[name] for name in ("units", "parameters") if name in record}


def _change(record: Record, before: float | None, after: float | None) -> str:
    metric = _metric(record)
    if after is None:
        return f"no finite {metric}"
    if before is None:
        return f"{metric} {after:.4g}"
    share = f" ({100 * (after - before) / abs(before):+.1f} %)" if before and after != before else ""
    return f"{metric} {before:.4g} -> {after:.4g}{share}"


def _is_better(record: Record, before: float | None) -> bool:
    after, sign = record["score"], 1 if record.get("mode") == "max" else -1
    return after is not None and before is not None and sign * (after - before) > 0


def _metric(record: Record) -> str:
    return str(record.get("monitor", "score"))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number:,} {thing}s"
