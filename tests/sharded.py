"""Runs of models that two processes share out between them (FSDP2), and of one process with the same global batches.

:func:`main` is one process of two; :func:`tests.together.launch` starts both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from pl_dendrites.core.growth.hooks import attached_layers
from pl_dendrites.core.tensors import local
from tests.models import QUIET, quick
from tests.together import PLACES, SHARED, Net, batches, double_precision


class Linears(Net):
    """One target layer is sharded by itself, the other with what is around it."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Convolution(Linears):
    """Backward runs past Lightning, in two batches for each step of an optimizer that remembers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.loss(batch).backward()
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        rates = zip((self.net[0], self.net[3]), (0.2, 0.3), strict=True)
        return torch.optim.SGD([{"params": layer.parameters(), "lr": rate} for layer, rate in rates])


class TwoSteps(Linears):
    """Lightning runs backward, and the model steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


class Trail(L.Callback):
    """After each batch, all parameters and all that candidates are; and phases with and without gradients."""

    def __init__(self, dendrites: Any) -> None:
        self.dendrites, self.values, self.gradients = dendrites, [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        values = {name: whole(p) for name, p in pl_module.named_parameters()}
        values |= {name: field.clone() for name, field in pl_module.named_buffers() if name.endswith(".field")}
        if self.dendrites.network.units is None:  # samples each process has of its own
            for name, pool in self.dendrites.network.candidate_state().items():
                values |= {f"candidates of {name}: {key}": value for key, value in pool.items()}
        self.values.append(values)
        self.gradients |= {(self.dendrites.phase, p.grad is not None) for p in pl_module.parameters()}


@dataclass(frozen=True)
class Setting:
    """What a run is made of."""

    model: Callable[[], Net] = Linears
    strategy: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    validation: int = 0  # seed of the data; 0: that of training, so that sets of dendrites help
    saved: int = 1  # epochs from one checkpoint to the next; saving one brings a model's shards back into place
    resumed: tuple[int, ...] = ()  # from the checkpoints of these epochs of its own


SETTINGS = {
    # Epochs: two of a base phase, two of a correlation phase, and so on.
    "files": Setting(
        strategy={"save_distributed_checkpoint": False},
        callback={"restart": False},
        trainer={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        resumed=(6,),
    ),
    "folders": Setting(Convolution, callback={"max_tries": 1}, validation=2, saved=3, resumed=(5,)),
    # Two sets, each after an epoch in which samples are taken; fields move for four epochs, and stand still for two.
    "shared": Setting(
        strategy={"save_distributed_checkpoint": False},
        callback={**SHARED, "growth_epochs": 1, "sets": 2, "around": ["net"]},
        trainer={"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        resumed=(6,),
    ),
}
LONG = {
    # The first batch tells where they hang.
    "asked for": Setting(callback=SHARED, resumed=(0, 3, 6)),
    "two modules": Setting(TwoSteps, callback={**SHARED, "around": ["net.0", "net.2"]}, resumed=(2, 4)),
    "frozen": Setting(callback={**SHARED, "learning": "correlation", "max_dendrites": 2}, resumed=(3,)),
}


def strategy(**kwargs: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        **({"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"} | kwargs)
    )


def fit(
    setting: Setting, rank: int | None, folder: Path, ckpt_path: Path | None = None, *callbacks: L.Callback
) -> dict[str, Any]:
    """A run, as one process of two or (``None``) as the only one; a checkpoint for each epoch goes into ``folder``."""
    with double_precision():
        torch.manual_seed(0)
        model = setting.model()
        torch.manual_seed(1 + (rank or 0))  # what is random from here on differs between processes
        dendrites = quick(**({"dirpath": folder} | setting.callback))
        trail = Trail(dendrites)
        saver = ModelCheckpoint(
            folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=setting.saved
        )
        trainer = trainer_of(setting, rank, dendrites, trail, saver, *callbacks)
        train, val = loaders(setting, rank)
        trainer.fit(model, train, val, ckpt_path=ckpt_path)
    return {
        "weights": {key: whole(value) for key, value in model.state_dict().items()},
        "here": {key: local(value).numel() for key, value in model.state_dict().items()},
        "hang on": [name for name, _ in attached_layers(model)],
        "history": dendrites.history,
        "stop": dendrites.stop_reason,
        "trail": trail.values,
        "gradients": trail.gradients,
    }


def trainer_of(setting: Setting, rank: int | None, *callbacks: L.Callback) -> L.Trainer:
    settings: dict[str, Any] = QUIET | {"enable_checkpointing": True, "max_epochs": -1} | setting.trainer
    if rank is not None:
        settings |= PLACES | {"strategy": strategy(**setting.strategy), "use_distributed_sampler": False}
    return L.Trainer(callbacks=list(callbacks), **settings)


def loaders(setting: Setting, rank: int | None) -> tuple[DataLoader, DataLoader]:
    train, val = (DataLoader(batches(seed, n, (16, 16), rank), None) for seed, n in ((0, 4), (setting.validation, 2)))
    return train, val


def validate(setting: Setting, rank: int, path: Path) -> float:
    """The score of a checkpoint, loaded into a fresh model."""
    with double_precision():
        trainer = trainer_of(setting, rank, quick())
        (result,) = trainer.validate(setting.model(), loaders(setting, rank)[1], ckpt_path=path, verbose=False)
    return result["val_loss"]


class Death(L.Callback):
    """The second process comes to its end within a correlation phase."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            raise RuntimeError("boom")


def main(folder: Path, names: list[str]) -> None:
    """One process of two: run the settings named, one after another, save what came out, and die."""
    rank = int(os.environ["PART"])
    try:
        fit(Setting(strategy={"data_parallel_size": 1, "tensor_parallel_size": 2}), rank, folder / "tensor parallel")
    except MisconfigurationException as error:
        (folder / f"refused {rank}.txt").write_text(str(error))
    for name in names:
        setting = (SETTINGS | LONG)[name]
        results: dict[str, Any] = {"whole": fit(setting, rank, folder / name)}
        for epoch in setting.resumed:
            path = folder / name / f"epoch={epoch}.ckpt"
            results[f"from {epoch}"] = fit(setting, rank, folder / f"{name} from {epoch}", path)
        results["score of the best"] = validate(setting, rank, folder / name / "best.ckpt")
        torch.save(results, folder / f"{name} {rank}.pt")
    fit(Setting(), rank, folder / "death", None, Death())
