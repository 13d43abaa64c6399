"""Which group of the user's optimizers a new parameter joins: not every optimizer takes every parameter."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.training.restart import is_plain

__all__ = ["begin_remembering", "group_for"]

Group = dict[str, Any]


def group_for(optimizers: Sequence[Optimizer], parameter: nn.Parameter, weight: nn.Parameter) -> Group | None:
    """The group that a parameter of dendrites joins.

    That is the group of the layer's own weight, or the first one where no optimizer holds that. Some optimizers take
    matrices alone (Muon), and output weights are vectors: then it is a group that can take it, first of those that hold
    something of as many dimensions, and of the same optimizer.

    Args:
        optimizers: the optimizers.
        parameter: the new parameter.
        weight: of its layer.

    Returns:
        One of their groups; ``None`` if none of them can take it.

    Example:
        >>> matrix, bias, new = (nn.Parameter(torch.zeros(size)) for size in ((2, 2), (2,), (2,)))
        >>> muon, adam = torch.optim.SGD([matrix]), torch.optim.Adam([bias])
        >>> group_for([muon, adam], new, matrix) is muon.param_groups[0]
        True
    """
    pairs = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    own = next(((o, g) for o, g in pairs if any(p is weight for p in g["params"])), None)
    first = own or next(iter(pairs), None)
    if first is None:
        return None
    others = sorted(pairs, key=lambda pair: (not _holds_alike(pair[1], parameter), pair[0] is not first[0]))
    return next((group for optimizer, group in (first, *others) if _takes(optimizer, group, parameter)), None)


def begin_remembering(optimizers: Sequence[Optimizer]) -> None:
    """Let optimizers that would not do so by themselves begin to remember something of parameters that arrived.

    Most do so in a parameter's first step. Some did it for all in their own first step: for these it is nothing (zeros)
    of the kind that they remember of others.

    Args:
        optimizers: the optimizers, in the middle of a fit.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            known = sorted((p for p in group["params"] if optimizer.state.get(p)), key=lambda p: p.ndim)
            for parameter in [p for p in group["params"] if known and not optimizer.state.get(p)]:
                pattern = next((p for p in known if p.ndim == parameter.ndim), known[0])
                nothing = _nothing(optimizer.state[pattern], pattern, parameter)
                if nothing and not _steps(optimizer, group, parameter):
                    optimizer.state[parameter] = nothing


def _nothing(state: dict[str, Any], of: nn.Parameter, parameter: nn.Parameter) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == of.shape:
            made[name] = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        elif is_plain(value):
            made[name] = copy.deepcopy(value)
        else:
            return {}
    return made


def _holds_alike(group: Group, parameter: nn.Parameter) -> bool:
    return any(p.ndim == parameter.ndim for p in group["params"])


def _takes(optimizer: Optimizer, group: Group, parameter: nn.Parameter) -> bool:
    if _holds_alike(group, parameter):
        return True
    like = group["params"][0] if group["params"] else nn.Parameter(torch.ones(2, 2))
    # Tried on the side: it takes a step with what it holds, and none with such a parameter. Where both fail, it is
    # for another reason (a closure, a mode), and that says nothing.
    return _steps(optimizer, group, parameter) or not _steps(optimizer, group, like)


def _steps(optimizer: Optimizer, group: Group, like: nn.Parameter) -> bool:
    small = nn.Parameter(torch.ones([min(size, 4) for size in like.shape], dtype=like.dtype))
    small.grad = torch.full_like(small, 0.01)
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            trial: Any = object.__new__(type(optimizer))
            own = {key: value for key, value in vars(optimizer).items() if key != "step"}  # a scheduler wraps that
            vars(trial).update({key: copy.deepcopy(value) if is_plain(value) else value for key, value in own.items()})
            hooks: dict[str, Any] = {key: OrderedDict() for key in own if key.endswith("_hooks")}
            vars(trial).update(hooks, state=defaultdict(dict))
            vars(trial)["param_groups"] = [{**copy.deepcopy(settings), "params": [small]}]
            trial.step()
    except Exception:  # whatever an optimizer raises for what it does not take
        return False
    return True
