"""Errors of all batches of an epoch on one scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.rule.moments import Moments

__all__ = ["CommonScale", "real_samples"]

# Squares of errors below this come near to leaving single precision; they are brought up to about 1.
_TINY = 1e-12
_MOST = 120  # as a power of two, for single precision


def real_samples(error: Tensor, dim: int) -> Tensor:
    """Which positions are samples: those where any neuron has an error. Padding has none, for no loss looks at it.

    Args:
        error: gradient of the loss with respect to the layer's output.
        dim: the neuron dimension, counted from the end.

    Returns:
        1 or 0, with the shape and the type of ``error`` but one entry along ``dim``.

    Example:
        >>> real_samples(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), dim=-1)
        tensor([[1.],
                [0.]])
    """
    return (error != 0).any(dim, keepdim=True).to(error.dtype)


class CommonScale(nn.Module):
    r"""What errors must be multiplied by, so that a sample counts the same in whatever batch it comes.

    The errors of a loss that is a mean over its batch are as many times larger as the batch has fewer samples: the last
    one of an epoch may have one, with the weight of all others. Those of a loss that is a sum are not. Which it is, the
    errors themselves say as soon as a batch has another size than the first one had: with :math:`a` the logarithm of
    how much larger they are than those of the epoch so far, and :math:`l` that of how many more samples there are, the
    slope :math:`\sum a l / \sum l^2` is about -1 for a mean and 0 for a sum. Batches of one size cost nothing.

    An epoch's first batch is looked at, which waits for the device once: whether it has positions without any error,
    and whether its errors are so small that their squares would vanish.

    Args:
        device: where the candidates are.

    Attributes:
        leaves_out: whether positions without any error are no samples.
        power: errors are multiplied by two to this power before anything else.
        first: samples of the phase's first batch; 0 before it.
        looked: whether the present epoch was looked at.
        evidence: the two sums.

    Example:
        >>> scale = CommonScale(torch.device("cpu"))
        >>> scale.see(*scale.look(torch.full((8, 2), 2.0**-70), dim=-1))
        >>> scale.leaves_out, scale.power
        (False, 70)
    """

    evidence: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.leaves_out = self.looked = False
        self.power = self.first = 0
        self.register_buffer("evidence", torch.zeros(2, device=device))

    def get_extra_state(self) -> Tensor:
        """All that is no tensor, as one: for a state_dict."""
        return torch.tensor([self.first, self.leaves_out, self.power], device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Undo :meth:`get_extra_state`; errors are those of :meth:`read`."""
        self.first, self.leaves_out, self.power = self.read(state)

    @staticmethod
    def read(state: Any) -> tuple[int, bool, int]:
        """What :meth:`get_extra_state` says.

        Raises:
            ValueError: if it is something else.
        """
        whole = isinstance(state, Tensor) and state.dtype == torch.int64 and tuple(state.shape) == (3,)
        first, leaves_out, power = state.tolist() if whole else (-1, 0, 0)
        if first < 0 or not 0 <= power <= _MOST or leaves_out not in (0, 1):
            raise ValueError("what the saved candidates have seen of their first batch cannot be read")
        return first, bool(leaves_out), power

    @staticmethod
    def look(error: Tensor, dim: int) -> tuple[float, float]:
        """The largest error of any sample, and the least of what is largest of each.

        Args:
            error: gradient of the loss with respect to the layer's output.
            dim: the neuron dimension, counted from the end.
        """
        if not error.numel():
            return 0.0, 0.0
        size = error.abs().amax(dim).float()
        largest, least = torch.stack([size.amax(), size.amin()]).tolist()
        return largest, least

    def see(self, largest: float, least: float) -> None:
        """Take in what :meth:`look` found in an epoch's first batch; nothing where the layer did not reach the loss."""
        if largest == 0:
            return
        self.looked, self.leaves_out = True, self.leaves_out or least == 0
        if self.power == 0 and largest < _TINY:
            self.power = min(-math.frexp(largest)[1] + 1, _MOST)

    def samples_of(self, error: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
        """The error as statistics take it in, and which positions are samples; ``None``: all.

        Args:
            error: gradient of the loss with respect to the layer's output.
            dim: the neuron dimension, counted from the end.
        """
        if self.power:
            error = error.to(torch.promote_types(error.dtype, torch.float32)) * 2.0**self.power
        return error, real_samples(error, dim) if self.leaves_out else None

    def factor(self, new: Moments, so_far: Moments, samples: int | Tensor) -> Tensor | float:
        """What the errors of a batch must be multiplied by.

        Args:
            new: the batch.
            so_far: the epoch before it, on the common scale.
            samples: in the batch; a tensor where only the device knows.
        """
        if not self.first:
            self.first = int(samples)
        if not isinstance(samples, Tensor) and samples in (0, self.first):
            return 1.0
        share = samples / max(self.first, 1)
        if not isinstance(share, Tensor):
            share = self.evidence.new_full((), share)  # made there: a tensor that is brought would wait for the device
        more, larger = share.log(), (_mean_square(new) / _mean_square(so_far)).log() / 2
        step = torch.stack([larger * more, more * more])
        self.evidence.add_(torch.where(step.isfinite().all(), step, 0))
        return torch.where(self.evidence[0] < -self.evidence[1] / 2, share, 1)


def _mean_square(moments: Moments) -> Tensor:
    there = moments.samples > 0
    square = moments.square_error + moments.samples * moments.mean_error.square()
    return torch.where(there, square, 0).sum() / moments.samples.sum()
