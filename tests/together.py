"""Runs of one process and of two with the same global batches, and the processes for them.

:func:`main` is one process of two; :func:`launch` starts both and ends them always.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from tests.models import ACCELERATOR, QUIET, bits, half, optimizer_bits, quick
from tests.processes import process

Batch = tuple[Tensor, Tensor, Tensor]
TRAFFIC: list[tuple[str, int]] = []
DEATHS = ("raises", "is killed")
# Two processes share the only GPU if they are told that each is a machine of its own.
PLACES = {"devices": 1, "num_nodes": 2} if ACCELERATOR == "gpu" else {"devices": 2}


# -- data and models ----------------------------------------------------------------------------------------------


def batches(seed: int, count: int, rows: tuple[int, int], rank: int | None) -> list[Batch]:
    """Inputs, classes and weights of ``count`` batches: the part of one process of two, or (``None``) all of them.

    The weights make the sum over a part the mean over that part, and over all of them the mean of the parts' means.
    Only the first process' part has rows with a positive last input, and not in every batch.
    """
    random, size = torch.Generator().manual_seed(seed), sum(rows)
    found = []
    for i in range(count):
        x = torch.randn(size, 4, generator=random, dtype=torch.float64)
        y = (x[:, :2].prod(1) > 0).long()
        x[:, 3] = -x[:, 3].abs()
        if i % 2 == 0:
            x[: rows[0] // 2, 3] *= -1
        weights = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in rows])
        parts = [(part[0], part[1], part[2]) for part in zip(*(v.split(rows) for v in (x, y, weights)), strict=True)]
        found.append((x, y, weights / 2) if rank is None else parts[rank])
    return found


class Net(L.LightningModule):
    """Two target layers and nothing random, in double precision; its metrics are never synchronised."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Batch) -> Tensor:
        return (nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none") * batch[2]).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Manual(Net):
    """Two optimizers, and a second backward pass through the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.manual_backward((self(batch[0]).square().sum(1) * batch[2]).sum() * 0.01)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[0].parameters(), 0.02), torch.optim.SGD(self.net[2].parameters(), 0.1)]


class Frozen(Net):
    """Nothing is trainable, and its optimizer is over that."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=0.02)


class OwnBackward(Manual):
    """Runs backward past Lightning, and so past DDP: it averages gradients itself."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.loss(batch).backward()
        for gradient in [p.grad for p in self.parameters() if p.grad is not None and self.trainer.world_size > 1]:
            torch.distributed.all_reduce(gradient)
            gradient.div_(2)
        # Where the network stands still, the second process steps in three batches of four; the candidates in all.
        skips = batch_idx == 1 and self.global_rank == 1 and not self.net[0].weight.requires_grad
        for optimizer in [] if skips else optimizers:
            optimizer.step()


class Expert(Net):
    """A layer that only rows with a positive last input reach; a process may have none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, chosen = super().forward(x), x[:, 3] > 0
        return out.index_add(0, chosen.nonzero()[:, 0], self.expert(x[chosen])) if chosen.any() else out


class Wide(Net):
    """A layer whose samples are fewer numbers than its weights, between two of which that is not so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 2))


class Normed(Net):
    """BatchNorm, which Lightning makes a SyncBatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


class Half(Net):
    """Single precision, so that it can be half; and a score that the first process alone logs."""

    def __init__(self) -> None:
        super().__init__()
        self.float()

    def loss(self, batch: Batch) -> Tensor:
        return super().loss((batch[0].float(), batch[1], batch[2].float()))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1, rank_zero_only=True)


def half_precision() -> dict[str, Any]:
    """A loss scale that is soon too large, and first for the rows of a small part."""
    return {"plugins": [half(init_scale=2.0**15, growth_interval=2)]}


