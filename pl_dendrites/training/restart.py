"""The user's optimizers as new: what they and their schedulers were when the fit began, and putting it back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["OptimizerSettings", "drop_spoilt_state", "forget", "forget_weights", "is_plain"]

# Of a group: what it holds, which is no setting; and the mode of an optimizer that trains with other weights than it is
# evaluated with (`optimizer.train()`, `optimizer.eval()`), which follows the model's and not the phase.
_MODE = "train_mode"
_NO_SETTINGS = ("params", "param_names", _MODE)
_NO_ATTRIBUTES = ("state", "param_groups", "defaults", _MODE)


class _Weights:
    """Stands for a copy of a parameter's own values, in what an optimizer remembers of it from the start."""


class OptimizerSettings:
    """What a Trainer's optimizers and schedulers are now, to come back to.

    That is the settings of each group (learning rates and all else), what an optimizer counts in attributes of its own,
    what it remembers before its first step, and the states of schedulers. Optimizers that others wrap are looked at
    too.

    Args:
        trainer: the Trainer, with its optimizers set up.
        whole: whether attributes, and what optimizers remember of parameters now (most begin with nothing), are to come
            back too: they change where optimizers step.
    """

    def __init__(self, trainer: pl.Trainer, whole: bool = True) -> None:
        self._optimizers = list(trainer.optimizers)
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._settings = [[_settings_of(group) for group in o.param_groups] for o in self._optimizers]
        inner = [one for optimizer in self._optimizers for one in _with_inner(optimizer)] if whole else []
        self._attributes = [(optimizer, _attributes_of(optimizer)) for optimizer in inner]
        self._seeds = [(optimizer, _seeds_of(optimizer)) for optimizer in inner if optimizer.state]
        self.scheduler_states: list[dict[str, Any]] = [copy.deepcopy(s.state_dict()) for s in self._schedulers]

    def restore(self) -> None:
        """Put everything back. What optimizers remember of their parameters, and the parameters, stay.

        What came since then goes: a setting that an optimizer made in its first step, a number that it counts. Groups
        that the model added since keep the settings that it gave them.
        """
        for optimizer, groups in zip(self._optimizers, self._settings, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=False):
                for key in [key for key in group if key not in settings and key not in _NO_SETTINGS]:
                    del group[key]
                group.update(copy.deepcopy(settings))
        for optimizer, attributes in self._attributes:
            own = vars(optimizer)
            for name in [n for n, v in own.items() if n not in attributes and type(v) in (int, float)]:
                del own[name]
            own.update(copy.deepcopy(attributes))
        self.complete()
        for scheduler, state in zip(self._schedulers, self.scheduler_states, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))

    def complete(self) -> None:
        """Let optimizers that remember something from the start do so of parameters of which they remember nothing."""
        for optimizer, seeds in self._seeds:
            for key, seed in seeds.items():
                if not isinstance(key, Tensor) and key not in optimizer.state:
                    optimizer.state[key] = copy.deepcopy(seed)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter not in optimizer.state:
                        seed = seeds.get(parameter) or _seed_of_another(parameter, group, seeds)
                        if seed:
                            optimizer.state[parameter] = _planted(seed, parameter)


def forget(optimizers: Iterable[Optimizer]) -> None:
    """Clear what optimizers remember of their parameters."""
    for optimizer in optimizers:
        for one in _with_inner(optimizer):
            one.state.clear()


def forget_weights(optimizers: Iterable[Optimizer]) -> None:
    """Clear what optimizers remember that keep weights of their own, when other weights come into the model.

    They swap them with the model's when it is evaluated (`optimizer.eval()`), which would bring the old ones back.
    """
    for optimizer in optimizers:
        if any(_MODE in group for group in optimizer.param_groups) or hasattr(optimizer, _MODE):
            forget([optimizer])


def drop_spoilt_state(optimizers: Iterable[Optimizer]) -> None:
    """Clear what optimizers remember of a parameter where it is not finite: it would spoil restored weights again."""
    for optimizer in optimizers:
        for parameter, state in list(optimizer.state.items()):
            values = [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, dict) else []
            if not all(bool(torch.isfinite(value).all()) for value in values):
                del optimizer.state[parameter]


def is_plain(value: object) -> bool:
    """Whether a value is a number, a text or nothing, or a container of such.

    Example:
        >>> is_plain([1, {"beta": (0.9, None)}]), is_plain(torch.tensor(3.0)), is_plain(torch.zeros(3)), is_plain(print)
        (True, True, False, False)
    """
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.requires_grad
    if isinstance(value, list | tuple | set):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.keys())) and all(map(is_plain, value.values()))
    return isinstance(value, bool | int | float | complex | str | bytes | None)


def _with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from _with_inner(value)


def _settings_of(group: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in group.items() if key not in _NO_SETTINGS})


def _attributes_of(optimizer: Optimizer) -> dict[str, Any]:
    own = {name: value for name, value in vars(optimizer).items() if name not in _NO_ATTRIBUTES and is_plain(value)}
    # A table of hooks that is empty is plain, too, and others put theirs into it.
    return copy.deepcopy({name: value for name, value in own.items() if not name.endswith("_hooks")})


def _seeds_of(optimizer: Optimizer) -> dict[Any, Any]:
    # By identity of the parameters, as the optimizer's own table.
    return {
        key: {name: _seed(value, key) for name, value in state.items()}
        if isinstance(key, Tensor) and isinstance(state, dict)
        else copy.deepcopy(state)
        for key, state in optimizer.state.items()
    }


def _seed(value: Any, parameter: Tensor) -> Any:
    alike = isinstance(value, Tensor) and value.shape == parameter.shape
    return _Weights() if alike and torch.equal(value, parameter) else copy.deepcopy(value)


def _seed_of_another(parameter: nn.Parameter, group: dict[str, Any], seeds: dict[Any, Any]) -> dict[str, Any] | None:
    # A parameter that came since: as the optimizer began with one of as many dimensions. None where it cannot be told.
    alike = [p for p in group["params"] if p is not parameter and p.ndim == parameter.ndim] or group["params"]
    pattern = next((seeds[p] for p in alike if p in seeds), None)
    if pattern is None:
        return None
    made: dict[str, Any] = {}
    for name, value in pattern.items():
        if isinstance(value, Tensor) and value.ndim:
            if bool((value != value.flatten()[0]).any()):
                return None
            first = value.flatten()[0].item()
            made[name] = torch.full_like(parameter, first, dtype=value.dtype, requires_grad=False)
        else:
            made[name] = value
    return made


def _planted(seed: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    return {
        name: parameter.detach().clone() if isinstance(value, _Weights) else copy.deepcopy(value)
        for name, value in seed.items()
    }
