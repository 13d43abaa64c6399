"""Which layers training uses: one that it does not would get dendrites for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from pl_dendrites.core.growth.hooks import dendrites_of

__all__ = ["UsedLayers"]


class UsedLayers:
    """Notes the layers that run, and that backward passes give gradients to.

    A correlation phase sees that from the errors; where dendrites learn by gradient alone, this does.

    Args:
        layers: by name; they are attached. A layer that is frozen gets no gradients: that it runs is enough.

    Attributes:
        names: of the layers used so far.
        bypassed: names of layers whose weights have gradients though they never ran: the model uses these by itself.

    Example:
        >>> import torch
        >>> from pl_dendrites.core import attach
        >>> model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        >>> used = attach(model).watch_use()
        >>> model["used"](torch.ones(1, 2)).sum().backward()
        >>> used.look()
        >>> used.names
        {'used'}
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.names: set[str] = set()
        self.bypassed: set[str] = set()
        self._waiting = dict(layers)

    def look(self) -> None:
        """Take in what ran, and the gradients there are: after a backward pass, before they are cleared."""
        for name, layer in list(self._waiting.items()):
            # A weight may have a gradient though its layer never runs: others may use it.
            called, own = dendrites_of(layer).called, _trainable(layer)
            trained = any(parameter.grad is not None for parameter in own)
            if called and (trained or not own):
                self.add([name])
            elif trained:
                self.bypassed.add(name)

    def add(self, names: Iterable[str]) -> None:
        """Note layers that were used at some other time."""
        for name in names:
            self.names.add(name)
            self.bypassed.discard(name)
            self._waiting.pop(name, None)


def _trainable(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if p.requires_grad and not name.startswith("dendrites.")]
