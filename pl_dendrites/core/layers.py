"""Which kind of layer a module is for its dendrites."""

from __future__ import annotations

from torch import nn

from pl_dendrites.core.copies import Copies
from pl_dendrites.core.kinds import LayerKind
from pl_dendrites.core.recurrent import Cell, Recurrent
from pl_dendrites.core.sparse import Sparse
from pl_dendrites.core.stacked import STACKED, Stacked

__all__ = ["is_layer", "kind_of", "narrowed"]


def is_layer(module: nn.Module) -> bool:
    """Whether a module is of a type that has dendrites without being named: Linear, convolution or recurrent.

    Example:
        >>> is_layer(nn.Conv2d(3, 8, 3)), is_layer(nn.LayerNorm(8))
        (True, False)
    """
    return isinstance(module, (*STACKED, nn.RNNBase, nn.RNNCellBase))


def kind_of(module: nn.Module) -> LayerKind:
    """The view that dendrites have of a module.

    Example:
        >>> [type(kind_of(layer)).__name__ for layer in (nn.Linear(2, 2), nn.GRU(2, 2), nn.Sequential())]
        ['Stacked', 'Recurrent', 'Copies']
    """
    if isinstance(module, STACKED):
        return Stacked(module)
    if isinstance(module, nn.RNNBase):
        return Recurrent(module)
    if isinstance(module, nn.RNNCellBase):
        return Cell(module)
    return Copies(module)


def narrowed(kind: LayerKind, layer: nn.Module, fan_in: int | None, neurons: int | None) -> LayerKind:
    """The view of dendrites that see only some of the inputs, or that only some neurons have.

    Args:
        kind: the view of those that see all.
        layer: the layer.
        fan_in: inputs of each dendrite; ``None``: all.
        neurons: how many neurons have them; ``None``: all.

    Raises:
        ValueError: if the layer cannot have such dendrites.

    Example:
        >>> layer = nn.Linear(5, 3)
        >>> narrowed(kind_of(layer), layer, fan_in=2, neurons=None).cost(layer)
        9
    """
    if fan_in is None and neurons is None:
        return kind
    if not isinstance(kind, Stacked):
        raise ValueError("its dendrites see all inputs, and all of its neurons have them")
    return Stacked(layer, neurons) if fan_in is None else Sparse(layer, fan_in, neurons)
