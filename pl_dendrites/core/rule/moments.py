"""Statistics of a pool's outputs and of its neurons' errors: of a batch, of batches together, of several processes.

Throughout, ``C`` is the number of neurons of a layer and ``P`` the number of candidates in a pool. A layer's output has
its neurons along one dimension, ``dim``; all other dimensions are samples (see :mod:`~pl_dendrites.core.tensors`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pl_dendrites.core.tensors import per_neuron

__all__ = ["Moments", "Sums", "batch_moments", "merge_moments", "scaled_errors"]


class Moments(NamedTuple):
    """Means and centred sums over samples of a pool's outputs and of its neurons' errors.

    Attributes:
        samples: shape ``(C,)``, how many there were.
        mean_output: shape ``(P, C)``.
        mean_error: shape ``(C,)``.
        square_output: shape ``(P, C)``, sum of squared deviations.
        square_error: shape ``(C,)``.
        covariance: shape ``(P, C)``, sum of products of the deviations.
    """

    samples: Tensor
    mean_output: Tensor
    mean_error: Tensor
    square_output: Tensor
    square_error: Tensor
    covariance: Tensor


class Sums(NamedTuple):
    """Plain sums over samples, which add up over parts of a batch as moments do not.

    They are in double precision, in which a mean that is large beside the deviations costs nothing that single
    precision would have kept.

    Attributes:
        samples: shape ``(C,)``, how many there were; NaN for a neuron with an error that was not finite.
        output: shape ``(P, C)``, sum of outputs.
        error: shape ``(C,)``, sum of errors.
        square_output: shape ``(P, C)``, sum of squared outputs.
        square_error: shape ``(C,)``, sum of squared errors.
        product: shape ``(P, C)``, sum of products of output and error.
    """

    samples: Tensor
    output: Tensor
    error: Tensor
    square_output: Tensor
    square_error: Tensor
    product: Tensor

    @classmethod
    def nothing(cls, like: Moments) -> Sums:
        """The sums over no samples.

        Args:
            like: moments of the same pool.
        """
        return cls(*(torch.zeros_like(value, dtype=torch.float64) for value in like))

    @classmethod
    def of(cls, moments: Moments) -> Sums:
        """The sums that moments are made of; zero for neurons without samples.

        Args:
            moments: moments of one part.

        Example:
            >>> two = Moments(*(torch.tensor([v]) for v in (2.0, 3.0, 1.0, 2.0, 0.0, 0.0)))
            >>> [value.item() for value in Sums.of(two)]
            [2.0, 6.0, 2.0, 20.0, 2.0, 6.0]
        """
        samples, output, error, square_output, square_error, covariance = (value.double() for value in moments)
        sums = (
            samples,
            samples * output,
            samples * error,
            square_output + samples * output.square(),
            square_error + samples * error.square(),
            covariance + samples * output * error,
        )
        # Where there are no samples means are not finite.
        return cls(*(torch.where(samples > 0, value, 0) for value in sums))

    def plus(self, other: Sums) -> Sums:
        """The sums over the samples of both."""
        return Sums(*map(torch.add, self, other))

    def moments(self) -> Moments:
        """Undo :meth:`of`, for the sums over all parts of a batch.

        Returns:
            Moments of the whole batch, in double precision. Neurons with an error that was not finite have no samples.

        Example:
            >>> parts = [torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[4.0], [2.0]]])]
            >>> first, second = (Sums.of(batch_moments(part, part[0], dim=-1)[0]) for part in parts)
            >>> [value.item() for value in first.plus(second).moments()]
            [4.0, 2.0, 2.0, 8.0, 8.0, 8.0]
        """
        samples = self.samples.nan_to_num(0.0)
        output, error = self.output / samples, self.error / samples
        return Moments(
            samples,
            output,
            error,
            (self.square_output - samples * output.square()).clamp(min=0),
            torch.where(samples > 0, self.square_error - samples * error.square(), 0).clamp(min=0),
            self.product - samples * output * error,
        )


def batch_moments(outputs: Tensor, error: Tensor, dim: int, real: Tensor | None = None) -> tuple[Moments, Tensor]:
    """Moments of one batch, and the centred error that is the gradient of the covariance.

    A neuron whose error is not finite anywhere in the batch counts as having no samples there, so that one overflow
    does not spoil an epoch.

    Args:
        outputs: shape ``(P, *error.shape)``, outputs of the candidates.
        error: gradient of the loss with respect to the layer's output, ``C`` entries along ``dim``.
        dim: the neuron dimension, counted from the end.
        real: which positions are samples, 1 or 0, with one entry along ``dim``; ``None``: all.

    Returns:
        The moments, in at least single precision, and the centred error with the shape of ``error``.

    Example:
        >>> outputs = torch.tensor([[[0.0], [1.0], [2.0]]])
        >>> moments, centred = batch_moments(outputs, torch.tensor([[3.0], [2.0], [1.0]]), dim=-1)
        >>> moments.covariance.item(), centred.flatten().tolist()
        (-2.0, [1.0, 0.0, -1.0])
    """
    wide = torch.promote_types(error.dtype, torch.float32)
    outputs, error = outputs.to(wide), error.to(wide)
    dims = [d for d in range(-error.ndim, 0) if d != dim]
    size: float | Tensor = float(error.numel() // max(error.shape[dim], 1))
    if real is not None:
        size = real.sum()
        share = 1 / size.clamp(min=1)
        mean_error, mean_output = _total(error, dims) * share, _total(outputs * real, dims) * share
    else:
        mean_error, mean_output = (error.mean(dims), outputs.mean(dims)) if dims else (error, outputs)
    # Where the mean is not finite no deviation from it is. A torch.where by neuron would take seven times as long.
    centred = (error - per_neuron(mean_error, dim, error.ndim)).nan_to_num_(0.0, 0.0, 0.0)
    # Not torch.var_mean, which on a CPU takes ten times as long as these passes. All are over tensors as large as the
    # pool's outputs, so there is one at a time beside the deviation, which is squared in its place.
    deviation = outputs - per_neuron(mean_output, dim, error.ndim)
    if real is not None:
        centred.mul_(real)
        deviation.mul_(real)
    covariance = _total(deviation * centred, dims)
    moments = Moments(
        samples=(mean_error.abs() < math.inf) * size,
        mean_output=mean_output,
        mean_error=mean_error,
        square_output=_total(deviation.square_(), dims),
        square_error=_total(centred.square(), dims),
        covariance=covariance,
    )
    return moments, centred


def scaled_errors(moments: Moments, factor: Tensor | float) -> Moments:
    """Moments of the same samples with errors that are all multiplied by a number.

    Args:
        moments: of the samples.
        factor: the number; 1.0 costs nothing.

    Example:
        >>> one = Moments(*(torch.tensor([v]) for v in (2.0, 3.0, 1.0, 2.0, 4.0, 5.0)))
        >>> [value.item() for value in scaled_errors(one, 2.0)]
        [2.0, 3.0, 2.0, 2.0, 16.0, 10.0]
    """
    if isinstance(factor, float) and factor == 1:
        return moments
    return moments._replace(
        mean_error=moments.mean_error * factor,
        square_error=moments.square_error * (factor * factor),
        covariance=moments.covariance * factor,
    )


def _total(values: Tensor, dims: list[int]) -> Tensor:
    # An unbatched Linear has only its neurons' dimension: one sample. Reducing over none would reduce over all.
    return values.sum(dims) if dims else values


def merge_moments(old: Moments, new: Moments) -> Moments:
    """Moments of the union of two sets of samples (Chan, Golub & LeVeque, 1979: no cancellation).

    These are small tensors: on a GPU, and in a small network, it is the number of operations that takes time.

    Args:
        old: moments of the samples so far; they become those of all.
        new: moments of the samples to add; neurons without any leave ``old`` as it is.

    Returns:
        ``old``.

    Example:
        >>> one = Moments(*(torch.tensor([v]) for v in (1.0, 2.0, 4.0, 0.0, 0.0, 0.0)))
        >>> two = Moments(*(torch.tensor([v]) for v in (1.0, 4.0, 0.0, 0.0, 0.0, 0.0)))
        >>> [round(value.item(), 6) for value in merge_moments(one, two)]
        [2.0, 3.0, 2.0, 2.0, 8.0, -4.0]
    """
    there = new.samples > 0
    # A neuron without new samples may carry non-finite means: they must not reach the sums, not even times zero.
    step_output = torch.where(there, new.mean_output - old.mean_output, 0)
    step_error = torch.where(there, new.mean_error - old.mean_error, 0)
    share = new.samples / (old.samples + new.samples).clamp_(min=1)
    old.mean_output.addcmul_(step_output, share)
    old.mean_error.addcmul_(step_error, share)
    weight = old.samples * share
    old.square_output.add_(torch.where(there, new.square_output, 0)).addcmul_(step_output * weight, step_output)
    weighted = step_error * weight
    old.square_error.add_(new.square_error).addcmul_(weighted, step_error)
    old.covariance.add_(torch.where(there, new.covariance, 0)).addcmul_(step_output, weighted)
    old.samples.add_(new.samples)
    return old
