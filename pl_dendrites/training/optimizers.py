"""The user's optimizers while a network grows: which parameters they hold, and what they were when the fit began."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.core.network import DendriticNetwork

__all__ = [
    "OptimizerSettings",
    "adopt_parameters",
    "drop_spoilt_state",
    "following",
    "forget",
    "order_parameters",
    "parameter_names",
]

_NAMELESS = "(not in the model)"


class OptimizerSettings:
    """Settings of a Trainer's optimizers (learning rates and all else) and states of its schedulers, to come back to.

    Args:
        trainer: the Trainer, with its optimizers set up.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._optimizers = list(trainer.optimizers)
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._settings = [
            [
                copy.deepcopy({key: value for key, value in group.items() if key not in ("params", "param_names")})
                for group in optimizer.param_groups
            ]
            for optimizer in self._optimizers
        ]
        self.scheduler_states: list[dict[str, Any]] = [copy.deepcopy(s.state_dict()) for s in self._schedulers]

    def restore(self) -> None:
        """Put everything back. What optimizers remember of their parameters, and the parameters, stay."""
        for optimizer, groups in zip(self._optimizers, self._settings, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(copy.deepcopy(settings))
        for scheduler, state in zip(self._schedulers, self.scheduler_states, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))


def forget(optimizers: Iterable[Optimizer]) -> None:
    """Clear what optimizers remember of their parameters."""
    for optimizer in optimizers:
        optimizer.state.clear()


def drop_spoilt_state(optimizers: Iterable[Optimizer]) -> None:
    """Clear what optimizers remember of a parameter where it is not finite: it would spoil restored weights again."""
    for optimizer in optimizers:
        for parameter, state in list(optimizer.state.items()):
            values = [value for value in state.values() if isinstance(value, Tensor)]
            if not all(bool(torch.isfinite(value).all()) for value in values):
                del optimizer.state[parameter]


def adopt_parameters(
    optimizers: Iterable[Optimizer],
    leaving: Iterable[nn.Parameter],
    arriving: Iterable[tuple[nn.Parameter, nn.Parameter]],
) -> None:
    """Let optimizers follow a network that grew or shrank.

    New parameters join an existing group: a new group would break most schedulers, and the group of the layer's own
    weight has the right learning rate and weight decay. Parameters are compared by identity.

    Args:
        optimizers: the optimizers.
        leaving: parameters that the network no longer has, or does not train.
        arriving: pairs of a parameter of the network and the weight of its layer. Those that are there already stay;
            one whose layer's weight is in no group joins the first.
    """
    optimizers = list(optimizers)
    gone = {id(parameter) for parameter in leaving}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if id(p) in gone]:
                optimizer.state.pop(parameter, None)
            keep = [id(p) not in gone for p in group["params"]]
            for key in [key for key in ("params", "param_names") if key in group]:
                group[key][:] = [entry for entry, kept in zip(group[key], keep, strict=True) if kept]
    owners = {id(parameter): group for group in groups for parameter in group["params"]}
    for parameter, weight in arriving:
        if id(parameter) not in owners and groups:
            group = owners.get(id(weight), groups[0])
            group["params"].append(parameter)
            owners[id(parameter)] = group
            if "param_names" in group:
                group["param_names"].append(f"dendrites.{len(group['params']) - 1}")


@contextmanager
def following(optimizers: Iterable[Optimizer], network: DendriticNetwork) -> Iterator[None]:
    """Let optimizers hold what the network trains of its dendrites after a change of their number.

    Args:
        optimizers: the optimizers.
        network: the network, which the body of the ``with`` changes.
    """
    before = [weight for weight, _ in network.trained_parameters()]
    yield
    after = list(network.trained_parameters())
    stay = {id(weight) for weight, _ in after}
    adopt_parameters(optimizers, [weight for weight in before if id(weight) not in stay], after)


def parameter_names(optimizers: Sequence[Optimizer], module: nn.Module) -> list[list[list[str]]]:
    """The name of each parameter in each group of each optimizer; empty for one that is not the module's."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[[names.get(id(p), "") for p in group["params"]] for group in o.param_groups] for o in optimizers]


def order_parameters(
    optimizers: Sequence[Optimizer], module: nn.Module, names: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Bring fresh optimizers into the order in which a checkpoint saved their state, which is loaded by position.

    Args:
        optimizers: fresh from ``configure_optimizers``.
        module: the module whose parameters they hold.
        names: what :func:`parameter_names` returned when the checkpoint was saved.

    Raises:
        MisconfigurationException: if there are other optimizers, groups or parameters than then; nothing is changed.
    """
    shape, saved = [len(o.param_groups) for o in optimizers], [len(groups) for groups in names]
    if shape != saved:
        raise MisconfigurationException(
            f"the checkpoint was saved with optimizers of {saved} parameter groups, the model configures {shape}"
        )
    for fresh, then in zip(parameter_names(optimizers, module), names, strict=True):
        now, before = (Counter(name or _NAMELESS for group in groups for name in group) for groups in (fresh, then))
        if now != before:
            raise MisconfigurationException(
                "the checkpoint's optimizer trained other parameters than the model's does: only the checkpoint's"
                f" {sorted((before - now).elements())}, only the model's {sorted((now - before).elements())}"
            )
    parameters = dict(module.named_parameters())
    own = {id(parameter) for parameter in parameters.values()}
    for optimizer, groups in zip(optimizers, names, strict=True):
        nameless = iter([p for group in optimizer.param_groups for p in group["params"] if id(p) not in own])
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            group["params"][:] = [parameters[name] if name else next(nameless) for name in wanted]
