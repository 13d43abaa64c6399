"""One network of the benchmark of quality, trained from its seed to its result."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import DATA, Parts
from networks import NETWORKS, Batches, loss_of, scores
from tasks import PEER, Task, task_of
from torch import Tensor

from pl_dendrites import DendriteCallback


@dataclass(frozen=True)
class Unit:
    """What one process does at a time.

    Attributes:
        task: a name that ``tasks.task_of`` knows.
        row: what the network is called.
        seed: of everything in it.
        width: of the network, before it has dendrites.
        arguments: of the ``DendriteCallback``, besides those of the task.
        epochs: that a plain network is trained for at least, with restarts.
        restarts: that it gets at least.
    """

    task: str
    row: str
    seed: int
    width: int
    arguments: Mapping[str, Any]
    epochs: int = 0
    restarts: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.row, self.seed

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, so that a result of other settings is not taken for it."""
        return json.loads(json.dumps({**task_of(self.task).settings(self.arguments), "width": self.width}))


class Model(L.LightningModule):
    """Nothing here knows of dendrites."""

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.net, self.task = NETWORKS[task.network](width), task

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return loss_of(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", loss_of(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.task.rate)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=self.task.decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


@cache
def load(name: str, data_dir: Path) -> Parts:
    return DATA[name](data_dir)


def work(unit: Unit, *, data_dir: Path, peer_python: Path | None) -> dict[str, Any]:
    """Train the network of a unit, in a process of one thread, and return its record."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = task_of(unit.task)
    data = load(task.data, data_dir)
    if unit.row == PEER:
        assert peer_python is not None
        found = peers(unit, task, data, peer_python)
    else:
        L.seed_everything(unit.seed, verbose=False)
        found = plain(unit, task, data) if unit.settings["arguments"]["max_dendrites"] == 0 else grown(unit, task, data)
    return {"task": unit.task, "row": unit.row, "seed": unit.seed, "settings": unit.settings, **found}


def fit(model: Model, task: Task, data: Parts, arguments: Mapping[str, Any]) -> tuple[DendriteCallback, dict[str, Any]]:
    callback = DendriteCallback(**arguments)
    trainer = L.Trainer(
        max_epochs=-1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(model, Batches(*data[0], task.batch, shuffle=True, most=task.most), Batches(*data[1], 4096))
    return callback, {"epochs": trainer.current_epoch, "seconds": time.perf_counter() - start}


def tested(model: Model, task: Task, data: Parts) -> dict[str, float]:
    return {"result": scores(model.net, *data[2])[task.metric]}


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def grown(unit: Unit, task: Task, data: Parts) -> dict[str, Any]:
    model = Model(task, unit.width)
    callback, spent = fit(model, task, data, unit.settings["arguments"])
    return {
        **spent,
        **tested(model, task, data),
        "score": callback.best_model_score,
        "parameters": size(model),
        "dendrites": callback.num_dendrites,
        "restarts": max(record["cycle"] for record in callback.history),
    }


def plain(unit: Unit, task: Task, data: Parts) -> dict[str, Any]:
    """Restarted from its best weights, with fresh optimizers, until it had as many epochs and restarts as asked for.

    The best network after each fit is a stage, so that one run is the control of all that took less. Which stage that
    is follows from the epochs and restarts alone.
    """
    model = Model(task, unit.width)
    stages: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    epochs, seconds = 0, 0.0
    while len(stages) <= unit.restarts or epochs < unit.epochs:
        callback, spent = fit(model, task, data, unit.settings["arguments"])
        epochs, seconds = epochs + spent["epochs"], seconds + spent["seconds"]
        score = callback.best_model_score
        if not stages or score < stages[-1]["score"]:
            best, known = copy.deepcopy(model.state_dict()), {"score": score, **tested(model, task, data)}
        model.load_state_dict(best)
        stages.append({"epochs": epochs, "seconds": seconds, **known})
    return {"parameters": size(model), "stages": stages}


def peers(unit: Unit, task: Task, data: Parts, python: Path) -> dict[str, Any]:
    """In an environment of its own; it writes files where it runs, and its prompts get no answer."""
    script = Path(__file__).with_name("peer_quality.py")
    with tempfile.TemporaryDirectory() as folder:
        torch.save([(x.contiguous(), y.contiguous()) for x, y in data], Path(folder, "data.pt"))
        settings = {**unit.settings, "seed": unit.seed}
        done = subprocess.run(
            [python, script, json.dumps(settings)],
            cwd=folder,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=7200,
        )
    if done.returncode:
        raise RuntimeError(f"the peer failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
