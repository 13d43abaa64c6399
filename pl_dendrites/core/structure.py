"""Reading the structure of a grown model off its state_dict.

A layer with ``k`` dendrites has the entries ``<layer>.dendrites.nodes.weight`` and ``.nodes.bias`` (``k * C`` rows),
``.links`` (``k (k - 1) / 2`` rows), ``.weights.0`` ... ``.weights.<k - 1>`` and ``.activation_code``. Everything is
checked against the model before anything changes, and nothing larger than the state_dict itself is ever allocated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.dendrites import Dendrites
from pl_dendrites.core.functional import ACTIVATIONS
from pl_dendrites.core.layers import is_supported, neurons_of, node_set

__all__ = ["LayerStructure", "is_dendrite_key", "read_structure"]

_KEY = re.compile(
    r"^(?:(?P<layer>.+)\.)?dendrites\.(?P<part>nodes\.weight|nodes\.bias|links|activation_code|weights\.\d+)$"
)


@dataclass(frozen=True)
class LayerStructure:
    """What a state_dict says of one layer.

    Attributes:
        count: dendrites per neuron.
        activation: name of their activation.
    """

    count: int
    activation: str


def is_dendrite_key(key: str) -> bool:
    """Whether a state_dict entry belongs to dendrites.

    Example:
        >>> is_dendrite_key("encoder.0.dendrites.weights.1"), is_dendrite_key("encoder.0.weight")
        (True, False)
    """
    return _KEY.match(key) is not None


def read_structure(
    modules: Mapping[str, nn.Module], state_dict: Mapping[str, Any], prefix: str = ""
) -> dict[str, LayerStructure]:
    """The dendrites that each layer of a model must have for a state_dict to fit.

    Args:
        modules: the model's modules by name.
        state_dict: weights, perhaps of a larger model of which this one is the part named by ``prefix``.
        prefix: what comes before the model's own names in the state_dict.

    Returns:
        The structure of each layer that has dendrites in the state_dict, and of each that has some in the model and
        none there, provided that the state_dict speaks of that layer at all.

    Raises:
        ValueError: if the state_dict does not fit; a line for every layer that differs.

    Example:
        >>> read_structure({"fc": nn.Linear(2, 2)}, {"fc.weight": torch.zeros(2, 2)})
        {}
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        found = _KEY.match(key[len(prefix) :]) if key.startswith(prefix) else None
        if found is not None:
            parts.setdefault(found["layer"] or "", {})[found["part"]] = value
    wrong, structure = [], {}
    for name, values in parts.items():
        try:
            structure[name] = _read_layer(modules.get(name), values)
            _check_weight(modules[name], state_dict.get(f"{prefix}{name}.weight" if name else f"{prefix}weight"))
        except ValueError as error:
            wrong.append(f"  '{name}': {error}")
    if wrong:
        raise ValueError("the state_dict does not fit the model:\n" + "\n".join(wrong))
    for name, module in modules.items():
        own = module._modules.get("dendrites")
        path = f"{prefix}{name}." if name else prefix
        # Any of its entries will do: a parametrized layer has no "weight".
        if name not in parts and isinstance(own, Dendrites) and any(key.startswith(path) for key in state_dict):
            structure[name] = LayerStructure(0, own.activation)
    return structure


def _check_weight(layer: nn.Module, given: Any) -> None:
    # PyTorch would notice too, but after the model has grown.
    own = layer._parameters.get("weight")
    if own is not None and isinstance(given, Tensor) and given.shape != own.shape:
        raise ValueError(f"weight must have the shape {tuple(own.shape)}, got {tuple(given.shape)}")


def _read_layer(layer: nn.Module | None, values: Mapping[str, Any]) -> LayerStructure:
    if layer is None:
        raise ValueError("it has dendrites in the state_dict, but the model has no such layer")
    if not is_supported(layer):
        raise ValueError(f"it has dendrites in the state_dict, but a {type(layer).__name__} cannot have any here")
    count = sum(part.startswith("weights.") for part in values)
    neurons = neurons_of(layer).count
    # On the meta device: shapes alone, so that no file can make us allocate more than it holds.
    nodes = dict(node_set(layer, max(count, 1), torch.device("meta")).named_parameters())
    shapes = {f"nodes.{part}": tuple(tensor.shape) for part, tensor in nodes.items()}
    shapes["links"] = (count * (count - 1) // 2, neurons)
    shapes["activation_code"] = ()
    shapes.update({f"weights.{j}": (neurons,) for j in range(max(count, 1))})
    missing = sorted(set(shapes) - set(values))
    if missing or set(values) - set(shapes):
        raise ValueError(f"its dendrites are incomplete: there are {sorted(values)}, missing {missing}")
    for part, shape in shapes.items():
        value = values[part]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"dendrites.{part} must have the shape {shape}, got {given}")
    code = values["activation_code"]
    if code.dtype != torch.int64 or not 0 <= int(code) < len(ACTIVATIONS):
        raise ValueError(f"dendrites.activation_code must be an integer below {len(ACTIVATIONS)}, got {code}")
    return LayerStructure(count, list(ACTIVATIONS)[int(code)])
