"""Models that save a part of themselves: what dendrites need is saved with it, whatever the model leaves out.

A model with a large frozen part may save only what it trains, in an overridden ``state_dict`` or in
``on_save_checkpoint``. Most of a dendrite is frozen too, and no model of that kind knows of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.keys import is_dendrite_key, plain_name

__all__ = ["complete", "dendrite_entries", "refuse_lost", "whole_state", "with_dendrites"]


def dendrite_entries(model: nn.Module) -> dict[str, Any]:
    """The entries of a model's dendrites, by their names in the state_dict of the whole model.

    Args:
        model: the model; its own ``state_dict`` is not asked.

    Example:
        >>> from pl_dendrites.core import attach
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> attach(model).grow(["0"])
        >>> sorted(dendrite_entries(model))[:3]
        ['0.dendrites.0.code', '0.dendrites.0.links', '0.dendrites.0.nodes.bias']
    """
    found: dict[str, Any] = {}
    # With duplicates: a module used under two names has its entries under both.
    for name, module in model.named_modules(remove_duplicate=False):
        dendrites = module._modules.get("dendrites")
        if isinstance(dendrites, Dendrites):
            found |= dendrites.state_dict(prefix=f"{name}.dendrites." if name else "dendrites.")
    return found


def with_dendrites(part: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict with all entries of dendrites.

    Args:
        part: what a model saves. One that gives names of its own to dendrites' entries is taken as it is.
        source: a state_dict that has all of them.

    Example:
        >>> with_dendrites({"0.bias": 1}, {"0.bias": 2, "0.dendrites.0.code": 3})
        {'0.bias': 1, '0.dendrites.0.code': 3}
    """
    entries = {key: value for key, value in source.items() if is_dendrite_key(key)}
    if any(key not in entries for key in part if is_dendrite_key(key)):
        return dict(part)
    return {**part, **{key: value for key, value in entries.items() if key not in part}}


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All that a model has, with what its own ``state_dict`` leaves out. It is not copied.

    One whose ``state_dict`` has names of its own is believed to leave out nothing but of its dendrites.

    Args:
        model: the model.
    """
    own, every = model.state_dict(), _every(model)
    return every | own if own.keys() <= every.keys() else with_dendrites(own, every)


def _every(model: nn.Module) -> dict[str, Any]:
    # Past a `state_dict` that the model overrides.
    return nn.Module.state_dict(model) | dendrite_entries(model)


def complete(
    checkpoint: dict[str, Any], model: nn.Module, callback: str, source: Mapping[str, Any] | None = None
) -> None:
    """Put into a checkpoint what dendrites need, and leave out of best networks in it what the model leaves out.

    That is of the best networks what is frozen: whoever does not save it has it from elsewhere.

    Args:
        checkpoint: as a Trainer is about to save it.
        model: the model.
        callback: under which name the callback's state is there.
        source: a state_dict that has all of the dendrites' entries; ``None``: the model has.
    """
    part = checkpoint.get("state_dict")
    if not isinstance(part, Mapping) or is_sharded(model):
        return
    checkpoint["state_dict"] = with_dendrites(part, dendrite_entries(model) if source is None else source)
    state = checkpoint.get("callbacks", {}).get(callback) or {}
    best = state.get("best", {})
    left_out = {name for name, p in model.named_parameters() if not (p.requires_grad or name in part)}
    names = _every(model).keys()
    if best.get("weights") and all(key in names or is_dendrite_key(key) for key in part):
        smaller = [_without(left_out, size) for size in state["frontier"]["smaller"]]
        frontier = {**state["frontier"], "smaller": smaller}
        checkpoint["callbacks"][callback] = {**state, "best": _without(left_out, best), "frontier": frontier}


def _without(left_out: Collection[str], saved: Mapping[str, Any]) -> dict[str, Any]:
    weights = saved["weights"]
    if weights is not None:
        weights = {key: value for key, value in weights.items() if key not in left_out or is_dendrite_key(key)}
    return {**saved, "weights": weights}


def refuse_lost(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raise where a checkpoint was saved with dendrites that a model has not got, now that it is loaded.

    Args:
        model: the model.
        checkpoint: of whatever kind.

    Raises:
        ValueError: names the layers.
    """
    modules, lost = {plain_name(name): module for name, module in model.named_modules()}, []
    for state in _within(checkpoint, "callbacks").values():
        for name, layer in _within(_within(state, "running"), "layers").items():
            count = layer.get("dendrites") if isinstance(layer, Mapping) else None
            own = modules[name]._modules.get("dendrites") if name in modules else None
            back = own.size if isinstance(own, Dendrites) else 0
            if name in modules and isinstance(count, int) and back < count < 2**63:
                lost.append(f"  '{name}': {count} dendrites were saved, {back} came back")
    if lost:
        raise ValueError(
            "the checkpoint does not hold all dendrites that the model had:\n"
            + "\n".join(lost)
            + "\nA Trainer with a DendriteCallback saves all; without one, who saves a part of a model must save all"
            " of its dendrites."
        )


def _within(values: Any, name: str) -> Mapping[Any, Any]:
    inner = values.get(name) if isinstance(values, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}
