"""How much each input of a layer varies."""

from __future__ import annotations

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
        waiting: with several processes, sums over what this one saw and :meth:`take_in` has yet to be told of all:
            samples, inputs, squared inputs; ``None`` with one process, which takes in batches as they come.

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
        self.waiting: Tensor | None = None

    def wait(self) -> None:
        """From now on there are several processes."""
        self.waiting = self.samples.new_zeros(2 * len(self.mean) + 1)

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
        if self.waiting is None:
            self._merge(count, mean, square)
        else:
            mean = mean.double()
            ones = self.samples.new_full((1,), count)
            self.waiting += torch.cat([ones, count * mean, square.double() + count * mean.square()])

    def take_in(self, sums: Tensor) -> None:
        """Take in what :attr:`waiting` is over all processes; it is nothing then.

        Args:
            sums: shape ``(2 n + 1,)``.
        """
        assert self.waiting is not None
        self.waiting.zero_()
        count, total, squares = sums.split([1, len(self.mean), len(self.mean)])
        mean = total / count.clamp(min=1)
        self._merge(count[0], mean, (squares - count * mean.square()).clamp(min=0))

    def _merge(self, count: float | Tensor, mean: Tensor, square: Tensor) -> None:
        # Chan, Golub & LeVeque (1979).
        step, share = mean - self.mean, count / (self.samples + count).clamp(min=1)
        self.square += square + step.square() * self.samples * share
        self.mean += step * share
        self.samples += count

    def deviation(self) -> Tensor | None:
        """Standard deviation of each input, shape ``(n,)``; ``None`` where there were no samples, or none varied."""
        if not self.samples or not self.square.any():
            return None
        return (self.square / self.samples).sqrt().float()
