"""Sharded models (FSDP2) under a Trainer: what cannot grow, what grows before it is loaded, whose gradients to average.

How their dendrites lie is in :mod:`pl_dendrites.core.growth.sharded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from pl_dendrites.core.growth.hooks import attached_layers, dendrites_of
from pl_dendrites.core.growth.sharded import forms, is_sharded, reshard, whole_nodes
from pl_dendrites.core.keys import is_dendrite_key, plain_name
from pl_dendrites.core.kinds import weight_of
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.placed import PlacedNetwork
from pl_dendrites.core.structure import apply_structure
from pl_dendrites.core.tensors import local
from pl_dendrites.training import optimizers
from pl_dendrites.training.processes import Processes
from pl_dendrites.training.trainer import BeforeLoading, computing_dtype, shards

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

__all__ = ["Shards", "changing", "saved_parameter_names"]


def _refuse_part(trainer: pl.Trainer, model: nn.Module) -> None:
    own, every = model.state_dict().keys(), nn.Module.state_dict(model).keys()
    if own < every:
        raise MisconfigurationException(
            f"the model's `state_dict` leaves out {min(every - own)!r}, and with {type(trainer.strategy).__name__}"
            " nobody puts back what dendrites need. Let it return everything, and leave out in `on_save_checkpoint`"
            " what you do not want, but nothing of dendrites."
        )


def _refuse_layers(trainer: pl.Trainer, model: nn.Module) -> None:
    reasons: dict[str, list[str]] = {}
    for name, layer in attached_layers(model):
        reason = _why_not(trainer, layer, _manager(model, name))
        if reason:
            reasons.setdefault(reason, []).append(f"'{plain_name(name)}'")
    if reasons:
        found = "\n".join(f"  {', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise MisconfigurationException(f"dendrites cannot grow with {type(trainer.strategy).__name__} on\n{found}")


def _why_not(trainer: pl.Trainer, layer: nn.Module, manager: nn.Module) -> str:
    weight, dtype = weight_of(layer), computing_dtype(manager)
    trained = [p for name, p in layer.named_parameters() if p.requires_grad and not is_dendrite_key(name)]
    if not (isinstance(weight, DTensor) and all(isinstance(own, DTensor) for own in trained)):
        return (
            "its parameters are not sharded, and nobody averages their gradients. Call `fully_shard` in"
            " `configure_model` on the layer or a module around it, or let dendrites grow elsewhere."
        )
    if weight.device_mesh.ndim > 1 or weight.device_mesh.size() != trainer.world_size:
        return (
            f"it is shared out over {weight.device_mesh}, and not simply over all {trainer.world_size} processes. Call"
            " `fully_shard(..., mesh=self.device_mesh['data_parallel'])`."
        )
    small = [own for block in dendrites_of(layer) for own in block.trained_parameters()]
    if any(isinstance(own, DTensor) and own.placements[0].is_shard() for own in small):
        return (
            "it had dendrites when it was sharded, and can have no more. Shard the model without them, and go on from a"
            " checkpoint that such a fit saved."
        )
    if dtype not in (None, weight.dtype):
        return (
            f"its `MixedPrecisionPolicy` makes it compute in {dtype}, and candidates do not follow it. Use"
            " `Trainer(precision='bf16-mixed')` or `Trainer(precision='bf16-true')` instead."
        )
    if weight.device.type != trainer.strategy.root_device.type:
        return "its parameters wait on another device. Leave `CPUOffloadPolicy` out."
    return ""


def _manager(model: nn.Module, name: str) -> nn.Module:
    # The innermost module around a layer that went through `fully_shard`, or else the model.
    while name and not isinstance(model.get_submodule(name), FSDPModule):
        name = name.rpartition(".")[0]
    return model.get_submodule(name)


@contextmanager
def changing(trainer: pl.Trainer, network: DendriticNetwork) -> Iterator[None]:
    """Let optimizers and shards follow a network whose number of dendrites changes in the block.

    Within the block nodes are whole. Where nothing is sharded the optimizers alone follow.
    """
    if not is_sharded(network.model):
        with optimizers.following(trainer.optimizers, network):
            yield
        return
    reshard(network.model)
    with optimizers.following(trainer.optimizers, network), whole_nodes(network.model):
        yield


class Shards:
    """What a sharded model needs in a fit, a test and so on. For any other model it does nothing.

    Args:
        read: the weights of a checkpoint, given its path, whether training is to go on from it, and whether anything
            may be read from it.

    Attributes:
        loaded: whether one was loaded since a network was last taken in.
    """

    def __init__(self, read: Callable[[Path, bool, bool], Mapping[str, Any]]) -> None:
        self._read, self.loaded = read, False
        self._hooks: list[Any] = []
        self._loading: BeforeLoading | None = None
        self._network: DendriticNetwork | None = None

    def begin(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        attach: Callable[[pl.Trainer, pl.LightningModule], Any] | None = None,
    ) -> None:
        """From now on let the model grow to fit a checkpoint that is about to be loaded into it.

        Lightning loads a sharded model parameter by parameter, and would drop dendrites that are not there.

        Args:
            trainer: the Trainer.
            module: the model.
            attach: called after the model has grown; given in a fit alone.
        """
        self.end()
        reshard(module)
        if not shards(trainer):
            return

        def grow(path: str | Path, trusted: bool) -> None:
            reshard(module)
            weights = self._read(Path(self._processes.first(path)), attach is not None, trusted)
            before = forms(module)
            with whole_nodes(module):
                apply_structure(module, weights)
            if attach is not None and forms(module) != before:
                attach(trainer, module)
            self.loaded = True

        self._processes = Processes(trainer)
        self._trainer, self._loading = trainer, BeforeLoading(trainer, grow)

    def begin_training(self, network: DendriticNetwork) -> None:
        """Take in a network that is about to be trained.

        Raises:
            MisconfigurationException: if dendrites on any of its layers would be wrong; says what to do.
        """
        self._end_training()
        if self._loading is None:
            return
        if isinstance(network, PlacedNetwork) or any(dendrites.placed for dendrites in network.layers.values()):
            raise MisconfigurationException(
                "dendrites cannot be placed in a sharded model: use strategy='ddp', or leave `max_parameters` out and"
                " say learning='correlation'."
            )
        for dendrites in network.layers.values():
            own = [dendrites.next, *(block.form for block in dendrites.private)]
            if any(form.live for form in own):
                raise MisconfigurationException(
                    "the dendrites of a sharded model learn by correlation alone: use learning='correlation'."
                )
            if any(form.fan_in is not None or form.neurons is not None for form in own):
                raise MisconfigurationException(
                    "the dendrites of a sharded model see all inputs, and all neurons have them: leave `fan_in` out."
                )
        if network.share < 1:
            raise MisconfigurationException("all neurons of a sharded model have dendrites: leave `share` out.")
        if network.mirrors:
            raise MisconfigurationException(
                f"the mirrors of a sharded model cannot grow with what they mirror: {network.mirrors}. Use"
                " strategy='ddp', or leave what is mirrored out of `targets` and give `mirrors={}`."
            )
        _refuse_part(self._trainer, network.model)
        _refuse_layers(self._trainer, network.model)
        self._network = network
        if not self._trainer.lightning_module.automatic_optimization:
            # A model may call `loss.backward()` past Lightning. Averaging what is averaged already changes nothing.
            self._hooks = [o.register_step_pre_hook(self._before_step) for o in self._trainer.optimizers]

    def _before_step(self, *_: Any) -> None:
        self.average_gradients()

    def average_gradients(self) -> None:
        """Average gradients of dendrites, which are not sharded; ``fully_shard`` does so for all that is.

        Gradients that accumulate may be averaged each time: the mean of what is the same everywhere is just that.
        """
        if self._network is not None:
            weights = [w for w, _ in self._network.trained_parameters() if w.requires_grad]
            if weights:
                self._average(weights)

    @torch.no_grad()
    def _average(self, weights: list[nn.Parameter]) -> None:
        own = [torch.zeros_like(local(w)) if w.grad is None else local(w.grad) for w in weights]
        there = own[0].new_tensor([float(w.grad is not None) for w in weights])
        flat = torch.cat([there, *(part.flatten() for part in own)])
        self._processes.add_up(flat)
        anywhere, *means = (flat / self._processes.count).split([len(weights), *(part.numel() for part in own)])
        for weight, mean, found in zip(weights, means, anywhere.tolist(), strict=True):
            if found and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if found and weight.grad is not None:
                local(weight.grad).copy_(mean.view(weight.shape))

    def _end_training(self) -> None:
        self._network, self.loaded = None, False
        while self._hooks:
            self._hooks.pop().remove()

    def end(self) -> None:
        """Give everything back."""
        self._end_training()
        if self._loading is not None:
            self._loading.release()
            self._loading = None


def saved_parameter_names(own: Sequence[Optimizer], module: nn.Module) -> list[list[list[str]]]:
    """Names of the parameters of optimizers, in the order in which a checkpoint has the states of these.

    They are as :func:`~pl_dendrites.training.optimizers.parameter_names` gives them. Of a sharded model Lightning saves
    the states of each group in the model's order, not in the group's.

    Args:
        own: optimizers.
        module: the model whose parameters they hold.
    """
    names = optimizers.parameter_names(own, module)
    if not is_sharded(module):
        return names
    place = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    return [[sorted(group, key=lambda name: place.get(name, -1)) for group in groups] for groups in names]
