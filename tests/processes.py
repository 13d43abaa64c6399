"""Processes that share one import of Lightning: to import it takes longer than most of what tests do in a process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning", "pl_dendrites"])


def process(output: str | Path, main: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process that calls ``main`` when it is started; what it writes goes to a file or a terminal."""
    return SERVER.Process(target=_begin, args=(output, main, args))


def _begin(output: str | Path, main: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with Path(output).open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    gc.freeze()  # what has been imported: no collection has to look through it again
    main(*args)
