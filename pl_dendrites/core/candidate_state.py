"""What a state says of candidates, compared with the layers that they are for before any candidates are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pl_dendrites.core.claims import check_claims, shape_of
from pl_dendrites.core.growth.hooks import dendrites_of
from pl_dendrites.core.kinds import inputs_of, narrowed
from pl_dendrites.core.rule.common_scale import CommonScale
from pl_dendrites.core.rule.moments import Moments
from pl_dendrites.core.tensors import INTEGERS

__all__ = ["check_candidates"]


def check_candidates(
    layers: Mapping[str, nn.Module], pool: int, state: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """Refuse a state that is none of candidates for these layers.

    Args:
        layers: those that are to have candidates, by name.
        pool: candidates per neuron.
        state: from :meth:`~pl_dendrites.core.network.DendriticNetwork.candidate_state`.

    Returns:
        How many neurons each layer has; of one that has not run yet the state tells it.

    Raises:
        ValueError: says what differs and where.

    Example:
        >>> from pl_dendrites.core import attach
        >>> network = attach(nn.Linear(3, 2))
        >>> network.start_candidates(pool=4)
        >>> check_candidates({"": network.model}, 4, network.candidate_state())
        {'': 2}
        >>> check_candidates({"": network.model}, 5, network.candidate_state())
        Traceback (most recent call last):
        ValueError: the saved candidates of '' have mean_output of the shape (4, 2), not (5, 2)
    """
    if set(layers) != set(state):
        raise ValueError(
            f"the saved candidates belong to other layers: saved {sorted(state)}, there are {sorted(layers)}"
        )
    check_claims(state, "the saved candidates", "their state")
    return {name: _check(name, layer, pool, state[name]) for name, layer in layers.items()}


def _check(name: str, layer: nn.Module, pool: int, values: Mapping[str, Any]) -> int:
    who, dendrites = f"the saved candidates of '{name}'", dendrites_of(layer)
    kind = dendrites.kind
    given = shape_of(values.get("reference"))
    neurons = kind.neurons or (given[0] if isinstance(given, tuple) and len(given) == 1 else 0)
    statistics: dict[str, tuple[int, ...]] = {
        field: (pool, neurons) for field in (*Moments._fields, "running_covariance")
    }
    statistics |= {field: (neurons,) for field in ("samples", "mean_error", "square_error", "reference")}
    inputs = shape_of(values.get("nodes.inputs"))
    if "nodes.inputs" in values and not (isinstance(inputs, tuple) and inputs):
        raise ValueError(f"{who} see inputs that cannot be told: {inputs}")
    try:
        kind = narrowed(kind, layer, inputs[-1] if isinstance(inputs, tuple) and inputs else None, None)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None
    nodes = {f"nodes.{part}": tuple(value.shape) for part, value in kind.template(layer, pool).items()}
    wanted = {**statistics, "links": (pool, dendrites.count, neurons), **nodes}
    there = inputs_of(layer)
    later = {  # older states are without
        "common_scale.evidence": (2,),
        "common_scale._extra_state": (3,),
        "spread_of_inputs.samples": (),
        **dict.fromkeys(("spread_of_inputs.mean", "spread_of_inputs.square"), (there,)),
    }
    if "nodes.inputs" in values or not there:
        later = {part: shape for part, shape in later.items() if part.startswith("common_scale.")}
    wanted |= {part: shape for part, shape in later.items() if part in values}
    for part, shape in wanted.items():
        if shape_of(values.get(part)) != shape:
            raise ValueError(f"{who} have {part} of the shape {shape_of(values.get(part))}, not {shape}")
    if len(values) > len(wanted):
        raise ValueError(f"{who} have '{next(iter(set(values) - set(wanted)))}', which candidates have not")
    _check_values(who, layer, values)
    return neurons


def _check_values(who: str, layer: nn.Module, values: Mapping[str, Any]) -> None:
    for part, value in values.items():
        if value.is_complex() or value.is_quantized:
            raise ValueError(f"{who} have {part} of type {value.dtype}")
    if "common_scale._extra_state" in values:
        CommonScale.read(values["common_scale._extra_state"])
    there, inputs = inputs_of(layer), values.get("nodes.inputs")
    if inputs is None:
        return
    if inputs.dtype not in INTEGERS or (inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < there):
        raise ValueError(f"{who} see others than its {there} inputs")
