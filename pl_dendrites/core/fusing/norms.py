"""Batch normalisations that follow a grown layer and nothing else, to be folded into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pl_dendrites.core.fusing.private import Affine
from pl_dendrites.core.growth.hooks import attached_layers, dendrites_of
from pl_dendrites.core.kinds import LinearConv

__all__ = ["fold_norms"]


def fold_norms(model: nn.Module) -> dict[nn.Module, Affine]:
    """Take out batch normalisations whose work the layer before can do.

    That they follow nothing else is seen where both stand in an ``nn.Sequential``, and in a trace of the model's
    ``forward``, if it can be traced.

    Args:
        model: in evaluation mode; such a normalisation becomes an ``nn.Identity``.

    Returns:
        By layer what the normalisation did.

    Example:
        >>> from pl_dendrites.core.attach import attach
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        >>> attach(model).grow(["0"])
        >>> [type(layer).__name__ for layer in fold_norms(model)], model[1]
        (['Linear'], Identity())
    """
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    grown = {layer for _, layer in attached_layers(model)}
    folded = {}
    for layer, norm in {**dict(_in_sequence(model)), **dict(_in_trace(model, grown))}.items():
        if layer in grown and places[layer] == places[norm] == 1 and _is_affine(layer, norm):
            folded[layer] = _affine(norm)
            for parent in list(model.modules()):
                for name in [name for name, child in parent._modules.items() if child is norm]:
                    setattr(parent, name, nn.Identity())
    return folded


def _in_sequence(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for parent in model.modules():
        if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            yield from pairwise(parent.children())


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A recurrent layer keeps a list of its weights, in which a trace would leave what it puts in their place.
        return m in self._leaves or isinstance(m, nn.RNNBase) or super().is_leaf_module(m, module_qualified_name)


def _in_trace(model: nn.Module, leaves: set[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module]]:
    if not any(isinstance(part, _BatchNorm) for part in model.modules()):
        return
    try:
        graph = _Tracer(leaves).trace(model)
    except Exception:  # a forward of anybody's, that may do what no trace can follow
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {node for node in calls if sum(other.target == node.target for other in calls) == 1}
    for node in once:
        before = node.all_input_nodes
        if len(before) == 1 and before[0] in once and list(before[0].users) == [node]:
            yield model.get_submodule(before[0].target), model.get_submodule(node.target)


def _is_affine(layer: nn.Module, norm: nn.Module) -> bool:
    dendrites = dendrites_of(layer)
    return (
        isinstance(norm, _BatchNorm)
        and norm.running_var is not None
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and isinstance(dendrites.kind, LinearConv)
        and norm.num_features == dendrites.kind.neurons
        and len(dendrites) > len(dendrites.shared) == 0
    )


def _affine(norm: nn.Module) -> Affine:
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return Affine(scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale)
