"""The user's optimizers while a network grows: which parameters they hold, and by which names these are saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.training.groups import begin_remembering, group_for
from pl_dendrites.training.restart import OptimizerSettings, drop_spoilt_state, forget, forget_weights

__all__ = [
    "OptimizerSettings",
    "adopt_parameters",
    "begin_phase",
    "following",
    "forget_weights",
    "in_turn",
    "leave_unheld_alone",
    "order_parameters",
    "parameter_names",
    "trained",
]

_NAMELESS = "(not in the model)"


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
            others join as :func:`~pl_dendrites.training.groups.group_for` says.
    """
    optimizers = list(optimizers)
    gone = {id(parameter) for parameter in leaving}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if id(p) in gone]:
                optimizer.state.pop(parameter, None)
            keep = [id(p) not in gone for p in group["params"]]
            for key in [key for key in ("params", "param_names") if key in group]:
                group[key][:] = [entry for entry, kept in zip(group[key], keep, strict=True) if kept]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    there = {id(parameter) for group in groups for parameter in group["params"]}
    for parameter, weight in arriving:
        if id(parameter) not in there and groups:
            group = group_for(optimizers, parameter, weight) or groups[0]
            group["params"].append(parameter)
            there.add(id(parameter))
            if "param_names" in group:
                group["param_names"].append(f"dendrites.{len(group['params']) - 1}")


def trained(optimizers: Iterable[Optimizer], network: DendriticNetwork) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """What optimizers are to hold of a network's dendrites, each with the weight of its layer.

    Of mirrors that is what belongs to a layer that they hold.
    """
    alone = {id(p) for name, d in network.layers.items() if name in network.left_alone for p in d.parameters()}
    held = _held(optimizers)
    yield from (pair for pair in network.trained_parameters() if id(pair[0]) not in alone)
    yield from (pair for pair in network.mirrored_parameters() if id(pair[1]) in held)


def _held(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def leave_unheld_alone(optimizers: Sequence[Optimizer], network: DendriticNetwork) -> None:
    """Let layers that no optimizer trains get no dendrites, which one would have to train.

    Args:
        optimizers: the optimizers; without any, nothing is said of any layer.
        network: the network.

    Raises:
        MisconfigurationException: if no layer is left.
    """
    held = _held(optimizers)
    unheld = [name for name, own in network.own_parameters().items() if held and not any(id(p) in held for p in own)]
    reason = "no optimizer holds its parameters: name it in `targets` to let it grow"
    if len(unheld) == len(network.targets):
        raise MisconfigurationException(f"no layer can have dendrites. {', '.join(map(repr, unheld))}: {reason}")
    network.leave_alone(unheld, reason)


def in_turn(
    toggled: Optimizer | None, optimizers: Sequence[Optimizer], network: DendriticNetwork
) -> list[nn.Parameter] | None:
    """What a backward pass trains where losses take turns.

    Args:
        toggled: the optimizer whose turn it is; ``None``: every one's.
        optimizers: all of the model. What grows on layers that none holds is the first one's.
        network: the network.

    Returns:
        Parameters of the network; ``None``: all of them.
    """
    if toggled is None:
        return None
    held, own = _held(optimizers), network.own_parameters().values()
    unheld = [p for layer in own if not any(id(p) in held for p in layer) for p in layer]
    return [p for group in toggled.param_groups for p in group["params"]] + (unheld if toggled is optimizers[0] else [])


@contextmanager
def following(optimizers: Iterable[Optimizer], network: DendriticNetwork) -> Iterator[None]:
    """Let optimizers hold what the network trains of its dendrites after a change of their number.

    Args:
        optimizers: the optimizers.
        network: the network, which the body of the ``with`` changes.
    """
    optimizers = list(optimizers)
    before = [weight for weight, _ in (*network.trained_parameters(), *network.mirrored_parameters())]
    yield
    after = list(trained(optimizers, network))
    stay = {id(weight) for weight, _ in after}
    adopt_parameters(optimizers, [weight for weight in before if id(weight) not in stay], after)


def begin_phase(optimizers: Sequence[Optimizer], initial: OptimizerSettings | None, restart: bool) -> None:
    """Let optimizers and schedulers begin a base phase.

    Args:
        optimizers: of the model, with all parameters that there are now.
        initial: what they were when the fit began, if that is known.
        restart: whether they are as they were then; if not, only what is spoilt is forgotten.
    """
    if restart:
        assert initial is not None
        forget(optimizers)
        initial.restore()
        return
    drop_spoilt_state(optimizers)
    if initial is not None:
        initial.complete()
    begin_remembering(optimizers)


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
