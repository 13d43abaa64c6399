"""Models whose parameters are shared out over the processes (FSDP2): how their dendrites lie, grow, and are kept.

A dendrite's node, as large as its layer, is sharded as the layer is, and so is whole only while it computes. Links and
output weights are small: every process has them whole. Output weights are DTensors all the same, for neither gradient
clipping nor an optimizer that takes several parameters at once can mix DTensors with plain tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites import host, optimizers
from pl_dendrites.core.dendrites import Dendrites
from pl_dendrites.core.functional import ACTIVATIONS
from pl_dendrites.core.kinds import weight_of
from pl_dendrites.core.network import DendriticNetwork, restore_structure
from pl_dendrites.core.shapes import local
from pl_dendrites.core.stack import Form
from pl_dendrites.core.structure import is_dendrite_key
from pl_dendrites.core.targets import plain_name
from pl_dendrites.ranks import Ranks

if torch.distributed.is_available():
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

__all__ = [
    "SHARDED_KEY",
    "Shards",
    "changing",
    "gather_weights",
    "is_sharded",
    "read_folder",
    "reshard",
    "saved_parameter_names",
    "scatter_weights",
]


# Whether a checkpoint's model was sharded.
SHARDED_KEY = "pl_dendrites_sharded"


def is_sharded(module: nn.Module) -> bool:
    """Whether a part of a model went through ``fully_shard``."""
    return torch.distributed.is_available() and any(isinstance(part, FSDPModule) for part in module.modules())


def _refuse_layers(trainer: pl.Trainer, model: nn.Module) -> None:
    reasons: dict[str, list[str]] = {}
    for name, layer, dendrites in _layers(model):
        reason = _why_not(trainer, layer, dendrites, _manager(model, name))
        if reason:
            reasons.setdefault(reason, []).append(f"'{plain_name(name)}'")
    if reasons:
        found = "\n".join(f"  {', '.join(names)}: {reason}" for reason, names in reasons.items())
        raise MisconfigurationException(f"dendrites cannot grow with {type(trainer.strategy).__name__} on\n{found}")


def _why_not(trainer: pl.Trainer, layer: nn.Module, dendrites: Dendrites, manager: nn.Module) -> str:
    weight, dtype = weight_of(layer), host.computing_dtype(manager)
    if not isinstance(weight, DTensor):
        return (
            "its parameters are not sharded, and nobody averages their gradients. Call `fully_shard` in"
            " `configure_model` on the layer or a module around it, or name it in `exclude`."
        )
    if weight.device_mesh.ndim > 1 or weight.device_mesh.size() != trainer.world_size:
        return (
            f"it is shared out over {weight.device_mesh}, and not simply over all {trainer.world_size} processes. Call"
            " `fully_shard(..., mesh=self.device_mesh['data_parallel'])`."
        )
    weights = [own for stack in dendrites for own in stack.weights]
    if any(isinstance(own, DTensor) and own.placements[0].is_shard() for own in weights):
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
    with optimizers.following(trainer.optimizers, network), _whole(network.model):
        yield


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    for _, _, dendrites in _layers(model):
        for stack in dendrites:
            if isinstance(stack.nodes, FSDPModule):
                stack.nodes.unshard()
    yield
    _shard(model)


def _shard(model: nn.Module) -> None:
    for _, layer, dendrites in _layers(model):
        weight = weight_of(layer)
        if not isinstance(weight, DTensor):
            continue
        mesh = weight.device_mesh
        for stack in dendrites:
            for j, own in enumerate(stack.weights):
                if not isinstance(own, DTensor):
                    replicated = DTensor.from_local(own.detach(), mesh, [Replicate()], run_check=False)
                    stack.weights[j] = nn.Parameter(replicated, own.requires_grad)
            if isinstance(stack.nodes, FSDPModule):
                stack.nodes.reshard()
            else:
                fully_shard(stack.nodes, mesh=mesh, reshard_after_forward=True)


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, Dendrites]]:
    layers = [(name, module, module._modules.get("dendrites")) for name, module in model.named_modules()]
    return [(name, layer, dendrites) for name, layer, dendrites in layers if isinstance(dendrites, Dendrites)]


def _counts(model: nn.Module) -> list[int]:
    return [dendrites.count for _, _, dendrites in _layers(model)]


def reshard(model: nn.Module) -> None:
    """Have every module hold its shards: after a forward pass without a backward one some are still whole.

    The parameters that a module has in that time are others than those that an optimizer holds.
    """
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Shards:
    """What a sharded model needs in a fit, a test and so on. For any other model it does nothing."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._loading: host.BeforeLoading | None = None
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
        if not host.shards(trainer):
            return

        def grow(path: str | Path) -> None:
            reshard(module)
            weights = _weights_to_load(Path(self._ranks.first(path)), fitting=attach is not None)
            before = _counts(module)
            with _whole(module):
                restore_structure(module, weights)
            if attach is not None and _counts(module) != before:
                attach(trainer, module)

        self._ranks = Ranks(trainer)
        self._trainer, self._loading = trainer, host.BeforeLoading(trainer, grow)

    def begin_training(self, network: DendriticNetwork) -> None:
        """Take in a network that is about to be trained.

        Raises:
            MisconfigurationException: if dendrites on any of its layers would be wrong; says what to do.
        """
        self._end_training()
        if self._loading is None:
            return
        for dendrites in network.layers.values():
            forms = [dendrites.next, *dendrites.forms]
            if any(form.live for form in forms):
                raise MisconfigurationException(
                    "the dendrites of a sharded model learn by correlation alone: use learning='correlation'."
                )
            if any(form.fan_in is not None or form.neurons is not None for form in forms):
                raise MisconfigurationException(
                    "the dendrites of a sharded model see all inputs, and all neurons have them: leave `fan_in` out."
                )
        if network.share < 1:
            raise MisconfigurationException("all neurons of a sharded model have dendrites: leave `share` out.")
        _refuse_layers(self._trainer, network.model)
        self._network = network
        if not self._trainer.lightning_module.automatic_optimization:
            # A model may call `loss.backward()` past Lightning. Averaging what is averaged already changes nothing.
            self._hooks = [o.register_step_pre_hook(self._before_step) for o in self._trainer.optimizers]

    def _before_step(self, *_: Any) -> None:
        self.average_gradients()

    def average_gradients(self) -> None:
        """Average the output weights' gradients over the processes; ``fully_shard`` does so for all that is sharded.

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
        flat = torch.cat([there, *own])
        self._ranks.add_up(flat)
        anywhere, *means = (flat / self._ranks.count).split([len(weights), *(part.numel() for part in own)])
        for weight, mean, found in zip(weights, means, anywhere.tolist(), strict=True):
            if found and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if found and weight.grad is not None:
                local(weight.grad).copy_(mean)

    def _end_training(self) -> None:
        self._network = None
        while self._hooks:
            self._hooks.pop().remove()

    def end(self) -> None:
        """Give everything back."""
        self._end_training()
        if self._loading is not None:
            self._loading.release()
            self._loading = None


# -- what is kept ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gather_weights(module: nn.Module) -> dict[str, Any]:
    """A copy on the CPU of what a checkpoint holds of a sharded model. All processes must call this.

    Returns:
        The whole tensors in the first process; in the others empty ones stand for what is sharded.
    """
    first = torch.distributed.get_rank() == 0
    found: dict[str, Any] = {}
    for key, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if isinstance(whole, Tensor):
            keep = first or not isinstance(value, DTensor)
            whole = whole.detach().to("cpu", copy=True) if keep else torch.empty(0, dtype=value.dtype)
        found[key] = whole
    return found


@torch.no_grad()
def scatter_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put back what :func:`gather_weights` returned. All processes must call this, within :func:`changing`.

    Args:
        module: the model; it grows or shrinks to fit.
        weights: of the same model, with any number of dendrites; in processes but the first, shards are not read.
    """
    for name, layer, dendrites in _layers(module):
        path, forms = f"{name}.dendrites." if name else "dendrites.", list[Form]()
        while f"{path}{len(forms)}.code" in weights:
            stack = f"{path}{len(forms)}."
            count = sum(key.startswith(f"{stack}weights.") for key in weights)
            forms.append(Form(count, list(ACTIVATIONS)[int(weights[f"{stack}code"][0])]))
        dendrites.reshape(layer, forms)
    _shard(module)
    for key, value in module.state_dict().items():
        given = weights[key]
        if isinstance(value, DTensor):
            whole = given if given.numel() else torch.empty(value.shape, dtype=value.dtype)
            value.copy_(distribute_tensor(whole.to(value.device), value.device_mesh, value.placements))
        elif isinstance(value, Tensor):
            value.copy_(given)


