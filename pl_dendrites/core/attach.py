"""Dendrites for a model: how they come, from nothing or from a state_dict, and how they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pl_dendrites.core.growth.block import check_form
from pl_dendrites.core.growth.hooks import dendrites_of, hosts, take_off
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.structure import apply_structure, stop_growing_on_load
from pl_dendrites.core.targets import Predicate, Targets

__all__ = ["attach", "detach", "network_of", "restore_structure"]


def attach(
    model: nn.Module,
    targets: Targets | None = None,
    exclude: Sequence[str] | Predicate = (),
    activation: str = "tanh",
    *,
    live: bool = False,
    fan_in: int | float | None = None,
    mirrors: Mapping[str, str] | None = None,
) -> DendriticNetwork:
    """Prepare a model for dendrites. Its outputs, type and state_dict keys do not change.

    Args:
        model: any module.
        targets: the layers that grow, see :func:`~pl_dendrites.select_targets`, which also shows what
            would grow without changing anything; ``None``: every Linear, convolution and recurrent layer that is not
            frozen; ``"frozen"``: every one that is.
        exclude: taken out of ``targets``.
        activation: a name in ``ACTIVATIONS``.
        live: whether dendrites go on learning with the network, by gradient, once they are part of it.
        fan_in: inputs that each dendrite keeps: a number, or a share of those of its layer; ``None``: all. See
            :meth:`DendriticNetwork.keep_strongest`.
        mirrors: name of each module that mirrors another without being trained, and of that: it grows as that does;
            ``None``: those that are frozen and begin as a copy.

    Returns:
        The object that grows them.

    Raises:
        RuntimeError: if the model, or a part of it, is attached already.
        ValueError: if no layer can have dendrites, a pattern matches nothing, the activation is not known, or a module
            that ``mirrors`` names does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> network = attach(model, exclude=["2"])
        >>> list(network.layers), list(model.state_dict())
        (['0'], ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    attached = list(hosts(model))
    if attached:
        raise RuntimeError(f"the model is attached already, at {attached}: detach it first")
    check_form(activation, fan_in)
    network = DendriticNetwork(model, targets, exclude, mirrors)
    network.set_next(activation, live=live, fan_in=fan_in)
    return network


def detach(model: nn.Module) -> nn.Module:
    """Remove all dendrites and every trace of them.

    Args:
        model: a model that :func:`attach` or :func:`restore_structure` worked on.

    Returns:
        The same model.

    Raises:
        RuntimeError: if it has candidates: the model would stay frozen.

    Example:
        >>> network = attach(nn.Linear(2, 2))
        >>> detach(network.model)
        Linear(in_features=2, out_features=2, bias=True)
    """
    layers = list(hosts(model).values())
    if any(dendrites_of(layer).candidates is not None for layer in layers):
        raise RuntimeError("the model has candidates: integrate or discard them first")
    for layer in layers:
        take_off(layer)
    stop_growing_on_load(model)
    return model


def restore_structure(
    model: nn.Module, state_dict: Mapping[str, Any], mirrors: Mapping[str, str] | None = None
) -> DendriticNetwork | None:
    """Give a model the dendrites that a state_dict holds: it grows or shrinks, and then fits ``load_state_dict``.

    Args:
        model: a plain or an attached model of the kind that the state_dict was taken from.
        state_dict: weights of a grown model.
        mirrors: as of :func:`attach`.

    Returns:
        The network, or ``None`` if neither the state_dict nor the model knows of private dendrites. Shared ones are for
        :func:`~pl_dendrites.core.attach_shared` to take over.

    Raises:
        ValueError: if they do not fit the model; names the layers that differ. The model is then left as it was.

    Example:
        >>> grown = nn.Sequential(nn.Linear(3, 2))
        >>> network = attach(grown)
        >>> network.grow(["0"])
        >>> fresh = nn.Sequential(nn.Linear(3, 2))
        >>> restore_structure(fresh, grown.state_dict()).num_dendrites
        1
        >>> fresh.load_state_dict(grown.state_dict())
        <All keys matched successfully>
    """
    apply_structure(model, state_dict, "")
    return network_of(model, mirrors)


def network_of(model: nn.Module, mirrors: Mapping[str, str] | None = None) -> DendriticNetwork | None:
    """The network of a model that has dendrites already; ``None`` if it has no private ones.

    Args:
        model: an attached model, or any other.
        mirrors: as of :func:`attach`.

    Example:
        >>> network_of(attach(nn.Linear(2, 2)).model).num_dendrites, network_of(nn.Linear(2, 2))
        (0, None)
    """
    names = [name for name, layer in hosts(model).items() if not dendrites_of(layer).shared]
    return DendriticNetwork(model, names, mirrors=mirrors) if names else None
