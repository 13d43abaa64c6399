"""How tensors are laid out: neurons along one dimension, nodes side by side, samples in a nested tensor.

Throughout, ``C`` is the number of neurons of a layer. A layer's output has its neurons along one dimension, named
``dim`` and counted from the end (``-1`` for a Linear, ``-3`` for a Conv2d), so that batched and unbatched tensors are
treated alike; all other dimensions are samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "INTEGERS",
    "alike",
    "below_transforms",
    "flat_nested",
    "is_exporting",
    "is_transformed",
    "like_nested",
    "local",
    "map_tensors",
    "may_add_in_place",
    "per_neuron",
    "unstack_nodes",
]

# What a file may hold numbers of inputs and neurons in. Booleans are none, and of the rest PyTorch takes no extremes.
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# What weights may be in; PyTorch copies no smaller floats.
FLOATS = (
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def alike(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether tensors of one type can be copied into those of another without becoming something else.

    Example:
        >>> alike(torch.bfloat16, torch.float32), alike(torch.int64, torch.uint8), alike(torch.float32, torch.int64)
        (True, True, False)
    """
    return one == other or {one, other} <= {*INTEGERS} or {one, other} <= {*FLOATS}


def is_exporting() -> bool:
    """Whether ``torch.export`` records what is done here, with tensors that have no values and no place in memory.

    Example:
        >>> is_exporting()
        False
    """
    # PyTorch 2.6 does not say.
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def is_transformed() -> bool:
    """Whether ``torch.func`` (``vmap``, ``grad``, ``jvp``, ...) or differentiation in forward mode is at work here.

    Example:
        >>> torch.func.vmap(lambda x: x * is_transformed())(torch.ones(2))
        tensor([1., 1.])
        >>> is_transformed()
        False
    """
    if torch.compiler.is_compiling():  # not within a graph that is compiled
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def may_add_in_place() -> bool:
    """Whether a sum that nobody else has may take in a term in place: not under transforms, nor in a graph.

    A batch cannot be added to what is no batch under ``torch.func.vmap``, and a graph has no use for it.

    Example:
        >>> torch.func.vmap(lambda x: x * may_add_in_place())(torch.ones(2))
        tensor([0., 0.])
        >>> may_add_in_place()
        True
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def below_transforms(tensor: Tensor) -> Tensor:
    """The tensor that one stands for under transforms of ``torch.func``, batches in front; any other tensor itself.

    Example:
        >>> _ = torch.func.grad(lambda x: print(below_transforms(x)) or x)(torch.tensor(1.0))
        tensor(1.)
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        batched = torch._C._functorch.is_batchedtensor(tensor)
        dim = torch._C._functorch.maybe_get_bdim(tensor) if batched else 0
        tensor = torch._C._functorch.get_unwrapped(tensor)
        tensor = tensor.movedim(dim, 0) if dim else tensor
    return tensor


def per_neuron(values: Tensor, dim: int, ndim: int) -> Tensor:
    """View values of shape ``(..., C)`` so that they broadcast against an output with ``ndim`` dimensions.

    Args:
        values: shape ``(*lead, C)``.
        dim: the neuron dimension of the output, counted from the end.
        ndim: number of dimensions of the output.

    Returns:
        A view of shape ``(*lead, 1, ..., C, ..., 1)`` with ``len(lead) + ndim`` dimensions.

    Example:
        >>> per_neuron(torch.zeros(4, 3), dim=-3, ndim=4).shape
        torch.Size([4, 1, 3, 1, 1])
    """
    if dim == -1 and values.ndim == 1:  # they broadcast as they are
        return values
    *lead, neurons = values.shape
    return values.reshape(*lead, *[1] * (ndim + dim), neurons, *[1] * (-dim - 1))


def local(tensor: Tensor) -> Tensor:
    """A tensor as this process has it, where processes share one (a ``DTensor``); any other tensor itself.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def flat_nested(nested: Tensor) -> Tensor:
    """The samples of a nested tensor, one after another.

    ``nn.TransformerEncoder`` makes its input a nested tensor in inference, to leave out what is padded.

    Args:
        nested: components ``(*, n)``.

    Returns:
        Shape ``(samples, n)``.

    Example:
        >>> flat_nested(torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(5, 3)])).shape
        torch.Size([7, 3])
    """
    if nested.layout == torch.jagged:
        return nested.values()
    return torch.cat([part.flatten(0, -2) for part in nested.unbind()])


def like_nested(samples: Tensor, nested: Tensor) -> Tensor:
    """Undo :func:`flat_nested`.

    Args:
        samples: shape ``(samples, C)``.
        nested: a nested tensor of as many samples.

    Returns:
        The samples with the layout and the structure of ``nested``.

    Example:
        >>> nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(5, 3)])
        >>> [part.shape[0] for part in like_nested(torch.ones(7, 3), nested).unbind()]
        [2, 5]
    """
    if nested.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(samples, nested.offsets())  # type: ignore[attr-defined]
    shapes = [part.shape for part in nested.unbind()]
    parts = samples.split([shape[:-1].numel() for shape in shapes])
    return torch.nested.as_nested_tensor([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])


def unstack_nodes(stacked: Tensor, count: int, groups: int, dim: int) -> Tensor:
    """Take apart a dimension that holds ``count`` nodes for each of ``C`` neurons.

    A set of nodes is one standard layer with ``count * C`` output channels. In a grouped convolution a node must see
    the inputs of its own neuron's group, so the channels lie in the order (group, node, neuron of the group).

    Args:
        stacked: any tensor with ``count * C`` entries along ``dim``.
        count: nodes per neuron.
        groups: groups of the layer; 1 for a Linear.
        dim: the dimension to take apart.

    Returns:
        The nodes in front: shape ``(count, *stacked.shape)`` with ``C`` entries along the former ``dim``; a view where
        ``groups`` is 1.

    Example:
        >>> unstack_nodes(torch.arange(6), count=3, groups=1, dim=0)
        tensor([[0, 1],
                [2, 3],
                [4, 5]])
        >>> unstack_nodes(torch.arange(6), count=3, groups=2, dim=0)
        tensor([[0, 3],
                [1, 4],
                [2, 5]])
    """
    dim = dim % stacked.ndim
    neurons = stacked.shape[dim] // count
    apart: Tensor = stacked.unflatten(dim, (groups, count, neurons // groups))
    return apart.movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts.

    Example:
        >>> map_tensors(torch.neg, {"x": [torch.ones(1)], "n": 3})
        {'x': [tensor([-1.])], 'n': 3}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value
