"""Which kind of layer a module is for its dendrites."""

from __future__ import annotations

from torch import nn

from pl_dendrites.core.copies import Copies
from pl_dendrites.core.kinds import LayerKind
from pl_dendrites.core.recurrent import Cell, Recurrent
from pl_dendrites.core.stacked import STACKED, Stacked

__all__ = ["is_layer", "kind_of"]


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
