"""How much each input of a layer varies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["InputSpread"]


class InputSpread(nn.Module):
    """Mean and squared deviations of a layer's inputs, features or channels, over all batches that it is shown.

    Args:
        inputs: how many.
        device: where they are.

    Attributes:
        samples: how many there were.
        mean: shape ``(n,)``.
        square: shape ``(n,)``, sum of squared deviations.

    Example:
        >>> spread = InputSpread(2, torch.device("cpu"))
        >>> for batch in torch.tensor([[[1.0, 5.0], [3.0, 5.0]], [[-1.0, 5.0], [-3.0, 5.0]]]):
        ...     spread.add(batch, dim=-1)
        >>> spread.deviation()
        tensor([2.2361, 0.0000])
    """

    samples: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__()
        for name, shape in (("samples", ()), ("mean", (inputs,)), ("square", (inputs,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, x: Tensor, dim: int) -> None:
        """Take in a batch.

        Args:
            x: ``n`` entries along ``dim``.
            dim: of the inputs, counted from the end.
        """
        count = x.numel() // max(x.shape[dim], 1)
        if not count:
            return
        x = x.detach().movedim(dim, -1).flatten(0, -2) if x.ndim > 1 else x.detach()[None]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        square = (x - mean).square().sum(0)
        # Chan, Golub & LeVeque (1979).
        step, share = mean - self.mean, count / (self.samples + count)
        self.square += square + step.square() * self.samples * share
        self.mean += step * share
        self.samples += count

    @torch.no_grad()
    def add_up(self, add_up: Callable[[Tensor], None]) -> None:
        """Become that of all processes together. All must call this.

        Args:
            add_up: adds up a tensor over all processes, in place.
        """
        flat = torch.cat(
            [self.samples[None], self.samples * self.mean, self.square + self.samples * self.mean.square()]
        )
        add_up(flat)
        samples, total, square = flat.split([1, len(self.mean), len(self.mean)])
        self.samples.copy_(samples[0])
        self.mean.copy_(total / samples.clamp(min=1))
        self.square.copy_((square - samples * self.mean.square()).clamp(min=0))

    def deviation(self) -> Tensor | None:
        """Standard deviation of each input, shape ``(n,)``; ``None`` where there were no samples, or none varied."""
        if not self.samples or not self.square.any():
            return None
        return (self.square / self.samples).sqrt().float()
