"""What a comparison is to train, and after what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from pl_dendrites.comparing.runs import Run

__all__ = ["Job", "Key", "Observer", "Tell", "in_order", "runs_beside"]

Key = tuple[int, str]
# Is called after each epoch, with the number of the fit and the epochs of all its fits.
Tell = Callable[[int, int], None]


class Job(Protocol):
    """One network to be trained with one seed."""

    @property
    def name(self) -> str:
        """What the run is to be called."""

    @property
    def seed(self) -> int:
        """Of the run."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs with the same seed that must be known before."""

    def train(self, beside: Sequence[Run], tell: Tell) -> Run:
        """Train and test it.

        Args:
            beside: the runs that it needs.
            tell: is told how far it is.
        """


class Observer(Protocol):
    """Is told what happens."""

    def begin(self, job: Job) -> None:
        """A network is about to be trained."""

    def epoch(self, job: Job, fit: int, epochs: int) -> None:
        """It was trained for another epoch."""


def runs_beside(job: Job, done: Mapping[Key, Run]) -> list[Run] | None:
    """The runs that a job needs; ``None`` while one of them is not known.

    Args:
        job: to be done.
        done: runs by seed and name.
    """
    found = [done[job.seed, name] for name in job.needs if (job.seed, name) in done]
    return found if len(found) == len(job.needs) else None


def in_order(jobs: Sequence[Job], done: Mapping[Key, Run], observer: Observer) -> Iterator[Run]:
    """Train one network after another, here.

    Args:
        jobs: in an order in which each comes after those that it needs.
        done: runs that are known, by seed and name; they are not done again.
        observer: is told what happens.

    Yields:
        Each run when it is finished.
    """
    done = dict(done)
    for job in jobs:
        if (job.seed, job.name) not in done:
            observer.begin(job)
            run = job.train(runs_beside(job, done) or [], partial(observer.epoch, job))
            done[job.seed, job.name] = run
            yield run
