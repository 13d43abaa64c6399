"""Kill training with SIGKILL at random moments, resume it each time, and compare with the uninterrupted run.

    python -m tests.faults.kill --kills 50 --seed 0

Each run is killed at a moment drawn uniformly over the uninterrupted run's duration, goes on from the newest whole
checkpoint (every third is killed once more) and ends. Weights, optimizer state, history and stop reason must then be
the uninterrupted run's, bit for bit, and ``best.ckpt`` must be whole after every kill. Runs take turns in what they
save: every epoch or the last alone; with ``best.ckpt``, without, or with the best network on the disk; and from a
temporary file on the same disk, which is renamed, or on another, slow one, which is copied: Lightning does not hide
half a copy, and it is passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.models import QUIET, bits, classifier, loaders, optimizer_bits, quick


class Setting(NamedTuple):
    """What a run saves, and how."""

    checkpoint: str
    best: str
    disk: str


SETTINGS = [Setting(*choice) for choice in itertools.product(("all", "last"), ("yes", "no", "disk"), ("same", "other"))]


class Beginning(L.Callback):
    """Tells the parent that training has begun."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Send one byte."""
        os.write(self.pipe, b".")


def newest_whole(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that can be read, and how many newer ones cannot."""
    paths = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for cut, path in enumerate(paths):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path, cut
    return None, len(paths)


def copy_slowly(source: str, target: str) -> None:
    """A file's way to another disk."""
    data = Path(source).read_bytes()
    with Path(target).open("wb", buffering=0) as file:
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            file.write(piece)
            time.sleep(0.02)
    Path(source).unlink()


def fit(folder: Path, setting: Setting, ckpt_path: Path | None, pipe: int) -> None:
    """Train to the end and write a digest of the result."""
    if setting.disk == "other":
        shutil.move = copy_slowly  # type: ignore[assignment]
    files = {"yes": {"dirpath": folder / "best"}, "disk": {"dirpath": folder / "best", "best_on": "disk"}}
    dendrites = quick(**files.get(setting.best, {}))
    keep = {"save_top_k": -1} if setting.checkpoint == "all" else {"save_last": True}
    saver = ModelCheckpoint(folder, "{epoch}", save_on_train_epoch_end=True, every_n_epochs=1, **keep)
    saving = QUIET | {"enable_checkpointing": True}
    trainer = L.Trainer(max_epochs=17, callbacks=[Beginning(pipe), dendrites, saver], **saving)
    model = classifier(hidden=2000)  # files of a megabyte
    trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
    weights = {key: value.numpy().tobytes() for key, value in bits(model).items()}
    result = (weights, optimizer_bits(trainer.optimizers[0]), dendrites.history, dendrites.stop_reason)
    (folder / "writing").write_text(hashlib.sha256(repr(result).encode()).hexdigest())
    (folder / "writing").replace(folder / "result")


def run(folder: Path, setting: Setting, ckpt_path: Path | None = None, kill_after: float | None = None) -> bool:
    """Train in a process of its own and say whether it was killed. Forked, for imports take longer than training."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            fit(folder, setting, ckpt_path, writing)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)  # returns as well when the child has ended
    os.close(reading)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # a child that has ended is there until it is waited for
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"training failed:\n{(folder / 'log').read_text()}")
    return os.WIFSIGNALED(status)


def interrupted(folder: Path, setting: Setting, moments: Sequence[float] = ()) -> tuple[str, list[str]]:
    """Start a run in a fresh directory, kill it at moments in seconds, one after another, and let it end.

    Returns:
        A digest of the result, and what the run went on from after each kill: none if it ended before the first.

    Raises:
        RuntimeError: if ``best.ckpt`` is not whole after a kill, or training failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path, story = None, list[str]()
    for moment in moments:
        if not run(folder, setting, path, moment):
            break
        if newest_whole(folder / "best")[1]:
            raise RuntimeError(f"the best network's file is not whole after a kill at {moment:.3f} s")
        path, cut = newest_whole(folder)
        story.append((path.stem if path else "the start") + f" (passing over {cut} cut short)" * (cut > 0))
    else:
        run(folder, setting, path)
    return (folder / "result").read_text(), story


def main(*options: str) -> int:
    """Print a line per run and how many ended with the uninterrupted run's result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="runs to kill; every third is killed twice")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(options)
    torch.set_num_threads(1)  # before the first fork: a forked process has no threads
    warnings.filterwarnings("ignore")
    chance, good, whole = random.Random(arguments.seed), 0, dict[Setting, tuple[str, float]]()
    sys.stdout.write("run  checkpoint  best.ckpt  disk   killed after    same  went on from\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        for number in range(arguments.kills):
            setting = SETTINGS[number % len(SETTINGS)]
            if setting not in whole:
                began = time.monotonic()
                whole[setting] = (interrupted(folder, setting)[0], time.monotonic() - began)
            expected, duration = whole[setting]
            result, story, moments = "", list[str](), list[float]()
            while not story:  # none: training had ended before the kill
                moments = [chance.uniform(0, duration) for _ in range(1 + (number % 3 == 2))]
                try:
                    result, story = interrupted(folder, setting, moments)
                except RuntimeError as error:
                    story = [str(error)]
            good += result == expected
            sys.stdout.write(
                f"{number + 1:3}  {setting.checkpoint:10}  {setting.best:9}  {setting.disk:5}"
                f"  {', '.join(f'{moment:.3f}' for moment in moments[: len(story)]):12} s"
                f"  {'yes' if result == expected else 'NO':4}  {', '.join(story)}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"{good} of {arguments.kills} ended with the uninterrupted run's result.\n")
    return int(good < arguments.kills)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
