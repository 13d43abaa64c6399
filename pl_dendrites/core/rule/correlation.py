"""The correlation rule: what candidates climb, and how near they come.

Throughout, ``C`` is the number of neurons of a layer and ``P`` the number of candidates in a pool. A layer's output has
its neurons along one dimension, ``dim``; all other dimensions are samples (see :mod:`~pl_dendrites.core.tensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pl_dendrites.core.rule.moments import Moments
from pl_dendrites.core.rule.transforms import Observation, is_batch_of_backward_passes
from pl_dendrites.core.tensors import is_transformed, per_neuron

__all__ = ["CorrelationRule", "covariance_gradient", "pearson"]


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
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Hand ``error`` on and give the candidates the gradient of minus their covariance."""
        (outputs,) = ctx.saved_tensors
        if is_batch_of_backward_passes(error):  # which the training step runs for itself
            return error, None, None
        if is_transformed():
            return error, Observation.apply(outputs, error, ctx.observe, False), None  # type: ignore[no-untyped-call]
        return error, ctx.observe(outputs, error), None


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


def pearson(moments: Moments) -> Tensor:
    """Pearson correlation of every candidate's output with its neuron's error.

    Args:
        moments: moments over the samples.

    Returns:
        Shape ``(P, C)``, in [-1, 1]; 0 where it is undefined (no samples, no variance, not finite).

    Example:
        >>> from pl_dendrites.core.rule.moments import batch_moments
        >>> moments, _ = batch_moments(torch.randn(2, 9, 3), torch.randn(9, 3), dim=-1)
        >>> pearson(moments).shape
        torch.Size([2, 3])
    """
    # Two roots, not the root of the product: errors of 1e-12 have squares whose product leaves single precision.
    scale = moments.square_output.sqrt() * moments.square_error.sqrt()
    return torch.nan_to_num(moments.covariance / scale, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
