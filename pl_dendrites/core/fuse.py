"""A grown model in PyTorch's own modules: no hooks, and nothing of this package to run or load it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx, nn
from torch.nn import functional as F

from pl_dendrites.core.fusing.around import fuse_around
from pl_dendrites.core.fusing.computation import Computation, NotFusible
from pl_dendrites.core.fusing.copies import fuse_copies
from pl_dendrites.core.fusing.fetch import Few
from pl_dendrites.core.fusing.norms import fold_norms
from pl_dendrites.core.fusing.private import Affine, fuse_private
from pl_dendrites.core.fusing.recurrent import fuse_recurrent
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.growth.hooks import attached_layers, dendrites_of, take_off
from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.kinds import LinearConv, Recurrent, WholeModule
from pl_dendrites.core.soma import Soma
from pl_dendrites.core.structure import stop_growing_on_load

__all__ = ["fuse", "fuse_with"]


def fuse(model: nn.Module, *, compact: bool = False, streaming: Sequence[str] = ()) -> nn.Module:
    """A copy of a grown model in evaluation mode, made of PyTorch's own modules alone, to be used elsewhere.

    Each layer and all its dendrites become one ``torch.fx.GraphModule``: one product for all that sees the input, and
    a slice, an activation, a product and a sum for each dendrite. Shared dendrites become a path beside the module that
    they hang around. A batch normalisation that follows a grown layer and nothing else is folded in. It is faster than
    the model with its hooks, tools that count, quantise or export see what they know, and ``torch.save(fused)`` loads
    where this package is not installed.

    The copy is an ordinary network: it can be trained, as plain layers can, but grows no more.

    Args:
        model: any module. It stays as it is.
        compact: whether bytes count for more than time. Dendrites of linear layers that see a few of many inputs then
            keep 8, 16 or 32 bits for the place of each beside its value; if not, most have zeros for all others.
        streaming: names, patterns or types (``"LSTM"``) of recurrent layers that go on with a sequence. Each takes and
            returns the states of all its parts: ``(k + 2) * num_layers`` rows in the place of ``num_layers``, for the
            layer itself, each of its ``k`` dendrites, and last those that the grown layer returns. From a state of
            ``num_layers`` rows all parts start alike. Such a state belongs to its layer alone. Other grown recurrent
            layers return a state as the layer does, and are called without one.

    Returns:
        The copy. Where the model itself is a grown layer, or has shared dendrites around it, another type of module,
        which is called alike.

    Raises:
        ValueError: if a grown layer cannot be fused, or cannot stream: names it, and says why. Or if the model is
            sharded.

    Example:
        >>> from pl_dendrites.core import attach
        >>> model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> network = attach(model)
        >>> network.grow(["0", "2"])
        >>> fused = fuse(model)
        >>> [type(part).__module__.split(".")[0] for part in fused.modules()]
        ['torch', 'torch', 'torch', 'torch', 'torch', 'torch']
        >>> x = torch.randn(3, 5)
        >>> torch.testing.assert_close(fused(x), model(x))
    """
    return fuse_with(model, Few.SPREAD if compact else Few.ZEROS, streaming)


@torch.no_grad()
def fuse_with(model: nn.Module, few: Few, streaming: Sequence[str] = ()) -> nn.Module:
    """As :func:`fuse`, which this is, with products of a few inputs as they are best for what runs them.

    Args:
        model: any module.
        few: how nodes see a few of many inputs.
        streaming: as of :func:`fuse`.
    """
    if is_sharded(model):
        raise ValueError("the model is sharded: load its checkpoint in one process, and fuse that")
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        stop_growing_on_load(module)
    folded, streams = fold_norms(twin), _asked_for(streaming, twin)
    fused: dict[nn.Module, nn.Module] = {}
    reasons = {}
    # The inner ones first, for a module around which dendrites hang may have grown layers.
    for name, layer in reversed(list(attached_layers(twin))):
        dendrites = dendrites_of(layer)
        take_off(layer)
        _put(layer, fused)
        try:
            made = _fuse(layer, dendrites, folded.get(layer), few, layer in streams)
        except NotFusible as reason:
            reasons[name] = reason
        else:
            fused |= {} if made is layer else {layer: made}
    if reasons:
        raise ValueError("not all of it can be fused:\n" + "\n".join(f"  '{n}': {why}" for n, why in reasons.items()))
    somas = [soma for soma in twin.modules() if isinstance(soma, Soma)]
    fused |= {soma: _bare_soma(soma) for soma in somas if not isinstance(fused.get(soma), fx.GraphModule)}
    _put(twin, fused)
    return fused.get(twin, twin)


def _asked_for(patterns: Sequence[str], model: nn.Module) -> Collection[nn.Module]:
    layers = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.RNNBase) and "dendrites" not in name.split(".")
    }
    found: set[nn.Module] = set()
    for pattern in patterns:
        asked = {layer for n, layer in layers.items() if fnmatchcase(n, pattern) or type(layer).__name__ == pattern}
        if not asked:
            there = ", ".join(f"'{name}'" for name in layers) or "none"
            raise ValueError(f"`streaming`: there is no recurrent layer {pattern!r}; those that there are: {there}")
        found |= asked
    return found


def _fuse(layer: nn.Module, dendrites: Dendrites, after: Affine | None, few: Few, streaming: bool) -> nn.Module:
    kind, private, shared, placed = dendrites.kind, dendrites.private, dendrites.shared, dendrites.placed
    if len(dendrites) and (layer._forward_hooks or layer._forward_pre_hooks):
        raise NotFusible("it has hooks of its own")
    if (private or placed) and isinstance(kind, LinearConv):
        layer = fuse_private(layer, kind, private, after, few, placed=placed)
    elif private and isinstance(kind, Recurrent):
        assert isinstance(layer, nn.RNNBase)
        layer = fuse_recurrent(layer, kind, private, streaming)
    elif private:
        assert isinstance(kind, WholeModule)
        layer = fuse_copies(layer, kind, private)
    if not shared:
        return layer
    if isinstance(layer, Soma):
        return fuse_around(None, shared, layer.bias, few)
    return fuse_around(layer, shared, None, few)


def _put(model: nn.Module, fused: Mapping[nn.Module, nn.Module]) -> None:
    # In the place of each layer, wherever it stands, what it became.
    for parent in list(model.modules()):
        places = [name for name, child in parent._modules.items() if child in fused]
        for name in places:
            parent._modules[name] = fused[parent._modules[name]]  # type: ignore[index]
        if places and isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # the fast path would read weights that are no longer there
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor &= all(layer.activation_relu_or_gelu for layer in encoder.layers)


def _bare_soma(soma: Soma) -> nn.Module:
    # Biases alone: of a product with nothing.
    graph = Computation()
    (x,) = graph.arguments_of(soma)
    nothing = graph.value("weight", soma.bias.new_zeros(soma.outputs, 0))
    product = graph.call(F.linear, graph.method("narrow", x, -1, 0, 0), nothing, graph.value("bias", soma.bias))
    return graph.finish(product)
