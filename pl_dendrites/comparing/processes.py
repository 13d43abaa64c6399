"""Networks that are trained at a time, each in a process of its own."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple

import torch

from pl_dendrites.comparing.jobs import Job, Key, Observer, runs_beside
from pl_dendrites.comparing.quiet import quiet
from pl_dendrites.comparing.runs import Run

__all__ = ["Workers"]


class _Numbers(NamedTuple):
    # How this process computes, which a new one does not know.
    threads: int
    dtype: torch.dtype
    precision: str
    deterministic: bool
    warn_only: bool

    @classmethod
    def here(cls, workers: int) -> _Numbers:
        return cls(
            max(torch.get_num_threads() // workers, 1),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def use(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)


class Workers:
    """Processes that train networks, and end when the block does, or with this process.

    They are spawned, for a process that has threads or a GPU cannot be forked. Each has its share of the threads that
    PyTorch has here, and this process' settings of precision and determinism.

    Args:
        jobs: all that there may be to do.
        count: of processes that share the threads.
        needed: processes that there is something to do for, at most.

    Raises:
        ValueError: if jobs cannot be sent to a process.
    """

    def __init__(self, jobs: Sequence[Job], count: int, needed: int) -> None:
        _refuse_what_cannot_be_sent(jobs)
        numbers = _Numbers.here(count)
        self._workers = [_Worker(jobs, numbers) for _ in range(min(count, needed))]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end(at_once=kind is not None)

    def train(self, jobs: Sequence[Job], done: Mapping[Key, Run], observer: Observer) -> Iterator[Run]:
        """Train all networks, each as soon as those are finished that it needs.

        Args:
            jobs: the same, in an order in which each comes after those that it needs.
            done: runs that are known, by seed and name; they are not done again.
            observer: is told what happens.

        Yields:
            Each run when it is finished.

        Raises:
            RuntimeError: if one fails, with all that its process has to say, or if a process ends by itself.
        """
        done, idle = dict(done), list(self._workers)
        waiting = [number for number, job in enumerate(jobs) if (job.seed, job.name) not in done]
        while waiting or len(idle) < len(self._workers):
            for number in list(waiting):
                beside = runs_beside(jobs[number], done)
                if idle and beside is not None:
                    waiting.remove(number)
                    observer.begin(jobs[number])
                    idle.pop().begin(number, beside)
            busy = {worker.connection: worker for worker in self._workers if worker not in idle}
            for connection in wait(list(busy)):
                run = busy[connection].listen(observer)  # type: ignore[index]
                if run is not None:
                    idle.append(busy[connection])  # type: ignore[index]
                    done[run.seed, run.name] = run
                    yield run


class _Worker:
    def __init__(self, jobs: Sequence[Job], numbers: _Numbers) -> None:
        context = get_context("spawn")
        self._jobs, self._job = jobs, jobs[0]
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, jobs, numbers))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def begin(self, number: int, beside: Sequence[Run]) -> None:
        self._job = self._jobs[number]
        try:
            self.connection.send((number, beside))
        except OSError:
            self._refuse_end()

    def listen(self, observer: Observer) -> Run | None:
        try:
            heard = self.connection.recv()
        except (EOFError, OSError):
            self._refuse_end()
        if isinstance(heard, str):
            raise RuntimeError(f"{self._job.name!r} with seed {self._job.seed} failed in its process:\n\n{heard}")
        if isinstance(heard, Run):
            return heard
        observer.epoch(self._job, *heard)
        return None

    def end(self, at_once: bool) -> None:
        self.connection.close()
        if at_once:
            self._process.kill()  # Lightning would finish its batch first
        self._process.join()

    def _refuse_end(self) -> Any:
        self._process.join()
        raise RuntimeError(
            f"`workers`: the process for {self._job.name!r} with seed {self._job.seed} ended by itself (exit code"
            f" {self._process.exitcode}; what it said stands above). A negative code is a signal: -9 often means that"
            " memory was short. A script must call `compare` under `if __name__ == '__main__':`, and in a notebook"
            " models and data must come from a module, for a new process imports them."
        ) from None


def _work(connection: Connection, jobs: Sequence[Job], numbers: _Numbers) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    numbers.use()
    with quiet():
        while True:
            try:
                number, beside = connection.recv()
            except EOFError:
                return
            connection.send(_outcome(jobs[number].train, beside, partial(_tell, connection)))


def _outcome(train: Callable[..., Run], beside: Sequence[Run], tell: Callable[[int, int], None]) -> Run | str:
    try:
        return train(beside, tell)
    except Exception:
        return traceback.format_exc()


def _tell(connection: Connection, fit: int, epochs: int) -> None:
    connection.send((fit, epochs))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # nobody waits for what it is doing


def _refuse_what_cannot_be_sent(jobs: Sequence[Job]) -> None:
    try:
        pickle.dumps(jobs)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`workers`: a process of its own cannot be sent what it needs ({error}). Models and data must be made by"
            " classes or functions of a module, or a `functools.partial` of these; a lambda, or a function within"
            " another, must be defined at the top of a file. So must callbacks and loggers in `trainer`."
        ) from error
