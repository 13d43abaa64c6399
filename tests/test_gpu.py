"""On a GPU: the same decisions as on a CPU, in any precision, and no step that waits for the device.

Left out where there is none; `make test-gpu` runs these. ``ACCELERATOR=gpu`` makes other tests train on a GPU too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from pl_dendrites import load_from_checkpoint
from pl_dendrites.core import attach
from pl_dendrites.training.correlation_phase import adam
from tests.models import QUIET, Classifier, bits, classifier, loaders, quick
from tests.together import double_precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CPU, GPU = {"accelerator": "cpu"}, {"accelerator": "gpu", "devices": 1}


def double() -> tuple[DataLoader, DataLoader]:
    train, val = loaders()
    return tuple(DataLoader([(x.double(), y) for x, y in data], None) for data in (train, val))


def fit(place: dict[str, Any], folder: Path, ckpt_path: Path | None = None, **settings: Any) -> tuple[Any, L.Trainer]:
    """A fit in double precision that saves after every epoch: the callback and the Trainer."""
    dendrites = quick(learning="hybrid", fan_in=3, **settings)
    with double_precision():
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)
        quiet = QUIET | {"enable_checkpointing": True, "max_epochs": -1} | place
        trainer = L.Trainer(callbacks=[dendrites, saver], **quiet)
        trainer.fit(classifier().double(), *double(), ckpt_path=ckpt_path)
    return dendrites, trainer


def decisions(dendrites: Any) -> list[tuple[Any, ...]]:
    figures = ("phase", "cycle", "dendrites", "parameters", "epochs", "accepted", "reason")
    return [tuple(record[key] for key in figures) for record in dendrites.history]


def assert_the_same(one: tuple[Any, L.Trainer], other: tuple[Any, L.Trainer]) -> None:
    assert decisions(one[0]) == decisions(other[0])
    own, others = (bits(trainer.lightning_module.cpu()) for _, trainer in (one, other))
    assert own.keys() == others.keys()
    for key, value in own.items():
        torch.testing.assert_close(value, others[key], rtol=1e-5, atol=1e-7, msg=key)


def test_it_comes_out_as_on_a_cpu_and_is_resumed_on_the_other_device(tmp_path: Path) -> None:
    cpu, gpu = fit(CPU, tmp_path / "cpu"), fit(GPU, tmp_path / "gpu")
    assert gpu[0].num_dendrites == 2
    assert_the_same(cpu, gpu)
    for epoch in (1, 2, 5):
        assert_the_same(cpu, fit(CPU, tmp_path / "one", tmp_path / "gpu" / f"epoch={epoch}.ckpt"))
        assert_the_same(cpu, fit(GPU, tmp_path / "other", tmp_path / "cpu" / f"epoch={epoch}.ckpt"))


@pytest.mark.parametrize("learning", ["correlation", "gradient", "hybrid"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_dendrites_learn_in_any_precision(precision: str, learning: str) -> None:
    # Adam's epsilon is zero in half precision: what trains in it takes SGD.
    true_half = precision in ("bf16-true", "16-true")
    optimizer = (lambda model: torch.optim.SGD(model.parameters(), 0.1)) if true_half else None
    model, dendrites = classifier(optimizer, hidden=16), quick(learning=learning, base_epochs=4)
    trainer = L.Trainer(callbacks=[dendrites], **(QUIET | GPU | {"max_epochs": -1, "precision": precision}))
    trainer.fit(model, *loaders())
    assert dendrites.stop_reason
    assert all(bool(torch.isfinite(value).all()) for value in bits(model).values())
    for record in dendrites.history:
        assert all(0.05 < layer["max"] <= 1 for layer in record["correlation"].values())
    result = trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"]
    assert result == pytest.approx(dendrites.history[-1]["best_score"], rel=2e-2)


def test_the_best_network_waits_in_main_memory_and_loads_anywhere(tmp_path: Path) -> None:
    dendrites = quick(dirpath=tmp_path)
    trainer = L.Trainer(callbacks=[dendrites], **(QUIET | GPU | {"max_epochs": -1}))
    trainer.fit(classifier(), *loaders())
    assert {value.device.type for value in dendrites.state_dict()["best"]["weights"].values()} == {"cpu"}
    x = torch.randn(5, 4)
    on_cpu = load_from_checkpoint(Classifier, tmp_path / "best.ckpt", map_location="cpu").eval()
    on_gpu = load_from_checkpoint(Classifier, tmp_path / "best.ckpt", map_location="cuda").eval()
    torch.testing.assert_close(on_gpu(x.cuda()).cpu(), on_cpu(x), rtol=1e-4, atol=1e-5)


# -- waiting for the device ---------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "Conv2d": (lambda: nn.Conv2d(8, 6, 3), (5, 8, 7, 7)),
    "GRU": (lambda: nn.GRU(8, 6), (4, 5, 8)),
}


@contextlib.contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fan_in", [None, 3])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_no_step_waits_for_the_device(name: str, live: bool, fan_in: int | None) -> None:
    make, shape = LAYERS[name]
    model, x = make().cuda(), torch.randn(shape, device="cuda")
    network = attach(model, live=live, fan_in=fan_in)

    def backward() -> None:
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()

    def step(optimizer: torch.optim.Optimizer) -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        network.start_candidates(2)
        backward()
        network.keep_strongest()
        optimizer = adam(network.candidate_parameters())
        step(optimizer)
        with no_waiting():
            for _ in range(2):
                step(optimizer)
                network.hold_still()
        network.integrate()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
        step(optimizer)
        with no_waiting():
            step(optimizer)
            with torch.no_grad():
                model(x)


class Begin(L.Callback):
    """Before all other callbacks: notes how many warnings there were when a batch began."""

    def __init__(self, caught: list[Any]) -> None:
        self.caught, self.there = caught, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.there = len(self.caught)


class End(L.Callback):
    """After all other callbacks: notes how many came with a batch, but for the first of an epoch."""

    def __init__(self, begin: Begin) -> None:
        self.begin, self.counts = begin, set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx:
            self.counts.add(len(self.begin.caught) - self.begin.there)


def waits(*callbacks: L.Callback) -> set[int]:
    """How often a batch of a fit makes the CPU wait for the device: all counts that there are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*synchronizing CUDA operation")
        end = End(begin := Begin(caught))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            settings = QUIET | GPU | {"max_epochs": 8, "callbacks": [begin, *callbacks, end]}
            L.Trainer(**settings).fit(classifier(), *loaders())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return end.counts


def test_under_a_trainer_no_batch_waits_that_would_not_without_the_callback() -> None:
    dendrites = quick()
    assert waits(dendrites) <= waits()
    assert {record["phase"] for record in dendrites.history} == {"base", "correlation"}


# -- compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
def test_a_compiled_network_computes_the_same(live: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).cuda()
    network, x = attach(model, live=live), torch.randn(32, 8, device="cuda")
    for _ in range(2):
        network.grow(network.can_grow())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(model)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(x)
        out.square().mean().backward()
        found.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_one_process_of_ddp_with_nccl() -> None:
    dendrites = quick()
    trainer = L.Trainer(callbacks=[dendrites], strategy="ddp", **(QUIET | GPU | {"max_epochs": -1}))
    trainer.fit(classifier(), *loaders())
    assert dendrites.num_dendrites == 2
