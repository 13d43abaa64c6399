"""What dendrites must know of the layer that they hang on: where its neurons are, and how nodes like it are made.

A kind describes a layer. What belongs to one call of it comes with the call, as :class:`Inputs`, and what outlives a
call in a memory that the dendrites keep: two threads may call a layer, and one may call it for several sequences.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pl_dendrites.core.tensors import map_tensors

__all__ = [
    "Inputs",
    "LayerKind",
    "Memory",
    "Overridden",
    "is_layer",
    "kind_class",
    "kind_of",
    "plain_class",
    "plain_kind",
    "register",
    "register_by_name",
    "scaled",
    "weight_of",
]


class Inputs(NamedTuple):
    """What a layer was called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_arguments(self, other: Inputs) -> Inputs:
        """The same call with the arguments of another."""
        return other

    def copied(self) -> Inputs:
        """The same call with copies of its tensors, which nobody changes in place."""
        return self.with_arguments(Inputs(*map_tensors(Tensor.clone, tuple(self))))


class Memory:
    """What outlives a call of a layer, and is no part of a model: a copy of it begins with none.

    From the moment that a call begins until the layer returns, it is kept for the thread that it runs in.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """A copy of the layer has not been called yet."""
        return type(self), ()

    def begin(self, call: Inputs) -> None:
        """A call begins in this thread."""
        self._here.call = call

    def running(self, inputs: Inputs) -> Inputs:
        """The call that began in this thread; it is about to return.

        Args:
            inputs: what the layer was called with in the end: a pre-hook that came later may have changed that.
        """
        call: Inputs | None = self._here.__dict__.pop("call", None)
        return inputs if call is None else call.with_arguments(inputs)


class LayerKind(ABC):
    """The view that dendrites have of one layer.

    A dendrite's node is the part of it that sees the layer's input. The nodes of all dendrites of a layer are one
    module, the node set; what it looks like is up to the kind.

    Attributes:
        neurons: number of neurons, ``C``; ``None`` while no forward pass has told.
        dim: their dimension in the layer's output, counted from the end.
        separable: whether each neuron has nodes of its own. Where it has not, a candidate is taken for all neurons or
            for none.
        choosable: whether a set may have nodes for some of the neurons alone.
        inputs: how many inputs each neuron sees; ``None`` where nodes cannot do with a part of them.
        scalable: whether a node whose parameters are all multiplied puts out as many times what it did.
        unknown: why the layer's neurons cannot be told, once a call has shown that; it then has no dendrites.
        computes_in: the methods in which a layer of this kind computes. A subclass that overrides one of them computes
            in a way of its own, and is of another kind.
    """

    computes_in: ClassVar[tuple[str, ...]] = ("forward", "__call__")
    neurons: int | None
    dim: int
    separable: bool
    choosable: bool = False
    inputs: int | None = None
    scalable: bool = False
    unknown: str | None = None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module of a type that this is the kind of cannot have dendrites; ``None``: nothing that can be seen."""
        return None

    @classmethod
    def why_no_node(cls, module: nn.Module) -> str | None:
        """The same where it takes a try to find out; asked last, and only of a module that is to grow."""
        return None

    def memory(self) -> Memory | None:
        """What dendrites are to keep for :meth:`begin` between calls of their layer; ``None``: nothing."""
        return None

    def begin(self, inputs: Inputs, memory: Memory) -> Inputs:
        """A call of the layer begins; asked only where there is a memory.

        Args:
            inputs: what the layer is called with.
            memory: from :meth:`memory`, as earlier calls left it.

        Returns:
            What the layer is to be called with instead, and what :meth:`potentials` and :meth:`with_output` get.
        """
        return inputs

    def meet(self, layer: nn.Module, inputs: Inputs, out: Any) -> None:  # noqa: B027 - most types say everything
        """Find out what the layer's type does not say; asked when the layer ran, as long as ``dim`` is 0.

        Args:
            layer: the layer; it is read, not kept.
            inputs: what it was called with.
            out: what it returned.
        """

    def first_neuron(self, layer: nn.Module) -> Tensor | None:
        """The weights of the layer's first neuron, a view; ``None``: they do not lie together."""
        return None

    def output(self, out: Any) -> Tensor:
        """The tensor that holds the neurons' outputs, of all that the layer returned."""
        tensor: Tensor = out
        return tensor

    def with_output(self, out: Any, tensor: Tensor, inputs: Inputs) -> Any:
        """What the layer returned, with another tensor in the place of :meth:`output`.

        Args:
            out: what it returned.
            tensor: the other tensor.
            inputs: what it was called with.
        """
        return tensor

    @abstractmethod
    def node_set(self, layer: nn.Module, count: int) -> nn.Module:
        """A set of ``count`` nodes for every neuron, its values undefined.

        Args:
            layer: the layer; the set is like it in type, geometry, device and dtype.
            count: nodes per neuron.
        """

    @abstractmethod
    def template(self, layer: nn.Module, count: int) -> dict[str, Tensor]:
        """The entries of a node set's state_dict, on the meta device: types and shapes alone, nothing allocated."""

    def cost(self, layer: nn.Module) -> int:
        """Parameters of one node of every neuron."""
        return sum(entry.numel() for entry in self.template(layer, 1).values() if entry.is_floating_point())

    @abstractmethod
    def initialise(self, nodes: nn.Module, generator: torch.Generator | None = None) -> None:
        """Draw the values of a node set as PyTorch draws those of a new layer.

        Args:
            nodes: the node set.
            generator: a generator on the CPU, so that a draw does not depend on the device, and the user's own sequence
                of random numbers is left alone; ``None``: PyTorch's default one.
        """

    def begin_epoch(self, nodes: nn.Module) -> None:
        """An epoch of candidates that learn begins: what nodes remember of batches is to be of this one alone."""
        return

    @abstractmethod
    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """What a node set computes beside its layer.

        Args:
            nodes: the node set.
            count: nodes per neuron.
            inputs: what the layer was called with.
            out: the layer's own :meth:`output`.
            live: whether gradient flows through the nodes into the inputs.

        Returns:
            Shape ``(count, *, C, *)``.
        """

    def potentials_apart(
        self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False
    ) -> Sequence[Tensor]:
        """What :meth:`potentials` computes of the same arguments, each node's for itself.

        Returns:
            ``count`` tensors ``(*, C, *)``. Nobody changes them in place: they may be views of one.
        """
        return self.potentials(nodes, count, inputs, out, live).unbind(0)

    @abstractmethod
    def take(self, nodes: nn.Module, choice: Tensor | int) -> dict[str, Tensor]:
        """One node of each neuron, as values that :meth:`put` takes.

        Args:
            nodes: the set that is read.
            choice: which of its nodes the neurons take: a number for all, or shape ``(C,)``; where neurons are not
                separable, all the same.
        """

    @abstractmethod
    def put(self, nodes: nn.Module, place: int, values: dict[str, Tensor]) -> None:
        """Write one node of every neuron.

        Args:
            nodes: the set that is written.
            place: which of its nodes.
            values: from :meth:`take`.
        """

    def best(self, correlation: Tensor) -> Tensor:
        """Which candidate each neuron takes, the one with the largest absolute correlation.

        Args:
            correlation: shape ``(P, C)``.

        Returns:
            Shape ``(C,)``; where neurons are not separable, for all the candidate with the largest mean.
        """
        size = correlation.abs()
        return size.argmax(0) if self.separable else size.mean(1).argmax().expand(size.shape[1])


