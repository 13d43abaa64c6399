"""Says which network of how many is trained, and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from types import TracebackType

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from tqdm import tqdm

from pl_dendrites.comparing.jobs import Job, Key
from pl_dendrites.comparing.runs import Run

__all__ = ["Progress", "duration", "time_left"]

_FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
_MINUTE, _HOUR = 60, 3600
_PAUSE = 0.1  # seconds between two epochs that are shown


class Progress:
    """A bar on a terminal, and a log line for each finished network elsewhere; nothing unless the first process asks.

    Args:
        jobs: all networks of the comparison.
        done: runs that are known, by seed and name.
        workers: networks that are trained at a time.
        kept_in: the folder where finished runs are, if they are kept.
        verbose: whether anything is said.
        bar: whether there may be a bar, be there a terminal; not where fits have their own.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        done: Mapping[Key, Run],
        *,
        workers: int,
        kept_in: str | Path | None,
        verbose: bool,
        bar: bool,
    ) -> None:
        self._jobs, self._done, self._workers, self._kept_in = jobs, dict(done), workers, kept_in
        self._since: dict[Key, float] = {}
        self._shown = 0.0
        self._says = verbose and getattr(rank_zero_only, "rank", 0) == 0
        shown = self._says and bar and sys.stderr.isatty()
        self._bar = tqdm(
            total=len(jobs),
            initial=len(done),
            desc="compare",
            bar_format=_FORMAT,
            dynamic_ncols=True,
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        if self._done:
            self.say(f"{len(self._done)} of {len(self._jobs)} networks were finished before")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            end = (
                " are lost: `dirpath` keeps them" if self._kept_in is None else f" are in '{self._kept_in}': ask again"
            )
            self.say(f"interrupted; {len(self._done)} of {len(self._jobs)} networks were finished and{end}")

    def say(self, message: str) -> None:
        """Say something, in a line of its own."""
        if self._says:
            with self._bar.external_write_mode():
                rank_zero_info(f"compare: {message}")

    def begin(self, job: Job) -> None:
        """A network is about to be trained."""
        self._since[job.seed, job.name] = time.monotonic()
        self._show(f"{job.name}, seed {job.seed}")

    def epoch(self, job: Job, fit: int, epochs: int) -> None:
        """It was trained for another epoch."""
        now = time.monotonic()
        if now - self._shown >= _PAUSE:
            self._shown = now
            self._show(f"{job.name}, seed {job.seed}: fit {fit}, epoch {epochs}")

    def end(self, run: Run, metric: str) -> None:
        """It is finished."""
        self._since.pop((run.seed, run.name), None)
        self._done[run.seed, run.name] = run
        self._bar.update()
        if self._bar.disable:
            found = f"{metric} {run.result:.4g}, {run.parameters:,} parameters, {run.epochs} epochs"
            rest = self._left()
            at = f"{len(self._done)} of {len(self._jobs)}"
            self.say(f"{at}: {run.name}, seed {run.seed}: {found}, {duration(run.seconds)}{rest and '; ' + rest}")

    def _show(self, what: str) -> None:
        if not self._bar.disable:
            rest = self._left()
            self._bar.set_postfix_str(f"{rest and rest + ', '}{what}")

    def _left(self) -> str:
        now = time.monotonic()
        running = {key: now - since for key, since in self._since.items()}
        seconds = time_left(self._jobs, self._done.values(), running)
        return "" if not seconds else f"about {duration(seconds / self._workers)} left"


def time_left(jobs: Sequence[Job], done: Iterable[Run], running: Mapping[Key, float]) -> float | None:
    """Seconds that the rest of a comparison will take, one network after another.

    A network takes as long as with other seeds; until there was one, as long as the longest of those that it is trained
    as much as, or as all do in the mean.

    Args:
        jobs: all of them.
        done: runs that are finished.
        running: for so many seconds, by seed and name.

    Returns:
        ``None`` while nothing is finished.
    """
    found = {(run.seed, run.name): run.seconds for run in done}
    if not found:
        return None
    by_name = {name: mean(own for key, own in found.items() if key[1] == name) for _, name in found}

    def expected(job: Job) -> float:
        like = [by_name[name] for name in job.needs if name in by_name]
        return by_name.get(job.name) or (max(like) if like else mean(by_name.values()))

    rest = [job for job in jobs if (job.seed, job.name) not in found]
    return sum(max(expected(job) - running.get((job.seed, job.name), 0.0), 0.0) for job in rest)


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> [duration(seconds) for seconds in (7.4, 95, 7300)]
        ['7 s', '2 min', '2 h 1 min']
    """
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds // _HOUR:.0f} h {seconds % _HOUR // _MINUTE:.0f} min"
