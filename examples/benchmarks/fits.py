"""One network of the benchmark of quality, trained from its seed to its result."""

from __future__ import annotations

import copy
import json
import logging
import math
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
from controls import CONTROLS, Room
from data import DATA, Parts
from networks import LOSSES, METRICS, NETWORKS, SHAPES, Batches, scores
from tasks import PEER, Task, task_of
from torch import Tensor, nn

from pl_dendrites import DendriteCallback
from pl_dendrites.controls import parameters_left, saved_bytes


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
        control: its kind, a name in ``controls.CONTROLS``; it is then trained for just as many epochs.
        parameters: of a control, unless its width is given.
    """

    task: str
    row: str
    seed: int
    width: int
    arguments: Mapping[str, Any]
    epochs: int = 0
    restarts: int = 0
    control: str = ""
    parameters: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.row, self.seed

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, so that a result of other settings is not taken for it."""
        settings = {**task_of(self.task).settings(self.arguments), "width": self.width}
        if self.control:
            settings |= {name: getattr(self, name) for name in ("control", "parameters", "epochs")}
        return json.loads(json.dumps(settings))


class Model(L.LightningModule):
    """Nothing here knows of dendrites."""

    def __init__(self, task: Task, net: nn.Module, epochs: int = 0, rate: float = 1.0) -> None:
        super().__init__()
        self.net, self.task, self.epochs, self.rate = net, task, epochs, rate * task.rate
        self.loss = LOSSES[task.metric]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        out = self.net(batch[0])
        loss = self.loss(out, batch[1])
        classifies = self.task.metric == "error"
        self.log("loss", loss)
        self.log("score", METRICS["error"](out, batch[1]) / 100 + loss / 1000 if classifies else loss)

    def configure_optimizers(self) -> dict[str, Any]:
        cosine = self.task.cosine
        if cosine is not None:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=cosine.decay)
            falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs or cosine.epochs)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling}}
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
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
    L.seed_everything(unit.seed, verbose=False)
    if unit.row == PEER:
        assert peer_python is not None
        found = peers(unit, task, data, peer_python)
    elif unit.control:
        found = control(unit, task, data)
    else:
        found = plain(unit, task, data) if unit.settings["arguments"]["max_dendrites"] == 0 else grown(unit, task, data)
    return {"task": unit.task, "row": unit.row, "seed": unit.seed, "settings": unit.settings, **found}


def made(task: Task, width: int) -> Model:
    return Model(task, NETWORKS[task.network](width))


def fit(model: Model, task: Task, data: Parts, *callbacks: L.Callback, epochs: int = -1) -> dict[str, Any]:
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(model, Batches(*data[0], task.batch, shuffle=True, most=task.most), Batches(*data[1], 4096))
    return {"epochs": trainer.current_epoch, "seconds": time.perf_counter() - start}


def tested(net: nn.Module, task: Task, data: Parts) -> dict[str, float]:
    return {"result": scores(net, *data[2], task.metric)[task.metric]}


def grown(unit: Unit, task: Task, data: Parts) -> dict[str, Any]:
    arguments = unit.settings["arguments"]
    # Records are from before there was a choice.
    form = {} if arguments.keys() & {"form", "max_parameters"} else {"form": "private"}
    model, callback = made(task, unit.width), DendriteCallback(**form, **arguments)
    spent = fit(model, task, data, callback)
    return {
        **spent,
        **tested(model.net, task, data),
        "score": callback.best_model_score,
        "parameters": parameters_left(model),
        "bytes": saved_bytes(model),
        "dendrites": callback.num_dendrites,
        "restarts": max(record["cycle"] for record in callback.history),
    }


class Best(L.Callback):
    """Leaves a network at the best weights of its fit."""

    def __init__(self, monitor: str) -> None:
        self.monitor, self.score = monitor, math.inf
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        score = trainer.callback_metrics[self.monitor].item()
        if score < self.score:
            self.score, self._weights = score, copy.deepcopy(module.state_dict())

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.load_state_dict(self._weights)


def control(unit: Unit, task: Task, data: Parts) -> dict[str, Any]:
    """The variant that validation data choose."""
    room = Room(*SHAPES[task.network], unit.epochs, unit.parameters, unit.width)
    found: dict[str, Any] = {"score": math.inf}
    for variant, make in CONTROLS[unit.control](room):
        last: dict[str, Any] = {"epochs": 0, "seconds": 0.0}

        def fit_best(net: nn.Module, epochs: int, *, rate: float = 1.0, callbacks: tuple[L.Callback, ...] = ()) -> None:
            best = Best(task.arguments["monitor"])
            spent = fit(Model(task, net, epochs, rate), task, data, *callbacks, best, epochs=epochs)
            last.update({name: last[name] + value for name, value in spent.items()}, score=best.score)  # noqa: B023

        L.seed_everything(unit.seed, verbose=False)
        net = make(fit_best)
        if last["score"] < found["score"]:
            found, kept = {"variant": variant, **last}, net
    return {**found, **tested(kept, task, data), "parameters": parameters_left(kept), "bytes": saved_bytes(kept)}


def plain(unit: Unit, task: Task, data: Parts) -> dict[str, Any]:
    """Restarted from its best weights, with fresh optimizers, until it had as many epochs and restarts as asked for.

    The best network after each fit is a stage, so that one run is the control of all that took less. Which stage that
    is follows from the epochs and restarts alone.
    """
    model = made(task, unit.width)
    stages: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    epochs, seconds = 0, 0.0
    while len(stages) <= unit.restarts or epochs < unit.epochs:
        callback = DendriteCallback(**unit.settings["arguments"])
        spent = fit(model, task, data, callback)
        epochs, seconds = epochs + spent["epochs"], seconds + spent["seconds"]
        score = callback.best_model_score
        if not stages or score < stages[-1]["score"]:
            best, known = copy.deepcopy(model.state_dict()), {"score": score, **tested(model.net, task, data)}
        model.load_state_dict(best)
        stages.append({"epochs": epochs, "seconds": seconds, **known})
    return {"parameters": parameters_left(model), "stages": stages}


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
