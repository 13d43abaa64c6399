"""Models whose parameters processes share out (FSDP2): how their dendrites lie, change in number, and are copied.

A dendrite's node, as large as its layer, is sharded as the layer is, and so is whole only while it computes. Links,
output weights and shared dendrites are small: every process has them whole. What learns of them with the network are
DTensors all the same, for neither gradient clipping nor an optimizer that takes several parameters at once can mix
DTensors with plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.growth.dendrites import AnyForm
from pl_dendrites.core.growth.hooks import attached_layers, dendrites_of
from pl_dendrites.core.growth.shared_block import SharedForm
from pl_dendrites.core.keys import count_in, entries_by_layer, is_shared
from pl_dendrites.core.kinds import weight_of
from pl_dendrites.core.tensors import local

if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

__all__ = ["forms", "gather_weights", "is_sharded", "reshard", "scatter_weights", "whole_nodes"]


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of a model went through ``fully_shard``."""
    return torch.distributed.is_available() and any(isinstance(part, FSDPModule) for part in model.modules())


def reshard(model: nn.Module) -> None:
    """Have every module hold its shards: after a forward pass without a backward one some are still whole.

    The parameters that a module has in that time are others than those that an optimizer holds.
    """
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def forms(model: nn.Module) -> dict[str, list[AnyForm]]:
    """What the dendrites of each layer that can have some look like."""
    return {name: dendrites_of(layer).forms for name, layer in attached_layers(model)}


@contextmanager
def whole_nodes(model: nn.Module) -> Iterator[None]:
    """Have all dendrites' nodes whole within the block, and sharded after it, new ones too."""
    for _, layer in attached_layers(model):
        for block in dendrites_of(layer).private:
            if isinstance(block.nodes, FSDPModule):
                block.nodes.unshard()
    yield
    _shard(model)


def _shard(model: nn.Module) -> None:
    for _, layer in attached_layers(model):
        weight = weight_of(layer)
        if not isinstance(weight, DTensor):
            continue
        mesh = weight.device_mesh
        for shared in dendrites_of(layer).shared:
            _replicate(shared, mesh)
        for block in dendrites_of(layer).private:
            _replicate(block.weights, mesh)
            if isinstance(block.nodes, FSDPModule):
                block.nodes.reshard()
            else:
                fully_shard(block.nodes, mesh=mesh, reshard_after_forward=True)


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    for name, own in list(module.named_parameters(recurse=False)):
        if not isinstance(own, DTensor):
            replicated = DTensor.from_local(own.detach(), mesh, [Replicate()], run_check=False)
            setattr(module, name, nn.Parameter(replicated, own.requires_grad))


@torch.no_grad()
def gather_weights(model: nn.Module, copy: Callable[[str, Tensor, Tensor], Tensor]) -> dict[str, Any]:
    """A copy on the CPU of what a checkpoint holds of a sharded model. All processes must call this.

    Args:
        model: the model.
        copy: makes a copy, of an entry's name, the whole tensor and what this process has of it.

    Returns:
        The whole tensors in the first process; in the others empty ones stand for what is sharded.
    """
    first = torch.distributed.get_rank() == 0
    found: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if isinstance(whole, Tensor):
            keep = first or not isinstance(value, DTensor)
            whole = copy(key, whole, local(value)) if keep else torch.empty(0, dtype=value.dtype)
        found[key] = whole
    return found


@torch.no_grad()
def scatter_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put back what :func:`gather_weights` returned. All processes must call this, within :func:`whole_nodes`.

    Args:
        model: the model; it grows or shrinks to fit.
        weights: of the same model, with any number of dendrites; in processes but the first, shards are not read.
    """
    there = entries_by_layer(weights)
    for name, layer in attached_layers(model):
        blocks = [values for _, values in sorted(there.get(name, {}).items(), key=lambda item: int(item[0]))]
        dendrites_of(layer).reshape(layer, [_form_of(values) for values in blocks])
    _shard(model)
    for key, value in model.state_dict().items():
        given = weights[key]
        if isinstance(value, DTensor):
            whole = given if given.numel() else torch.empty(value.shape, dtype=value.dtype)
            value.copy_(distribute_tensor(whole.to(value.device), value.device_mesh, value.placements))
        elif isinstance(value, Tensor):
            value.copy_(given)


def _form_of(values: Mapping[str, Any]) -> Form | SharedForm:
    # Not by shapes of what is learned, which only the first process has.
    if is_shared(values):
        return SharedForm.of(values)
    return Form(count_in(values), list(ACTIVATIONS)[int(values["code"][0])])
