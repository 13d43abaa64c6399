"""Any other module: a node set is a list of copies of it, each with weights drawn anew."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from pl_dendrites.core.kinds.base import Inputs, LayerKind, kind_class, plain_class, plain_kind, register, weight_of
from pl_dendrites.core.kinds.linear_conv import LinearConv
from pl_dendrites.core.tensors import map_tensors

__all__ = ["WholeModule", "bare"]


@register(nn.Module)
class WholeModule(LayerKind):
    """A module of any type, whose nodes are copies of it.

    Its neurons are one dimension of one tensor that it returns. Two attributes of the module, of its class or of the
    instance, say which where one forward pass cannot tell:

    - ``neuron_output``: index or key of that tensor in what the module returns. Without it: the tensor itself, the
      first element of a tuple or list, or the only entry of a dict.
    - ``neuron_dim``: the dimension. Without it: where the neurons of the last Linear or convolution inside lie, if
      there are as many, and the last dimension of a matrix.

    A copy's neurons mix inside it, so a candidate is taken as a whole. Copies that have become dendrites are in
    evaluation mode: without dropout, and with the running statistics of normalisation layers as they were.

    Args:
        layer: the module; it is read, not kept.

    Attributes:
        returns_tensor: whether the module returns a tensor alone; ``None`` before a forward pass.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> kind = WholeModule(block)
        >>> kind.neurons  # not known before a forward pass
        >>> kind.output(block(torch.randn(5, 3, 4))).shape
        torch.Size([5, 3, 8])
        >>> kind.neurons, kind.dim
        (8, -1)
    """

    separable = False

    def __init__(self, layer: nn.Module) -> None:
        self.neurons: int | None = None
        self.dim = 0  # not known yet
        self._type = type(layer).__name__
        self._key: Any = getattr(layer, "neuron_output", None)
        self.returns_tensor: bool | None = None  # not known yet
        self._wanted_dim: int | None = getattr(layer, "neuron_dim", None)
        inner = [part for part in bare(layer).modules() if issubclass(plain_class(part), LinearConv)]
        last = plain_kind(inner[-1]) if inner else None
        self._guess = None if last is None else (last.neurons, last.dim)
        # One that computes in a way of its own may have its neurons elsewhere.
        self._sure = bool(inner) and kind_class(inner[-1]) is plain_class(inner[-1])

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why copies of a module cannot be its dendrites.

        Example:
            >>> WholeModule.why_not(nn.LayerNorm(3))
            'it has no weight matrix'
            >>> WholeModule.why_not(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))) is None
            True
        """
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            return "it holds modules and is never called itself"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "an embedding has no input that could be weighted"
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            return "it is compiled by TorchScript"
        if not any(_is_matrix(parameter) for parameter in module.parameters()):
            return "it has no weight matrix"
        reason = None
        if any(hasattr(parameter, "to_local") for parameter in module.parameters()):
            reason = "processes share out its weights between them, which a copy cannot do"
        elif not all(map(_can_follow, module.modules())):
            reason = "its `forward` was replaced on the instance, which a copy cannot follow"
        elif any(parametrize.is_parametrized(part) or _computes_weights(part) for part in module.modules()):
            reason = "weights inside it are computed from others, which a copy cannot draw anew"
        return reason

    @classmethod
    def why_no_node(cls, module: nn.Module) -> str | None:
        """Why a copy with weights drawn anew fails. This makes one, and drops it.

        Example:
            >>> WholeModule.why_no_node(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))) is None
            True
        """
        kind = WholeModule(module)
        try:
            kind.initialise(kind.node_set(module, 1), torch.Generator())
        except Exception as error:  # a module of anybody's: whatever it raises is the reason
            return f"a copy of it cannot be made: {error}"
        return None

    def output(self, out: Any) -> Tensor:
        """The tensor that holds the neurons' outputs.

        Raises:
            ValueError: if it cannot be told which that is, or which of its dimensions are the neurons, or if their
                number is another than it was.
        """
        tensor = self._pick(out)
        self.dim = self.dim or self._find_dim(tensor.shape)
        size = tensor.shape[self.dim] if -self.dim <= tensor.ndim else None
        if self.neurons is None:
            self.neurons = size
        if size is None or size != self.neurons:
            raise ValueError(
                f"the dendrites of a {self._type} have {self.neurons} neurons along dimension {self.dim} of its output,"
                f" but that has the shape {tuple(tensor.shape)}"
            )
        return tensor

    def with_output(self, out: Any, tensor: Tensor, inputs: Inputs) -> Any:
        """What the module returned, with another tensor in the place of :meth:`output`."""
        return tensor if isinstance(out, Tensor) else _with_entry(out, self._key_in(out), tensor)

    def _pick(self, out: Any) -> Tensor:
        self.returns_tensor = isinstance(out, Tensor)
        tensor = out if self.returns_tensor else out[self._key_in(out)]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{self._what()} is not a floating point tensor: set `neuron_output` on it")
        return tensor

    def _key_in(self, out: Any) -> Any:
        if self._key is not None:
            return self._key
        if isinstance(out, tuple | list) and out:
            return 0
        if isinstance(out, Mapping) and len(out) == 1:
            return next(iter(out))
        raise ValueError(
            f"{self._what()} is a {type(out).__name__}: set `neuron_output` to the index or key of the tensor"
            f" that holds its neurons"
        )

    def _find_dim(self, shape: torch.Size) -> int:
        # The shape alone: tracing names a tensor for the variable that it is last asked for its shape by, and takes a
        # model that was never called, whose next pass has no need to ask, for one that differs from call to call.
        size = len(shape)
        if self._wanted_dim is not None:
            return self._wanted_dim - (size if self._wanted_dim >= 0 else 0)
        if self._guess is not None:
            neurons, dim = self._guess
            by_chance = not self._sure and shape[1:].count(neurons) > 1
            if -dim <= size and shape[dim] == neurons and not by_chance:
                return dim
        if size == 2:  # noqa: PLR2004 - (samples, neurons)
            return -1
        raise ValueError(
            f"{self._what()} has the shape {tuple(shape)}: set `neuron_dim` to the dimension of its neurons"
        )

    def _what(self) -> str:
        return f"the output of a {self._type} that is to have dendrites"

    def node_set(self, layer: nn.Module, count: int) -> nn.Module:
        """A list of ``count`` copies."""
        return nn.ModuleList(copy.deepcopy(bare(layer)) for _ in range(count)).requires_grad_(True)

    def template(self, layer: nn.Module, count: int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.template`."""
        entries = {name: value.to("meta") for name, value in bare(layer).state_dict().items()}
        return {f"{j}.{name}": value for j in range(count) for name, value in entries.items()}

    def cost(self, layer: nn.Module) -> int:
        """See :meth:`LayerKind.cost`."""
        return sum(parameter.numel() for parameter in bare(layer).parameters())

    def initialise(self, nodes: nn.Module, generator: torch.Generator | None = None) -> None:
        """Call ``reset_parameters`` wherever it is; other matrices are drawn uniformly from plus or minus 1/sqrt(n).

        What is neither (biases and gains of a module without ``reset_parameters``) stays as it is in the layer.

        Args:
            nodes: a set made by :meth:`node_set`.
            generator: see :meth:`LayerKind.initialise`.
        """
        device = weight_of(nodes).device
        nodes.to("cpu")
        users = torch.get_rng_state()
        if generator is not None:
            seed = torch.randint(2**31, (), device="cpu", generator=generator)
            torch.default_generator.manual_seed(int(seed))
        try:
            with torch.device("cpu"):
                _draw_anew(nodes)
        finally:
            if generator is not None:
                torch.set_rng_state(users)
        nodes.to(device)

    def begin_epoch(self, nodes: nn.Module) -> None:
        """Have normalisation layers take the plain mean over the epoch: a dendrite is one with it for good."""
        for module in nodes.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.momentum = None  # cumulative
                module.reset_running_stats()

    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """See :meth:`LayerKind.potentials`."""
        return torch.stack(self.potentials_apart(nodes, count, inputs, out, live))

    def potentials_apart(
        self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False
    ) -> list[Tensor]:
        """See :meth:`LayerKind.potentials_apart`."""
        assert isinstance(nodes, nn.ModuleList)
        outputs = []
        for node in nodes:
            # A clone for each: a module may well begin with something that works in place.
            args, kwargs = map_tensors(lambda x: x.clone() if live else x.detach().clone(), tuple(inputs))
            outputs.append(self._pick(node(*args, **kwargs)))
        return outputs

    def take(self, nodes: nn.Module, choice: Tensor | int) -> dict[str, Tensor]:
        """See :meth:`LayerKind.take`."""
        assert isinstance(nodes, nn.ModuleList)
        values: dict[str, Tensor] = nodes[choice if isinstance(choice, int) else int(choice[0])].state_dict()
        return values

    def put(self, nodes: nn.Module, place: int, values: dict[str, Tensor]) -> None:
        """See :meth:`LayerKind.put`."""
        assert isinstance(nodes, nn.ModuleList)
        nodes[place].load_state_dict(values)


def _with_entry(container: Any, key: Any, value: Any) -> Any:
    if isinstance(container, tuple):
        items = [value if i == key % len(container) else item for i, item in enumerate(container)]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)
    changed = copy.copy(container)
    changed[key] = value
    return changed


def bare(module: nn.Module) -> nn.Module:
    """A module without hooks, whose owners a deepcopy would take along, and without dendrites; it shares all the rest.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> handle = layer.register_forward_hook(print)
        >>> bare(layer)(torch.zeros(1, 2)).shape, bare(layer).weight is layer.weight
        (torch.Size([1, 2]), True)
    """
    return _bare(module, {})


def _bare(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in seen:
        twin = seen[id(module)] = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        hooks = [name for name, value in module.__dict__.items() if name.endswith("_hooks") or "_hooks_" in name]
        twin.__dict__.update({name: OrderedDict() for name in hooks})
        # A method that was bound to the module is the twin's, or it would go on using the module's weights.
        bound = {n: v for n, v in module.__dict__.items() if isinstance(v, MethodType) and v.__self__ is module}
        twin.__dict__.update({name: MethodType(method.__func__, twin) for name, method in bound.items()})
        twin.__dict__["_modules"] = {
            name: child if child is None else _bare(child, seen)
            for name, child in module._modules.items()
            if name != "dendrites" or not hasattr(child, "candidates")
        }
    return seen[id(module)]


def _can_follow(module: nn.Module) -> bool:
    # A compiled module makes its own anew when it is copied.
    forward = module.__dict__.get("forward")
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    return forward is None or bound or "_orig_mod" in module._modules


def _computes_weights(module: nn.Module) -> bool:
    # Weight and spectral norm of the old kind, and pruning, compute a weight in a pre-hook, and leave it behind as a
    # plain attribute. Any other pre-hook may do with the input what it likes.
    hooks = [getattr(hook, "hook", hook) for hook in module._forward_pre_hooks.values()]
    foreign = any(not getattr(hook, "__module__", "").startswith("pl_dendrites.") for hook in hooks)
    return foreign and any(isinstance(value, Tensor) for value in module.__dict__.values())


@torch.no_grad()
def _draw_anew(nodes: nn.Module) -> None:
    for module in reversed(list(nodes.modules())):  # the parts first, for a whole may want them otherwise
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for parameter in module.parameters(recurse=False):
            if _is_matrix(parameter):
                bound = 1 / math.sqrt(max(parameter[0].numel(), 1))
                parameter.uniform_(-bound, bound)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.ndim > 1
