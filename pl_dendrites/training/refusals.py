"""What dendrites cannot work with, refused at the start of a fit with the reason and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.training.groups import group_for
from pl_dendrites.training.trainer import callbacks_of, has_communication_state, is_a, shards

__all__ = ["refuse_homeless", "refuse_optimizers", "refuse_unsupported"]

_ONE_AFTER_THE_OTHER = (
    "Finetune in a first fit, then grow dendrites in a second one without it, on layers that are trainable or on frozen"
    " ones (`targets='frozen'`). Or grow in the first fit, and finetune the grown model without DendriteCallback."
)
_REFUSED = {
    "WeightAveraging": "averages the weights of a network of fixed size, and this one grows. Remove it, or average in a"
    " second fit of the grown model.",
    "StochasticWeightAveraging": "averages the weights of a network of fixed size, and this one grows. Remove it, or"
    " average in a second fit of the grown model.",
    "FinetuningScheduler": "thaws layers phase by phase, and between phases brings back its best checkpoint, which may"
    f" have other dendrites than the network has by then. {_ONE_AFTER_THE_OTHER}",
    "BaseFinetuning": "thaws layers and adds parameter groups at epochs of its own choosing, also where the network is"
    f" to stand still. {_ONE_AFTER_THE_OTHER}",
    "ModelPruning": "renames weights and masks them, so that neither the best network nor a checkpoint would fit the"
    " model any more. Remove it, or prune in a second fit of the grown model.",
}
_REFUSED_STRATEGIES = {  # some of them are kinds of DDPStrategy
    "FSDPStrategy": "lays out parameters flat once and cannot take in those of new dendrites",
    "DeepSpeedStrategy": "hands the optimizer's parameters to an engine that cannot take in those of new dendrites",
    "XLAStrategy": "traces a network of fixed size, and this one grows",
    "XLAFSDPStrategy": "lays out parameters flat once and cannot take in those of new dendrites",
    "SingleDeviceXLAStrategy": "traces a network of fixed size, and this one grows",
}
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")


def refuse_unsupported(trainer: pl.Trainer, monitor: str, grows_on_load: bool, best_on: str) -> None:
    """Raise where dendrites could not be added or a result would be wrong, before any training.

    Args:
        trainer: the Trainer that is about to fit.
        monitor: the metric that decides.
        grows_on_load: whether the model was made to grow on load before this fit.
        best_on: where the best network is to be.

    Raises:
        MisconfigurationException: says what is in the way and what to do.
    """
    _refuse_strategy(trainer.strategy)
    _refuse_model_parallel(trainer, best_on)
    if is_a(trainer.strategy.launcher, "_MultiProcessingLauncher") and not grows_on_load:
        raise MisconfigurationException(
            "With ddp_spawn, ddp_fork and ddp_notebook Lightning loads the trained weights into the model of the first"
            " process, and would drop the dendrites there. Call `pl_dendrites.grow_on_load(model)` before the fit, or"
            " use strategy='ddp'."
        )
    if trainer.barebones:
        raise MisconfigurationException(
            f"Trainer(barebones=True) logs no metrics, and {monitor!r} is to decide. Use a Trainer without it."
        )
    for callback in callbacks_of(trainer):
        for name, reason in _REFUSED.items():
            if is_a(callback, name):
                raise MisconfigurationException(f"{type(callback).__name__} {reason}")
        if is_a(callback, "EarlyStopping") and getattr(callback, "monitor", None) == monitor:
            raise MisconfigurationException(
                f"EarlyStopping(monitor={monitor!r}) would end training at the first plateau, where dendrites are to be"
                " added. Remove it: DendriteCallback stops by itself, and its `patience` and `min_delta` mean the same."
            )


def _refuse_strategy(strategy: Any) -> None:
    reason = next((reason for name, reason in _REFUSED_STRATEGIES.items() if is_a(strategy, name)), None)
    if reason is None and has_communication_state(strategy):
        reason = "has a communication hook that remembers gradients of a network of fixed size (`ddp_comm_state`)"
    if reason is None and not any(is_a(strategy, name) for name in _STRATEGIES):
        reason = "is not known to take in parameters that arrive during training"
    if reason is not None:
        raise MisconfigurationException(
            f"DendriteCallback cannot work with {type(strategy).__name__}: it {reason}. Use `Trainer(devices=1)` or"
            " `Trainer(strategy='ddp')`."
        )


def _refuse_model_parallel(trainer: pl.Trainer, best_on: str) -> None:
    strategy: Any = trainer.strategy
    if not shards(trainer):
        return
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            "DendriteCallback cannot work with tensor parallelism: no process would see all of a layer's neurons. Use"
            " `ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)`."
        )
    if best_on == "disk":
        raise MisconfigurationException(
            f"best_on='disk' cannot work with {type(strategy).__name__}: each process would read the whole network."
            " Leave it out: the best network is in the main memory of the first process alone."
        )
    if any(is_a(callback, "OnExceptionCheckpoint") for callback in callbacks_of(trainer)):
        raise MisconfigurationException(
            f"OnExceptionCheckpoint cannot save with {type(strategy).__name__}: a checkpoint takes all processes, and"
            " after an exception some are elsewhere. Remove it, and let ModelCheckpoint save often enough."
        )


def refuse_optimizers(trainer: pl.Trainer) -> None:
    """Raise for optimizers that cannot take in a parameter.

    Args:
        trainer: the Trainer, with its optimizers set up.

    Raises:
        MisconfigurationException: says which one and what to do.
    """
    for optimizer in trainer.optimizers:
        for name, manner in {"LBFGS": "lays out", "ZeroRedundancyOptimizer": "deals out"}.items():
            if is_a(optimizer, name):
                raise MisconfigurationException(
                    f"{name} {manner} its parameters once and cannot take in those of new dendrites. Use another"
                    " optimizer."
                )
    count, own = len(trainer.optimizers), [optimizer.param_groups for optimizer in trainer.optimizers]
    empty = sum(not any(group["params"] for group in groups) for groups in own)
    if empty and count > 1:
        raise MisconfigurationException(
            f"{empty} of the model's {count} optimizers hold no parameters, and nobody knows which"
            " dendrites are theirs to train. Let each hold the layers that are its own, frozen or not: what grows on"
            " them joins it. Or configure one optimizer."
        )


def refuse_homeless(optimizers: Sequence[Optimizer], network: DendriticNetwork) -> None:
    """Raise where no optimizer could take in the output weights of a layer's dendrites, which are a vector.

    Args:
        optimizers: the model's; without any, nothing is said.
        network: the network.

    Raises:
        MisconfigurationException: says which one holds the layer and what to do.
    """
    for name, own in network.own_parameters().items() if optimizers else ():
        weight = max(own, key=Tensor.dim)
        if group_for(optimizers, nn.Parameter(weight.new_zeros(2)), weight) is None:
            kinds = ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
            raise MisconfigurationException(
                f"no group of the model's optimizers ({kinds}) takes in a vector, and the output weights of the"
                f" dendrites of '{name}' are one for each dendrite. Let another optimizer hold something, biases or a"
                " head, say AdamW: the output weights then join it."
            )
