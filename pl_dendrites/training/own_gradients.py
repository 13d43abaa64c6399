"""Training steps that ask for gradients of the model's own weights, where these are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from pl_dendrites.training.trainer import Shadows

__all__ = ["OwnGradients"]

# What PyTorch and Python say where there is nothing to differentiate, no gradient to stack, or None for a gradient.
_ASKS = ("does not require grad", "non-empty", "cannot be empty", "NoneType")


class OwnGradients:
    """Gives a model gradients of its own weights in a correlation phase, once it shows that it wants them.

    Adaptive loss weights, PCGrad, an inner loop (MAML) and norms of gradients fail where all weights are frozen. A step
    that fails there is tried again with the flags that the user set, and so are all that follow; what it costs more is
    what a base step costs. A step that fails then, too, ends the fit with its error.

    Args:
        module: the model; its ``training_step`` and ``on_after_backward`` are shadowed on the instance.
        thaw: gives its flags back, until the batch ends.
        needed: whether it has shown so before.

    Attributes:
        needed: whether it has shown so.
    """

    def __init__(self, module: pl.LightningModule, thaw: Callable[[], None], needed: bool = False) -> None:
        self.needed, self._module, self._thaw, self._shadows = needed, module, thaw, Shadows()
        for name in ("training_step", "on_after_backward"):
            self._shadows.put(module, name, self._tried_again(getattr(module, name), name))

    def _tried_again(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def tried(*args: Any, **kwargs: Any) -> Any:
            if self.needed:
                return method(*args, **kwargs)
            try:
                return method(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                if not any(text in str(error) for text in _ASKS):
                    raise
                self.needed = True
                self._thaw()
                if name == "on_after_backward":  # this time there are none
                    for parameter in self._module.parameters():
                        if parameter.requires_grad and parameter.grad is None:
                            parameter.grad = torch.zeros_like(parameter)
                return method(*args, **kwargs)

        return tried

    def clear(self) -> None:
        """The batch ends: nobody steps with what it left."""
        if self.needed:
            for parameter in self._module.parameters():
                parameter.grad = None

    def release(self) -> None:
        """Give the model back its methods."""
        self._shadows.release()
