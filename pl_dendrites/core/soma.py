"""A network of neuron bodies alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Soma"]


class Soma(nn.Module):
    """Neuron bodies without inputs of their own: all that they know comes from their dendrites.

    Its output is a bias for each neuron. Shared dendrites around it make the whole network, from nothing: on wide
    inputs that takes fewer parameters than a linear layer, which has one for every input and output.

    Args:
        inputs: size of the last dimension of what it is called with, ``n``.
        outputs: neurons, ``C``.

    Attributes:
        bias: shape ``(C,)``, zero at the start.

    Example:
        >>> Soma(784, 10)(torch.randn(5, 784)).shape
        torch.Size([5, 10])
    """

    neuron_dim = -1

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.bias = nn.Parameter(torch.zeros(outputs))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"inputs={self.inputs}, outputs={self.outputs}"

    def forward(self, x: Tensor) -> Tensor:
        """The biases, once for each position.

        Args:
            x: shape ``(*, n)``.

        Returns:
            Shape ``(*, C)``.

        Raises:
            ValueError: if ``x`` has another size.
        """
        if x.shape[-1] != self.inputs:
            raise ValueError(f"it is called with {tuple(x.shape)}, and must be with (..., {self.inputs})")
        # A copy: what the model changes in place is not the parameter.
        return self.bias.to(x.dtype).expand(*x.shape[:-1], -1).clone()
