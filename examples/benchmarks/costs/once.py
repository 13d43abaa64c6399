"""What happens once in a while: attaching, a switch, a checkpoint; and what the idle callback takes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

from costs.networks import grown, mlp
from pl_dendrites import DendriteCallback, attach


class Model(BoringModel):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.layer = network

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter for parameter in self.parameters() if parameter.requires_grad])


def measure(repeats: int) -> dict[str, float]:
    asked: dict[str, Callable[[], float]] = {
        "attach to 1,000 layers, s": attaching,
        "integrate a third set, MLP 2048, s": integrating,
        "checkpoint of a plain MLP 2048, s": lambda: saving(mlp(2048)),
        "the same with three dendrites, s": lambda: saving(grown(lambda: mlp(2048), 3).model),
        "the same with the callback, which holds the best network, s": lambda: saving(
            grown(lambda: mlp(2048), 3).model, idle()
        ),
    }
    return {name: statistics.median(ask() for _ in range(repeats)) for name, ask in asked.items()} | {
        "start of a fit of 1,000 layers, s": extra(idle, 1, 1, repeats, deep),
        "idle callback, microseconds a step": 1e6 * extra(idle, 2000, 1, repeats) / 2000,
        "a callback that does nothing, microseconds a step": 1e6 * extra(L.Callback, 2000, 1, repeats) / 2000,
        "idle callback, milliseconds an epoch": 1e3 * extra(idle, 1, 100, repeats) / 100,
    }


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(1000)))


def attaching() -> float:
    model = deep()
    return seconds(lambda: attach(model))


def integrating() -> float:
    network = grown(lambda: mlp(2048), 2)
    network.start_candidates(4)
    network.model(torch.randn(64, 2048)).square().mean().backward()
    return seconds(network.integrate)


def saving(network: nn.Module, *callbacks: L.Callback) -> float:
    fitted = trainer(1, 1, callbacks)
    fitted.fit(Model(network), torch.randn(1, 8, 2048), torch.randn(1, 8, 2048))
    with tempfile.TemporaryDirectory() as folder:
        return seconds(lambda: fitted.save_checkpoint(Path(folder, "one.ckpt")))


def tiny() -> nn.Module:
    return nn.Linear(32, 2)


def extra(
    make: Callable[[], L.Callback], steps: int, epochs: int, repeats: int, network: Callable[[], nn.Module] = tiny
) -> float:
    """Seconds that a callback adds to a fit: the shortest with it, less the shortest without.

    It is small beside what else the machine does, which can only add to either.
    """
    data = torch.randn(steps, 1, 32)
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for there, times in found.items():
            ready = trainer(steps, epochs, (make(),) * there)
            model = Model(network())
            times.append(seconds(lambda ready=ready, model=model: ready.fit(model, data, data[:1])))
    return min(found[True]) - min(found[False])


def idle() -> L.Callback:
    return DendriteCallback("val_loss", form="private", patience=10**6, verbose=False)


def trainer(steps: int, epochs: int, callbacks: tuple[L.Callback, ...]) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        limit_train_batches=steps,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
