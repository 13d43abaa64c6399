"""A report of growth: what grew where and when, what it gained, what was rejected and why, and what it costs.

Of a finished or interrupted run there is a command, which reads the history from any of the run's checkpoints::

    pl-dendrites-report lightning_logs/version_0 report.html

``python -m pl_dendrites.report`` is the same.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from pl_dendrites.core.checks import check
from pl_dendrites.reporting.figures import can_draw
from pl_dendrites.reporting.page import Block, in_frame, to_html, to_markdown
from pl_dendrites.reporting.report import TITLE, Controls, Record, report_blocks
from pl_dendrites.saved.fit_state import FitState
from pl_dendrites.saved.folder import is_folder_checkpoint
from pl_dendrites.saved.loading import read_checkpoint

__all__ = ["Report", "main", "read_history", "write_report"]


@dataclass(frozen=True)
class Report:
    """A report, which a notebook shows.

    Attributes:
        path: the file that it was written to; ``None``: to none.
        blocks: what it says.
    """

    path: Path | None
    blocks: Sequence[Block]

    def __str__(self) -> str:
        return f"{TITLE}{'' if self.path is None else f': {self.path}'}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return in_frame(TITLE, self.blocks)


@rank_zero_only
def write_report(path: str | Path | None, history: Sequence[Record], controls: Controls | None = None) -> Report:
    """Write a report. Of several processes the first one writes, and the others get ``None``.

    Args:
        path: a ``.html`` file, complete in itself, or a ``.md`` file, which has its pictures beside it; ``None``:
            nothing is written.
        history: records of phases, as in a callback's ``history``.
        controls: plain networks to compare with, by what they are to be called. Each is a dict with the best ``score``
            of the metric that decided, and ``parameters`` and ``epochs`` where known:
            ``{"24 hidden neurons": {"score": 0.31, "parameters": 1234, "epochs": 137}}``.

    Returns:
        The report. As the last value of a notebook's cell it is shown there.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if there is nothing to report, the file has another ending, or a control is not as described.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> from pl_dendrites.core.phases import PhaseMachine
        >>> from pl_dendrites.reporting.records import phase_record
        >>> history = [phase_record(PhaseMachine(), attach(nn.Linear(4, 2)), "training ended")]
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     report = write_report(f"{directory}/report.html", history)
        ...     report.path.read_text(encoding="utf-8")[:15]
        '<!DOCTYPE html>'
    """
    path = None if path is None else Path(path)
    ending = "" if path is None else path.suffix
    check("path", path is None or ending in (".html", ".md"), "a file that ends in .html or .md", str(path))
    if not can_draw():
        raise ModuleNotFoundError("a report needs matplotlib, which draws: pip install matplotlib")
    blocks = report_blocks(history, controls)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = to_html(TITLE, blocks) if ending == ".html" else to_markdown(TITLE, blocks, path)
        path.write_text(text, encoding="utf-8")
    return Report(path, blocks)


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The history of a run, the phase that was running among it, as a checkpoint of the run has it.

    Args:
        path: a checkpoint, or a directory of which the newest that has a history is taken.

    Raises:
        ValueError: if there is none; says what was found.
    """
    path = Path(path)
    if not path.is_dir() or is_folder_checkpoint(path):
        return _history_in(path)
    there = [file for file in path.rglob("*.ckpt") if file.is_file() or file.is_dir()]
    found = sorted(there, key=lambda file: file.stat().st_mtime, reverse=True)
    failures = []
    for file in found:
        try:
            return _history_in(file)
        except ValueError as error:
            failures.append(str(error))
    why = "\n  ".join(failures) or "there is no file that ends in .ckpt"
    raise ValueError(
        f"no history of growth in '{path}'. It is read from checkpoints: those of ModelCheckpoint, or the best.ckpt"
        f" that DendriteCallback(dirpath=...) writes.\n  {why}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``pl-dendrites-report``.

    Args:
        arguments: instead of those of the process.
    """
    parser = ArgumentParser("pl-dendrites-report", description="Write a report of a run that grew dendrites.")
    parser.add_argument("run", type=Path, help="the run's log directory, or one of its checkpoints")
    parser.add_argument("report", type=Path, help="the file to write: .html, or .md with pictures beside it")
    parser.add_argument(
        "--controls",
        type=Path,
        metavar="FILE",
        help='JSON of plain networks to compare with: {"NAME": {"score": 0.3, "parameters": 1234, "epochs": 50}}',
    )
    given = parser.parse_args(arguments)
    try:
        controls = json.loads(given.controls.read_text(encoding="utf-8")) if given.controls else None
        write_report(given.report, read_history(given.run), controls)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.error(str(error))
    rank_zero_info(f"The report is in {given.report}")


def _history_in(path: Path) -> list[dict[str, Any]]:
    callbacks = read_checkpoint(path, weights=False).get("callbacks")
    states = [
        state
        for state in (callbacks.values() if isinstance(callbacks, Mapping) else [])
        if isinstance(state, Mapping) and {"machine", "history"} <= set(state)
    ]
    if not states:
        raise ValueError(f"'{path}' has no state of a DendriteCallback")
    try:
        state = FitState.from_dict(states[0])
    except ValueError as error:
        raise ValueError(f"the DendriteCallback state in '{path}' cannot be read: {error}") from error
    return [*state.history, *filter(None, [state.running])]


if __name__ == "__main__":
    main()
