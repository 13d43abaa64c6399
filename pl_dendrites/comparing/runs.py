"""One network of a comparison, trained and tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_type_hints

__all__ = ["Run", "run_of"]


@dataclass(frozen=True)
class Run:
    """One network of a comparison, trained and tested.

    Attributes:
        name: what was compared: ``"plain"``, ``"plain, restarted"``, ``"with dendrites"``, ``"wider, restarted"``,
            ``"deeper, restarted"``, ``"pruned"`` or ``"sparse"``; of several settings, the name of each and
            ``"as large as NAME, restarted"``, ``"deeper, as large as NAME, restarted"`` and so on.
        seed: of the run.
        result: the metric on test data, which is read once.
        score: the best one on validation data, which decided when to stop and what to keep.
        parameters: of the network that was kept; of one that is sparse, those that are left.
        epochs: of all its fits together.
        seconds: of these, wall clock.
        dendrites: per neuron.
        tries: sets of dendrites that were tried.
        bytes: that it takes to save the network, indices of what is sparse included; see
            :func:`~pl_dendrites.controls.saved_bytes`.
        kind: ``"dendrites"``, or what stands beside it: ``"plain"``, ``"restarted"``, ``"wider"``, ``"deeper"``,
            ``"pruned"`` or ``"sparse"``.
        beside: name of the network with dendrites that a control is as large as.
        width: that a control was made with; ``None`` where none was chosen.
    """

    name: str
    seed: int
    result: float
    score: float
    parameters: int
    epochs: int
    seconds: float
    dendrites: int
    tries: int
    bytes: int
    kind: str = ""
    beside: str = ""
    width: int | None = None


def run_of(row: Any) -> Run:
    """The run that a dict of plain values tells of, as ``dataclasses.asdict`` made it.

    Args:
        row: of a file that anyone may have written.

    Raises:
        ValueError: if it is no run; says which values are missing, too many or of another type.

    Example:
        >>> run_of({"name": "plain", "seed": "0"})
        Traceback (most recent call last):
        ValueError: no run of a comparison: see 'beside', 'bytes', 'dendrites', 'epochs', 'kind', ...
    """
    hints = {name: float | int if hint is float else hint for name, hint in get_type_hints(Run).items()}
    if not isinstance(row, dict):
        raise ValueError(f"no run of a comparison: a {type(row).__name__}")
    wrong = {
        *(row.keys() ^ hints.keys()),
        *(name for name in row.keys() & hints if not isinstance(row[name], hints[name])),
    }
    if wrong:
        raise ValueError(f"no run of a comparison: see {', '.join(map(repr, sorted(wrong)))}")
    return Run(**row)
