"""Networks some of whose weights are zero for good: which are left, and how these are chosen.

A mask is a buffer beside its weight, so that a state_dict has both. Weights stay parameters as they were: layers that
hand them to others, recurrent ones and attention among them, need no code of their own, and an optimizer keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

__all__ = ["keep_largest", "keep_some", "left_for", "masks_of", "weights_of"]

_MASK = "_kept"


def weights_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that can be sparse: those with two dimensions or more that learn.

    Args:
        model: any module.
        names: of some of them; ``None``: all.

    Example:
        >>> list(weights_of(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))))
        ['0.weight']
    """
    found = {name: own for name, own in model.named_parameters() if own.ndim > 1 and own.requires_grad}
    return found if names is None else {name: found[name] for name in names}


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks that a model has, by the names of their parameters: of the same shape, false where it is zero."""
    masks = {}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        mask = getattr(model.get_submodule(path), own + _MASK, None)
        if isinstance(mask, Tensor) and mask.shape == parameter.shape:
            masks[name] = mask
    return masks


def is_mask(key: str, masks: Iterable[str]) -> bool:
    """Whether an entry of a state_dict is one of the masks of these parameters."""
    return key.endswith(_MASK) and key.removesuffix(_MASK) in masks


def left_for(model: nn.Module, parameters: int, weights: Iterable[Tensor]) -> int:
    """How many entries weights may have, where all else of a model stays.

    Args:
        model: of them.
        parameters: that the model is to have.
        weights: that are to be sparse.

    Raises:
        ValueError: if there are none to leave out, or none left.

    Example:
        >>> layer = nn.Linear(10, 4)
        >>> left_for(layer, 14, [layer.weight])
        10
    """
    own = sum(parameter.numel() for parameter in model.parameters())
    whole = sum(weight.numel() for weight in weights)
    left = parameters - (own - whole)
    if not 0 < left <= whole:
        raise ValueError(
            f"a network of {own} parameters, {whole} of them weights that can be zero, cannot have {parameters} left"
        )
    return left


@torch.no_grad()
def _keep(model: nn.Module, name: str, kept: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, own + _MASK):
        module.get_buffer(own + _MASK).copy_(kept)
    else:
        module.register_buffer(own + _MASK, kept)
    module.get_parameter(own).masked_fill_(~kept, 0)


@torch.no_grad()
def keep_largest(model: nn.Module, names: Sequence[str], count: int) -> None:
    """Leave the largest entries of some weights, and set all others to zero.

    Which these are is what ``torch.nn.utils.prune.global_unstructured`` says with ``L1Unstructured``.

    Args:
        model: of the weights.
        names: of the parameters, all compared with each other.
        count: entries that are left of all of them.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -4.0], [3.0, 2.0]]))
        >>> keep_largest(layer, ["weight"], 2)
        >>> layer.weight.tolist()
        [[0.0, -4.0], [3.0, 0.0]]
    """
    weights = [model.get_parameter(name) for name in names]
    strength = torch.cat([weight.abs().flatten() for weight in weights])
    kept = torch.zeros_like(strength, dtype=torch.bool)
    kept[strength.topk(count).indices] = True
    for name, weight, part in zip(names, weights, kept.split([weight.numel() for weight in weights]), strict=True):
        _keep(model, name, part.view_as(weight))


@torch.no_grad()
def keep_some(model: nn.Module, names: Sequence[str], count: int) -> None:
    """Leave entries of some weights by chance, and let these be as large as if a layer had no more inputs.

    A weight gets as many as are in proportion to the sum of its dimensions (Erdős-Rényi-Kernel, arXiv:1911.11134), so
    that small ones are dense and large ones sparse.

    Args:
        model: of the weights, which have the values that they begin with.
        names: of the parameters.
        count: entries that are left of all of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(98, 10), nn.Linear(10, 2))
        >>> keep_some(model, ["0.weight", "1.weight"], 128)
        >>> [int((layer.weight != 0).sum()) for layer in model]
        [115, 13]
    """
    weights = [model.get_parameter(name) for name in names]
    for name, weight, left in zip(names, weights, _shares(weights, count), strict=True):
        kept = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        kept[torch.randperm(weight.numel(), device=weight.device)[:left]] = True
        weight.mul_(math.sqrt(weight.numel() / max(left, 1)))
        _keep(model, name, kept.view_as(weight))


def _shares(weights: Sequence[Tensor], count: int) -> Iterator[int]:
    sums, full = [sum(weight.shape) for weight in weights], set[int]()
    while True:
        rest = count - sum(weights[i].numel() for i in full)
        factor = rest / max(sum(own for i, own in enumerate(sums) if i not in full), 1)
        over = {i for i, own in enumerate(sums) if i not in full and factor * own > weights[i].numel()}
        if not over:
            break
        full |= over
    shares = [weights[i].numel() if i in full else factor * own for i, own in enumerate(sums)]
    ends = [0, *(round(end) for end in accumulate(shares))]
    return (end - start for start, end in pairwise(ends))
