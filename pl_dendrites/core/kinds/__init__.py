"""A kind of layer each: where its neurons are, what a dendrite's node on it looks like, and how nodes compute.

``base`` has the base class and the registry; a kind each have ``linear_conv``, ``transposed`` (the linear layer of
GPT-2), ``recurrent``, ``whole_module`` (any module of a user's own) and ``own_layer`` (layers of a user's own that are
derived from PyTorch's and compute in another way); and ``sparse`` has the view of dendrites that see some of the inputs
of a Linear or a convolution, with ``bags`` for the sums that they are.

A kind may import torch, ``core.tensors`` and other kinds, and nothing else of the package: neither the rule that
candidates learn by nor the dendrites that use it.

To add a kind: write a :class:`LayerKind` in a file of its own, put ``@register(TheLayer)`` above it, and import it
here. ``docs/architecture.md`` walks through one.
"""

from pl_dendrites.core.kinds.base import (
    Inputs,
    LayerKind,
    Memory,
    is_layer,
    kind_class,
    kind_of,
    register,
    scaled,
    weight_of,
)
from pl_dendrites.core.kinds.linear_conv import LINEAR_CONV, LinearConv, inputs_of, like, run_like
from pl_dendrites.core.kinds.own_layer import OwnLayer
from pl_dendrites.core.kinds.recurrent import Cell, Recurrent
from pl_dendrites.core.kinds.sparse import Sparse, narrowed
from pl_dendrites.core.kinds.transposed import Transposed
from pl_dendrites.core.kinds.whole_module import WholeModule

__all__ = [
    "LINEAR_CONV",
    "Cell",
    "Inputs",
    "LayerKind",
    "LinearConv",
    "Memory",
    "OwnLayer",
    "Recurrent",
    "Sparse",
    "Transposed",
    "WholeModule",
    "inputs_of",
    "is_layer",
    "kind_class",
    "kind_of",
    "like",
    "narrowed",
    "register",
    "run_like",
    "scaled",
    "weight_of",
]
