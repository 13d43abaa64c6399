"""What is kept of finished phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pl_dendrites.core.cost import (
    correlation_step_cost,
    inference_cost,
    parameter_count,
    pool_weights,
    product_weights,
)
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.inventory import inventory
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.reporting.notebook import Records

__all__ = ["History", "by_reason", "correlation_figures", "phase_record", "why_none"]


class History(Records):
    """Records of finished phases, in the order of time; a notebook shows what differs from phase to phase."""

    title = "Phases"
    columns = (
        "cycle",
        "phase",
        "dendrites",
        "units",
        "parameters",
        "epochs",
        "score",
        "best_score",
        "accepted",
        "reason",
    )


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """The layers left alone for each reason.

    Example:
        >>> by_reason({"embed": "it has no input", "norm": "it has no matrix", "pos": "it has no input"})
        {'it has no input': ['embed', 'pos'], 'it has no matrix': ['norm']}
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def correlation_figures(correlations: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean and maximum over a layer's neurons of the absolute correlation of the best candidate.

    Args:
        correlations: ``(P, C)`` by layer name, as :meth:`~pl_dendrites.core.DendriticNetwork.correlations` gives them.

    Returns:
        ``{"mean": ..., "max": ...}`` by layer name.

    Example:
        >>> import torch
        >>> correlation_figures({"fc": torch.tensor([[0.25, -0.5], [-0.75, 0.0]])})
        {'fc': {'mean': 0.625, 'max': 0.75}}
    """
    best = {name: value.abs().amax(0) for name, value in correlations.items()}
    return {name: {"mean": value.mean().item(), "max": value.max().item()} for name, value in best.items()}


def phase_record(machine: PhaseMachine, network: DendriticNetwork, reason: str) -> dict[str, Any]:
    """Describe the phase that ends, as plain values.

    Args:
        machine: before it goes on to the next phase.
        network: before it changes.
        reason: why the phase ends.

    Returns:
        A dict with ``cycle``, ``phase``, ``dendrites`` (per neuron; of shared ones the sets, and then ``units`` says
        how many there are), ``parameters`` (of the model), ``epochs``,
        ``score`` (best one of a base phase), ``scores`` (every one of a base phase, in order; ``None`` for one that
        was not finite), ``best_score`` (of the network that is kept), ``accepted`` (whether the set on trial was;
        ``None`` where none was), ``correlation`` (by layer), ``candidates`` (per neuron; 0 in a base phase),
        ``layers`` (of each that can grow: its ``type``, ``neurons``, ``dendrites`` per neuron and the ``parameters`` of
        these; ``next``, the parameters of one more on each neuron, unless neurons share them), ``inference_cost`` (of
        the layers that can grow, by their matrix products; 1 is that of the plain layers; where these have none,
        ``multiplications``, those of the dendrites at each position) and of a correlation phase ``step_cost`` (the same
        of a step, in the mean over its epochs), ``skipped`` (layers left alone, with the reason) and ``reason``. The
        callback adds ``monitor``, ``mode`` and ``learning``, ``form`` (``"shared"`` or ``"private"``) and, where a fit
        found it, ``form_reason``.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> record = phase_record(PhaseMachine(), attach(nn.Linear(4, 2)), "training ended")
        >>> record["phase"], record["dendrites"], record["parameters"]
        ('base', 0, 10)
    """
    base = machine.phase == "base"
    correlations = network.correlations()
    return {
        "cycle": machine.cycle,
        "phase": machine.phase,
        "dendrites": network.num_dendrites,
        "parameters": parameter_count(network.model),
        "epochs": machine.epochs,
        "score": machine.phase_best if base else None,
        "scores": machine.scores,
        "best_score": machine.best,
        "accepted": machine.accepted if base else None,
        "correlation": correlation_figures(correlations),
        "candidates": max((value.shape[0] for value in correlations.values()), default=0),
        "layers": inventory(network.model, network.layers, network.units is not None),
        **({} if network.units is None else {"units": network.units}),
        **_costs(machine, network),
        "skipped": dict(network.skipped),
        "reason": reason,
    }


def _costs(machine: PhaseMachine, network: DendriticNetwork) -> dict[str, float]:
    modules = {plain_name(name): module for name, module in network.model.named_modules()}
    own = sum(product_weights(modules[name]) for name in network.layers)
    weights = sum(_weights(dendrites) for dendrites in network.layers.values())
    if not own:  # neuron bodies alone: a cost beside nothing says nothing
        return {"multiplications": weights}
    grown = weights / own
    costs, pools = {"inference_cost": inference_cost(grown)}, network.candidates
    if not pools:
        return costs
    seen = {
        "all": sum(pool_weights(network.layers[name].kind, modules[name], pool.pool) for name, pool in pools.items()),
        "strongest": sum(product_weights(pool.nodes) for pool in pools.values()),
    }
    dense, epochs = machine.dense_epochs, max(1, machine.epochs)
    pool = (dense * seen["all"] + (machine.epochs - dense) * seen["strongest"]) / epochs / own
    return costs | {"step_cost": correlation_step_cost(grown, pool)}


def _weights(dendrites: Dendrites) -> int:
    private = sum(product_weights(block.nodes) for block in dendrites.private)
    return private + sum(product_weights(block) for block in dendrites.shared)


def phase_begins(machine: PhaseMachine, network: DendriticNetwork, pool: int) -> str:
    """What is said when a phase begins.

    Args:
        machine: in that phase.
        network: as it then is.
        pool: candidates per neuron.

    Example:
        >>> from torch import nn
        >>> from pl_dendrites.core import attach
        >>> phase_begins(PhaseMachine(), attach(nn.Linear(4, 2)), pool=4)
        'base phase of cycle 0, dendrites per neuron 0'
    """
    what = network.looks_for(pool) if machine.phase == "correlation" else network.has()
    return f"{machine.phase} phase of cycle {machine.cycle}, {what}"


def why_none(history: Sequence[Mapping[str, Any]]) -> str:
    """Why a fit left no dendrites.

    Example:
        >>> why_none([{"cycle": 0, "reason": "training ended"}])
        'Sets tried: 0; the last phase ended because: training ended.'
    """
    tried = max(record["cycle"] for record in history)
    return f"Sets tried: {tried}; the last phase ended because: {history[-1]['reason']}."