def saved_parameter_names(own: Sequence[Optimizer], module: nn.Module) -> list[list[list[str]]]:
    """Names as :func:`~pl_dendrites.optimizers.parameter_names` gives them, in the order of a checkpoint's states.

    Of a sharded model Lightning saves the states of each group in the model's order, not in the group's.

    Args:
        own: optimizers.
        module: the model whose parameters they hold.
    """
    names = optimizers.parameter_names(own, module)
    if not is_sharded(module):
        return names
    place = {name: i for i, (name, _) in enumerate(module.named_parameters())}
    return [[sorted(group, key=lambda name: place.get(name, -1)) for group in groups] for groups in names]


# -- loading -----------------------------------------------------------------------------------------------------------


def read_folder(path: Path) -> dict[str, Any]:
    """A checkpoint that each process wrote a part of; optimizer states are left out.

    Args:
        path: a folder.

    Raises:
        ValueError: if it is no checkpoint.
    """
    if not (path / host.METADATA_FILE).is_file():
        raise ValueError(f"'{path}' cannot be read as a checkpoint: it is a folder without '{host.METADATA_FILE}'")
    checkpoint: dict[str, Any] = torch.load(path / host.METADATA_FILE, map_location="cpu", weights_only=True)
    return checkpoint | {"state_dict": _weights_of_folder(path, lambda key: True)}


def _weights_of_folder(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    # Of those that are not wanted only types and shapes are true.
    metadata = FileSystemReader(path).read_metadata()
    places = {place: flat for flat, place in (metadata.planner_data or {}).items()}
    read, shapes = {}, {}
    for (root, *rest), flat in places.items():
        entry = metadata.state_dict_metadata[flat]
        if root == "state_dict" and len(rest) == 1 and isinstance(entry, TensorStorageMetadata):
            key, dtype = rest[0], entry.properties.dtype
            if wanted(key):
                read[key] = torch.empty(entry.size, dtype=dtype)
            else:
                shapes[key] = torch.empty((), dtype=dtype).expand(entry.size)
    with warnings.catch_warnings():  # of there being one process
        warnings.simplefilter("ignore")
        load({"state_dict": read}, checkpoint_id=path)
    return shapes | read


def _weights_to_load(path: Path, fitting: bool) -> dict[str, Any]:
    if path.is_dir():
        return _weights_of_folder(path, is_dendrite_key)
    checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    weights: dict[str, Any] = checkpoint["state_dict"]
    if fitting and any(map(is_dendrite_key, weights)) and not checkpoint.get(SHARDED_KEY):
        raise MisconfigurationException(
            f"'{path}' was saved by a fit that did not shard the model, and has optimizer states by position, which"
            " Lightning would give to other parameters here. Go on with the strategy that it was saved under."
        )
    return weights