# -- the registry -------------------------------------------------------------------------------------------------

_KINDS: dict[type[nn.Module], type[LayerKind]] = {}
_KNOWN_BY_NAME: dict[str, tuple[Callable[[nn.Module], bool], type[LayerKind]]] = {}

KindT = TypeVar("KindT", bound=type[LayerKind])


def register(*types: type[nn.Module]) -> Callable[[KindT], KindT]:
    """Say of which types of layers a class is the kind; of a subclass its nearest base decides.

    The class is made with a layer as its one argument. A subclass that overrides how its base computes is none of it,
    see :class:`Overridden`.

    Args:
        *types: the types; ``nn.Module`` is every module that has no other kind.

    Example:
        >>> from pl_dendrites.core.kinds import LinearConv
        >>> isinstance(kind_of(nn.Linear(2, 2)), LinearConv)  # which is registered for nn.Linear, among others
        True
    """

    def add(kind: KindT) -> KindT:
        _KINDS.update(dict.fromkeys(types, kind))
        return kind

    return add


def register_by_name(name: str, fits: Callable[[nn.Module], bool]) -> Callable[[KindT], KindT]:
    """The same for a type of another package, which need not be there.

    Args:
        name: of the type.
        fits: whether a module of a type with that name is one; it is not asked of others.
    """

    def add(kind: KindT) -> KindT:
        _KNOWN_BY_NAME[name] = fits, kind
        return kind

    return add


