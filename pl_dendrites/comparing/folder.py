"""Finished runs in a folder, so that a comparison that was interrupted goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pl_dendrites.comparing.jobs import Key
from pl_dendrites.comparing.question import differences
from pl_dendrites.comparing.runs import Run, run_of

__all__ = ["Folder", "read_json", "write_json"]

_QUESTION = "question.json"
_LATER = ("wider", "deeper", "dense")  # what a comparison may be asked later, for other runs do not depend on it


class Folder:
    """Runs of one comparison, a JSON file for each. A file is whole or not there, whenever the process is killed.

    Args:
        path: the folder; it is made if it is not there.
        question: what the runs answer, see :func:`~pl_dendrites.comparing.question`.

    Raises:
        ValueError: if the folder has runs of another question; says what differs. If a file cannot be read.
    """

    def __init__(self, path: str | Path, question: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        file = self._path / _QUESTION
        before = read_json(file) if file.exists() else {}
        if not isinstance(before, dict):
            raise ValueError(f"'{file}' is no question of a comparison; delete the folder, or name another one")
        later = {name for name in _LATER if name not in before or name not in question}
        if before:
            _refuse(self._path, before, question, later)
        if before != {**before, **question}:
            self._write(_QUESTION, {**before, **question})

    def runs(self) -> dict[Key, Run]:
        """Those that are finished, by seed and name.

        Raises:
            ValueError: if a file cannot be read.
        """
        found = {}
        for file in sorted(self._path.glob("seed *.json")):
            try:
                run = run_of(read_json(file))
            except ValueError as error:
                raise ValueError(
                    f"'{file}' cannot be read: {error}; delete it, and its network is trained anew"
                ) from error
            found[run.seed, run.name] = run
        return found

    def add(self, run: Run) -> None:
        """Keep a run that is finished."""
        self._write(f"seed {run.seed}, {quote(run.name, safe=' ,')}.json", asdict(run))

    @rank_zero_only
    def _write(self, name: str, values: Any) -> None:
        write_json(self._path / name, values)


def _refuse(path: Path, before: Mapping[str, Any], question: Mapping[str, Any], later: set[str]) -> None:
    there, here = ({key: own for key, own in each.items() if key not in later} for each in (before, question))
    lines = list(differences(there, here))
    if lines:
        raise ValueError(
            f"'{path}' has runs of another comparison; name another folder, or ask the same again. What differs:\n  "
            + "\n  ".join(lines)
        )


def read_json(path: Path) -> Any:
    """What a file says.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON ({error})") from error


def write_json(path: Path, values: Any) -> None:
    """Write a file that is whole or, if the process is killed meanwhile, as it was before.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "values.json"
        >>> write_json(path, {"seed": 0})
        >>> read_json(path)
        {'seed': 0}
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
