"""The linear layer of GPT-2, whose weight lies the other way round. It is known by its name and shape."""

from __future__ import annotations

from torch import Tensor, nn

from pl_dendrites.core.kinds.base import register_by_name, weight_of
from pl_dendrites.core.kinds.linear_conv import LinearConv

__all__ = ["Transposed"]


def _fits(module: nn.Module) -> bool:
    neurons = getattr(module, "nf", None)
    weights = any(parameter.ndim > 1 for parameter in module.parameters())
    return isinstance(neurons, int) and weights and tuple(weight_of(module).shape[1:]) == (neurons,)


@register_by_name("Conv1D", _fits)
class Transposed(LinearConv):
    """Hugging Face's ``Conv1D``: a Linear with a weight of shape ``(inputs, neurons)``. Its nodes are an ``nn.Linear``.

    Example:
        >>> import torch
        >>> from pl_dendrites.core.kinds import kind_of
        >>> class Conv1D(nn.Module):
        ...     def __init__(self, nf, nx):
        ...         super().__init__()
        ...         self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))
        >>> kind = kind_of(Conv1D(8, 5))
        >>> type(kind).__name__, kind.neurons, kind.inputs
        ('Transposed', 8, 5)
    """

    def _measure(self, layer: nn.Module) -> None:
        self.inputs, self.neurons = weight_of(layer).shape
        self.dim, self.groups = -1, 1

    def first_neuron(self, layer: nn.Module) -> Tensor:
        """See :meth:`LayerKind.first_neuron`."""
        return layer.get_parameter("weight")[:, 0]
