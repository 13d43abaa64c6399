"""A network that stands still while its candidates learn."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Freeze"]


class Freeze:
    """Freezes every parameter of a model, and keeps what has to come back.

    A frozen BatchNorm in training mode goes on updating its running statistics, and other layers have buffers that move
    with each forward pass too; so buffers are kept by value, and :meth:`hold` puts them back.

    Args:
        model: the model to freeze; its gradients are dropped, for an old one would go on moving weights by momentum.
        trainable: names of the parameters that will be trainable again; ``None``: those that are so now.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> freeze = Freeze(model)
        >>> _ = model(torch.randn(8, 2))
        >>> freeze.release()
        >>> model[0].weight.requires_grad, model[1].running_mean.tolist()
        (True, [0.0, 0.0])
    """

    def __init__(self, model: nn.Module, trainable: Iterable[str] | None = None) -> None:
        parameters = dict(model.named_parameters())
        names = [name for name, p in parameters.items() if p.requires_grad] if trainable is None else list(trainable)
        self.trainable = names
        self._parameters = [parameters[name] for name in names]
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._buffers: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def hold(self) -> None:
        """Put the buffers back to what they were."""
        for module, name, value in self._buffers:
            buffer = getattr(module, name)
            if isinstance(buffer, Tensor) and buffer.shape == value.shape:
                buffer.copy_(value)
            else:
                setattr(module, name, value.clone())

    def release(self) -> None:
        """Put the buffers back and make trainable again what was trainable before."""
        self.hold()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
