"""The mathematics on tensors: the cascade, the covariance, its gradient, Pearson.

No modules and no state of its own; every function here takes tensors and gives tensors. Throughout, ``C`` is the number
of neurons of a layer, ``P`` the number of candidates in a pool and ``k`` the number of dendrites. A layer's output has
its neurons along one dimension, ``dim``; all other dimensions are samples (see :mod:`~pl_dendrites.core.shapes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pl_dendrites.core.shapes import per_neuron

__all__ = [
    "ACTIVATIONS",
    "UNBOUNDED",
    "CorrelationRule",
    "Moments",
    "batch_moments",
    "cascade",
    "covariance_gradient",
    "merge_moments",
    "moments_of_sums",
    "pearson",
    "sums_of_moments",
]

# The position of a name in this table is what a state_dict stores: append, never reorder.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": F.gelu,
}
# Of these the covariance makes outputs ever larger, so that their size says nothing.
UNBOUNDED = ("relu", "gelu")


def cascade(
    potentials: Sequence[Tensor],
    links: Tensor,
    activation: Callable[[Tensor], Tensor],
    dim: int,
    below: Sequence[Tensor] = (),
) -> list[Tensor]:
    r"""Outputs of the dendrites of every neuron, each of which also sees the earlier ones of its neuron.

    .. math:: d_{j,c} = f\Big(z_{j,c} + \sum_{i<j} u_{j,i,c}\, d_{i,c}\Big), \qquad z_{j,c} = V_{j,c} \cdot x + v_{j,c}

    This is the cascade of Fahlman & Lebiere (CMU-CS-90-100, 1990), private to one neuron as in Brenner & Itti
    (arXiv:2501.18018).

    Args:
        potentials: ``k`` tensors of the layer's output shape, :math:`z_j`.
        links: shape ``(rows, C)``: :math:`u` of the first dendrite and each of those below, of the second and each of
            those below and the first, and so on. With none below, the rows (1,0), (2,0), (2,1), (3,0), ...
        activation: :math:`f`.
        dim: the neuron dimension, counted from the end.
        below: outputs of dendrites that come before all of these.

    Returns:
        ``k`` tensors of the layer's output shape.

    Example:
        >>> first, second = cascade([torch.ones(1, 1), torch.ones(1, 1)], torch.tensor([[-1.0]]), torch.relu, -1)
        >>> first.item(), second.item()
        (1.0, 0.0)
    """
    outputs: list[Tensor] = []
    row = 0
    for potential in potentials:
        total = potential
        for earlier in (*below, *outputs):
            link = per_neuron(links[row], dim, earlier.ndim).to(earlier.dtype)
            # In place from the second on: what the first made belongs to nobody else.
            total = torch.addcmul(total, link, earlier) if total is potential else total.addcmul_(link, earlier)
            row += 1
        outputs.append(activation(total))
    return outputs


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


def batch_moments(outputs: Tensor, error: Tensor, dim: int) -> tuple[Moments, Tensor]:
    """Moments of one batch, and the centred error that is the gradient of the covariance.

    A neuron whose error is not finite anywhere in the batch counts as having no samples there, so that one overflow
    does not spoil an epoch.

    Args:
        outputs: shape ``(P, *error.shape)``, outputs of the candidates.
        error: gradient of the loss with respect to the layer's output, ``C`` entries along ``dim``.
        dim: the neuron dimension, counted from the end.

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
    size = error.numel() // max(error.shape[dim], 1)
    mean_error, mean_output = (error.mean(dims), outputs.mean(dims)) if dims else (error, outputs)
    # Where the mean is not finite no deviation from it is. A torch.where by neuron would take seven times as long.
    centred = (error - per_neuron(mean_error, dim, error.ndim)).nan_to_num_(0.0, 0.0, 0.0)
    # Not torch.var_mean, which on a CPU takes ten times as long as these passes. All are over tensors as large as the
    # pool's outputs, so there is one at a time beside the deviation, which is squared in its place.
    deviation = outputs - per_neuron(mean_output, dim, error.ndim)
    covariance = _total(deviation * centred, dims)
    moments = Moments(
        samples=(mean_error.abs() < math.inf) * float(size),
        mean_output=mean_output,
        mean_error=mean_error,
        square_output=_total(deviation.square_(), dims),
        square_error=_total(centred.square(), dims),
        covariance=covariance,
    )
    return moments, centred


def _total(values: Tensor, dims: list[int]) -> Tensor:
    # An unbatched Linear has only its neurons' dimension: one sample. Reducing over none would reduce over all.
    return values.sum(dims) if dims else values


def covariance_gradient(sign: Tensor, centred: Tensor, outputs: Tensor, dim: int) -> Tensor:
    """Gradient of minus the absolute covariance with respect to the outputs of a pool.

    Args:
        sign: shape ``(P, C)``, of the covariance.
        centred: the centred error.
        outputs: shape ``(P, *centred.shape)``, outputs of the candidates.
        dim: the neuron dimension, counted from the end.

    Returns:
        Shape and type of ``outputs``, whose order in memory it has too: the backward pass of the one matrix product
        that they come from then needs no copy.

    Example:
        >>> covariance_gradient(torch.tensor([[-1.0]]), torch.tensor([[1.0], [-1.0]]), torch.zeros(1, 2, 1), dim=-1)
        tensor([[[ 1.],
                 [-1.]]])
    """
    gradient = torch.empty_like(outputs, dtype=centred.dtype)
    torch.mul(-per_neuron(sign, dim, centred.ndim), centred, out=gradient)
    return gradient.to(outputs.dtype)


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