def _synchronised(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    # Where there is no GPU, which PyTorch's own needs. For parts of one size.
    if not norm.training:
        return nn.BatchNorm1d.forward(norm, x)
    from torch.distributed.nn.functional import all_reduce

    mean = all_reduce(x.mean(0)) / 2
    var = all_reduce((x - mean).square().mean(0)) / 2
    with torch.no_grad():
        size = 2 * len(x)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * size / (size - 1), norm.momentum)
        norm.num_batches_tracked += 1
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


# -- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a run is made of; the rest is as in :func:`tests.models.quick`, but for a third set of dendrites."""

    model: Callable[[], Net] = Net
    strategy: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    rows: tuple[int, int] = (16, 16)  # of each process' part of a batch
    validation: int = 0  # seed of the data; 0: that of training, so that sets of dendrites help
    missing: int = 0  # batches that the second process lacks
    resumed: tuple[int, ...] = ()  # from the checkpoints of these epochs of its own
    resumed_from_one: tuple[int, ...] = ()  # and of one process' run


SHARED: dict[str, Any] = {"fan_in": 2, "max_parameters": 87, "base_epochs": 6, "sets": 1, "growth_epochs": 2}
SETTINGS = {
    # Epochs: two of a base phase, two of a correlation phase, and so on. Each of them is resumed from in one of these.
    "automatic": Setting(resumed=(2, 6), resumed_from_one=(2,)),
    "manual, uneven parts": Setting(
        Manual, strategy={"static_graph": True}, rows=(16, 9), callback={"max_dendrites": 2}, resumed=(2,)
    ),
    "accumulation": Setting(
        trainer=lambda: {"accumulate_grad_batches": 2},
        callback={"monitor": "train_loss", "max_dendrites": 2},
        resumed=(5,),
    ),
    "sets that fail": Setting(
        strategy={"static_graph": True},
        callback={"base_epochs": None, "patience": 1, "max_dendrites": 2, "max_tries": 1},
        validation=1,
    ),
    "gathered": Setting(Wide, rows=(16, 9), callback={"max_dendrites": 2}, resumed=(2,)),
    "three batches a step": Setting(callback={"candidate_batches": 3, "max_dendrites": 1}, resumed=(2,)),
    "sparse": Setting(callback={"fan_in": 2, "share": 0.5, "learning": "hybrid", "max_dendrites": 2}, resumed=(3,)),
    "own backward": Setting(OwnBackward, callback={"max_dendrites": 1}),
    "expert": Setting(Expert, strategy={"find_unused_parameters": True}, callback={"max_dendrites": 1}),
    "SyncBatchNorm, on disk": Setting(
        Normed, trainer=lambda: {"sync_batchnorm": True}, callback={"max_dendrites": 1, "best_on": "disk"}
    ),
    "gradient": Setting(callback={"learning": "gradient", "max_dendrites": 2}),
    "frozen": Setting(Frozen, callback={"targets": "frozen", "learning": "hybrid", "max_dendrites": 2}, resumed=(1, 3)),
    "placed": Setting(Frozen, callback={"targets": "frozen", "max_parameters": 60, "base_epochs": 4}, resumed=(1, 3)),
    # Two sets, each after an epoch in which samples are taken; fields move for four epochs, and stand still for two.
    "shared": Setting(
        callback={**SHARED, "growth_epochs": 1, "sets": 2, "around": ["net"]},
        trainer=lambda: {"accumulate_grad_batches": 2},
        resumed=(1, 6),
        resumed_from_one=(1,),
    ),
    "shared, two modules": Setting(Manual, callback={"around": ["net.0", "net.2"], **SHARED}),
    "shared in fp16": Setting(Half, trainer=half_precision, rows=(30, 2), callback={"around": ["net"], **SHARED}),
    "fp16": Setting(Half, trainer=half_precision, rows=(30, 2), callback={"max_dendrites": 1}),
}