class Overridden(nn.Module):
    """Stands in the registry for every layer that is derived from a registered type and computes in a way of its own.

    Such a layer pads its input, say, or returns a tuple, and nodes like its base would not do the same.
    """


def _registered(module: nn.Module) -> tuple[type[nn.Module], type[LayerKind]]:
    for base in type(module).__mro__:
        if base in _KINDS:
            return base, _KINDS[base]
        fits, kind = _KNOWN_BY_NAME.get(base.__name__, (None, None))
        if fits is not None and kind is not None and fits(module):
            return base, kind
    raise TypeError(f"{type(module).__name__} is no module")


def _is_overridden(module: nn.Module) -> bool:
    base, kind = _registered(module)
    if base is nn.Module:
        return False
    # A method may be replaced in a class or on the instance.
    own, names = type(module), kind.computes_in
    return any(name in module.__dict__ or getattr(own, name, None) is not getattr(base, name, None) for name in names)


def kind_class(module: nn.Module) -> type[LayerKind]:
    """The class of the view that dendrites have of a module."""
    return _KINDS[Overridden] if _is_overridden(module) else plain_class(module)


def plain_class(module: nn.Module) -> type[LayerKind]:
    """The same if the module computed as the type does that it is derived from."""
    return _registered(module)[1]


def plain_kind(module: nn.Module) -> LayerKind:
    """The view of a module that :func:`plain_class` gives."""
    make: Callable[[nn.Module], LayerKind] = plain_class(module)
    return make(module)


def kind_of(module: nn.Module) -> LayerKind:
    """The view that dendrites have of a module.

    Example:
        >>> [type(kind_of(layer)).__name__ for layer in (nn.Linear(2, 2), nn.GRU(2, 2), nn.Sequential())]
        ['LinearConv', 'Recurrent', 'WholeModule']
    """
    make: Callable[[nn.Module], LayerKind] = kind_class(module)
    return make(module)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a type that has dendrites without being named: Linear, convolution or recurrent.

    Example:
        >>> is_layer(nn.Conv2d(3, 8, 3)), is_layer(nn.LayerNorm(8))
        (True, False)
    """
    return _registered(module)[0] is not nn.Module


# -- values -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, or the first of all its weights: to read type, place and shape, with no effect on the layer.

    A parametrized weight is computed whenever it is read, and spectral norm in training takes a step each time.

    Example:
        >>> weight_of(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3))).shape
        torch.Size([3, 5])
        >>> weight_of(nn.Sequential(nn.Linear(2, 3).double())).dtype
        torch.float64
    """
    parametrizations = layer._modules.get("parametrizations")
    training = [] if parametrizations is None else [module for module in parametrizations.modules() if module.training]
    for module in training:
        module.training = False
    try:
        weight = getattr(layer, "weight", None)
    finally:
        for module in training:
            module.training = True
    if isinstance(weight, Tensor):
        return weight
    return next(parameter for parameter in layer.parameters() if parameter.is_floating_point())


def scaled(values: dict[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """A node of each neuron whose potential is multiplied by a factor.

    Args:
        values: from :meth:`LayerKind.take` of a kind that is scalable.
        factors: shape ``(C,)``.

    Example:
        >>> scaled({"weight": torch.ones(2, 3), "inputs": torch.tensor([4, 5])}, torch.tensor([0.5, 2.0]))["weight"]
        tensor([[0.5000, 0.5000, 0.5000],
                [2.0000, 2.0000, 2.0000]])
    """
    weights = {name: value for name, value in values.items() if value.is_floating_point()}
    return values | {
        name: value * factors.to(value.dtype).view(-1, *[1] * (value.ndim - 1)) for name, value in weights.items()
    }