def sums_of_moments(moments: Moments) -> Moments:
    """Sums over samples, which add up over parts of a batch as moments do not.

    Args:
        moments: moments of one part.

    Returns:
        In the place of each moment the plain sum that it is made of, in double precision, in which a mean that is large
        beside the deviations costs nothing that single precision would have kept. Zero for neurons without samples.

    Example:
        >>> two = Moments(*(torch.tensor([v]) for v in (2.0, 3.0, 1.0, 2.0, 0.0, 0.0)))
        >>> [value.item() for value in sums_of_moments(two)]
        [2.0, 6.0, 2.0, 20.0, 2.0, 6.0]
    """
    samples, output, error, square_output, square_error, covariance = (value.double() for value in moments)
    sums = Moments(
        samples,
        samples * output,
        samples * error,
        square_output + samples * output.square(),
        square_error + samples * error.square(),
        covariance + samples * output * error,
    )
    # Where there are no samples means are not finite.
    return Moments(*(torch.where(samples > 0, value, 0) for value in sums))


def moments_of_sums(sums: Moments) -> Moments:
    """Undo :func:`sums_of_moments`, for the sums over all parts of a batch.

    Args:
        sums: plain sums; a neuron whose number of samples is NaN had an error that was not finite.

    Returns:
        Moments of the whole batch, in double precision. Neurons with an error that was not finite have no samples.

    Example:
        >>> parts = [torch.tensor([[[0.0], [2.0]]]), torch.tensor([[[4.0], [2.0]]])]
        >>> sums = [sums_of_moments(batch_moments(part, part[0], dim=-1)[0]) for part in parts]
        >>> [value.item() for value in moments_of_sums(Moments(*map(torch.add, *sums)))]
        [4.0, 2.0, 2.0, 8.0, 8.0, 8.0]
    """
    samples = sums.samples.nan_to_num(0.0)
    output, error = sums.mean_output / samples, sums.mean_error / samples
    return Moments(
        samples,
        output,
        error,
        (sums.square_output - samples * output.square()).clamp(min=0),
        torch.where(samples > 0, sums.square_error - samples * error.square(), 0).clamp(min=0),
        sums.covariance - samples * output * error,
    )


def pearson(moments: Moments) -> Tensor:
    """Pearson correlation of every candidate's output with its neuron's error.

    Args:
        moments: moments over the samples.

    Returns:
        Shape ``(P, C)``, in [-1, 1]; 0 where it is undefined (no samples, no variance, not finite).

    Example:
        >>> moments, _ = batch_moments(torch.randn(2, 9, 3), torch.randn(9, 3), dim=-1)
        >>> pearson(moments).shape
        torch.Size([2, 3])
    """
    # Two roots, not the root of the product: errors of 1e-12 have squares whose product leaves single precision.
    scale = moments.square_output.sqrt() * moments.square_error.sqrt()
    return torch.nan_to_num(moments.covariance / scale, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)


class CorrelationRule(torch.autograd.Function):
    r"""The correlation rule: identity for the network, covariance ascent for the candidates.

    With the error :math:`E = \partial L / \partial out` a candidate :math:`D` of neuron c maximises

    .. math:: S_c = \Big|\sum_p (D_{p,c} - \bar D_c)(E_{p,c} - \bar E_c)\Big|, \qquad
              \frac{\partial S_c}{\partial D_{p,c}} = \operatorname{sign}(cov_c)\,(E_{p,c} - \bar E_c)

    (Fahlman & Lebiere 1990; arXiv:2501.18018). The forward pass returns ``out`` as it is. The backward pass hands
    :math:`E` on to ``out`` and the negative of that gradient to the candidates, so that any optimizer that descends
    makes :math:`S` grow. Gradient accumulation, a loss scale, activation checkpointing and a layer used several times
    need nothing special, for all of it is the ordinary backward pass. Statistics are taken there only, so a forward
    pass that is recomputed is not counted twice.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, outputs: Tensor, observe: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return a copy of ``out``; see the class.

        Args:
            ctx: autograd's context.
            out: the layer's output.
            outputs: shape ``(P, *out.shape)``, outputs of the candidates.
            observe: called once per backward pass with ``outputs`` and the error; returns the gradient for ``outputs``.
        """
        ctx.save_for_backward(outputs)
        ctx.observe = observe
        # A copy, for an identity that returned its input would be a view, which an nn.ReLU(inplace=True) may not touch.
        return out.clone()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor, None]:
        """Hand ``error`` on and give the candidates the gradient of minus their covariance."""
        (outputs,) = ctx.saved_tensors
        return error, ctx.observe(outputs, error), None