class Trail(L.Callback):
    """After each batch, all parameters and all that candidates are; a digest of both; and what was communicated.

    Of shared dendrites also their fields. What these and placed ones are found by, each process has of its own.
    """

    def __init__(self, dendrites: Any) -> None:
        self.dendrites, self.values, self.digests, self.traffic, self.scales = dendrites, [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        TRAFFIC.clear()  # that of a validation

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        values = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        values |= {name: field.clone() for name, field in pl_module.named_buffers() if name.endswith(".field")}
        if self.dendrites.network.candidates:
            for name, pool in self.dendrites.network.candidate_state().items():
                values |= {f"candidates of {name}: {key}": value for key, value in pool.items()}
        digest = hashlib.sha256(
            b"".join(name.encode() + value.cpu().numpy().tobytes() for name, value in values.items())
        )
        self.values.append(values)
        self.digests.append(digest.hexdigest())
        self.traffic.append((self.dendrites.phase, self.dendrites.num_dendrites, TRAFFIC.copy()))
        TRAFFIC.clear()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales.append((self.dendrites.phase, scaler and scaler.get_scale()))


@contextmanager
def double_precision() -> Iterator[None]:
    """What a module logs is accumulated in PyTorch's default precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def fit(
    setting: Setting, rank: int | None, folder: Path, ckpt_path: Path | None = None, death: str = ""
) -> dict[str, Any]:
    """A run, as one process of two or (``None``) as the only one; a checkpoint for each epoch goes into ``folder``."""
    with double_precision():
        torch.manual_seed(0)
        model = setting.model()
        torch.manual_seed(1 + (rank or 0))  # what is random from here on differs between processes
        dendrites = quick(**({"max_dendrites": 3, "dirpath": folder} | setting.callback))
        trail = Trail(dendrites)
        saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)
        settings: dict[str, Any] = QUIET | {"enable_checkpointing": True, "max_epochs": -1} | setting.trainer()
        if rank is not None:
            strategy = DDPStrategy(process_group_backend="gloo", **setting.strategy)
            settings |= PLACES | {"strategy": strategy, "use_distributed_sampler": False}
        else:
            settings.pop("sync_batchnorm", None)
        extra = [Death(dendrites, death)] if death else []
        trainer = L.Trainer(callbacks=[dendrites, trail, saver, *extra], **settings)
        count = 4 - setting.missing * (rank or 0)
        sizes = ((0, count), (setting.validation, 2))
        train, val = (DataLoader(batches(seed, n, setting.rows, rank), None) for seed, n in sizes)
        trainer.fit(model, train, val, ckpt_path=ckpt_path)
    return {
        "weights": bits(model),
        "history": dendrites.history,
        "stop": dendrites.stop_reason,
        "optimizers": [optimizer_bits(optimizer) for optimizer in trainer.optimizers],
        "digests": trail.digests,
        "trail": trail.values,
        "traffic": trail.traffic,
        "scales": trail.scales,
    }


# -- processes ----------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def launch(
    main: Callable[[Path, list[str]], None], folder: Path, names: Iterable[str]
) -> Iterator[Callable[[float], list[tuple[int | None, str]]]]:
    """Two processes, as a cluster would start them for Lightning; whatever happens, they end with the block.

    What comes is a function that waits for both at most so many seconds: exit status and what was written to stderr.
    """
    ports = {"MASTER_PORT": str(_free_port()), "PORT_OF_A_FORK": str(_free_port())}
    errors = [folder / f"stderr {rank}" for rank in range(2)]
    parts = [process(path, _part, rank, ports, main, folder, [*names]) for rank, path in enumerate(errors)]

    def wait(seconds: float) -> list[tuple[int | None, str]]:
        end = time.monotonic() + seconds
        for part in parts:
            part.join(max(end - time.monotonic(), 0))
        return [(part.exitcode, path.read_text()) for part, path in zip(parts, errors, strict=True)]

    for part in parts:
        part.start()
    try:
        yield wait
    finally:
        for part in parts:
            part.kill()
            part.join()


def _part(rank: int, ports: dict[str, str], main: Callable[..., None], folder: Path, names: list[str]) -> None:
    os.chdir(folder)
    os.environ |= ports | {
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "NODE_RANK": str(rank if ACCELERATOR == "gpu" else 0),
        "LOCAL_RANK": str(0 if ACCELERATOR == "gpu" else rank),
        "PART": str(rank),
    }
    main(folder, names)


def count_traffic() -> None:
    """From now on note the size in bytes of all that processes add up, gather or copy from the first, and by whom."""
    plain, start = torch.distributed.all_reduce, DistributedDataParallel.__init__
    plain_gather = torch.distributed.all_gather_into_tensor
    copy = torch.distributed._broadcast_coalesced

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        TRAFFIC.append(("dendrites", tensor.nbytes))
        return plain(tensor, *args, **kwargs)

    def all_gather_into_tensor(out: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        TRAFFIC.append(("dendrites", tensor.nbytes))
        return plain_gather(out, tensor, *args, **kwargs)

    def hook(state, bucket):
        TRAFFIC.append(("DDP", bucket.buffer().nbytes))
        return plain(bucket.buffer().div_(2), async_op=True).get_future().then(lambda future: future.value()[0])

    def broadcast(group, tensors, *args):
        TRAFFIC.append(("wrapper", sum(tensor.nbytes for tensor in tensors)))
        return copy(group, tensors, *args)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.register_comm_hook(None, hook)

    torch.distributed.all_reduce = all_reduce
    torch.distributed.all_gather_into_tensor = all_gather_into_tensor
    torch.distributed._broadcast_coalesced = broadcast
    DistributedDataParallel.__init__ = init


class Death(L.Callback):
    """The second process comes to its end in its second batch of a correlation phase."""

    def __init__(self, dendrites: Any, how: str) -> None:
        self.dendrites, self.how = dendrites, how

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and self.dendrites.cycle == 2 and batch_idx == 1:
            if self.how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("boom")


def die_in_a_fork(folder: Path, rank: int, death: str) -> None:
    """Save how a process ended, and what it wrote to stderr: this one, forked, for importing takes longer than a run.

    It meets the other one at a port of its own, where nothing of it is left in the way of what this one does next.
    """
    path, child = folder / f"stderr of {death} {rank}", os.fork()
    if child == 0:
        signal.alarm(90)  # whatever happens, it ends
        os.environ["MASTER_PORT"] = os.environ["PORT_OF_A_FORK"]
        with path.open("w") as file:
            os.dup2(file.fileno(), sys.stderr.fileno())
        fit(SETTINGS["automatic"], rank, folder / death, death=death)
        sys.exit("it is still alive")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    torch.save((status, path.read_text()), folder / f"{death} {rank}.pt")


def main(folder: Path, names: list[str]) -> None:
    """One process of two: run settings one after another, save what came out, and die: a fork has done it before."""
    rank = int(os.environ["PART"])
    count_traffic()
    if ACCELERATOR == "cpu":
        nn.SyncBatchNorm.forward = _synchronised
        DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # refuses what is not on a GPU
    die_in_a_fork(folder, rank, "is killed")
    try:
        fit(Setting(missing=1), rank, folder / "missing")
    except MisconfigurationException as error:
        (folder / f"missing {rank}.txt").write_text(str(error))
    for name in names:
        setting = SETTINGS[name]
        results = {"whole": fit(setting, rank, folder / name)}
        for epoch in setting.resumed:
            path = folder / name / f"epoch={epoch}.ckpt"
            results[f"from {epoch}"] = fit(setting, rank, folder / f"{name} from {epoch}", ckpt_path=path)
        for epoch in setting.resumed_from_one:
            path = folder / "one" / name / f"epoch={epoch}.ckpt"
            results[f"from one's {epoch}"] = fit(setting, rank, folder / f"{name} from one's {epoch}", ckpt_path=path)
        for key, run in results.items():
            if rank != 0 or key != "whole":
                del run["trail"]  # thousands of tensors; of other runs than this one the digests will do
        torch.save(results, folder / f"{name} {rank}.pt")
    fit(SETTINGS["automatic"], rank, folder / "raises", death="raises")
