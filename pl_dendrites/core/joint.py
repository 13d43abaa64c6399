"""Candidates that learn from the samples of several processes as if one process had them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pl_dendrites.core.dendrites import Candidates
from pl_dendrites.core.functional import (
    Moments,
    batch_moments,
    covariance_gradient,
    moments_of_sums,
    per_neuron,
    sums_of_moments,
)

__all__ = ["JointLearning"]


class JointLearning:
    r"""Lets the candidates of several processes, each with its part of a batch, learn from the whole batch.

    The rule needs two figures of the whole batch before a candidate has its gradient: the neuron's mean error and the
    sign of the running covariance. A gradient with another mean could be put right afterwards only by a second one,
    that of :math:`\sum_p D_p`, which would double the work and what is communicated. So a backward pass only notes
    outputs and errors. After it, :meth:`learn` adds up a few sums per neuron over all processes and then computes the
    gradients. Nothing is communicated within a backward pass: a process whose part never reached a layer adds zeros.

    Several uses of a layer in one backward pass count as one batch here; without other processes each counts by itself.

    Args:
        pools: the candidates, those of all layers in the same order in every process.
        add_up: adds up a tensor over all processes, in place.
        processes: how many there are. Each one's loss is a mean over its own part; the mean of these is the loss whose
            error counts.

    Example:
        >>> from pl_dendrites.core import attach
        >>> network = attach(torch.nn.Linear(3, 2))
        >>> network.start_candidates(pool=2)
        >>> joint = JointLearning(network.candidates.values(), add_up=lambda tensor: None, processes=1)
        >>> network.model(torch.randn(8, 3)).square().mean().backward()
        >>> joint.learn()
        >>> joint.add_up_gradients()
        >>> [bool(parameter.grad.any()) for parameter in network.candidates[""].nodes.parameters()]
        [True, True]
        >>> network.correlations()[""].shape
        torch.Size([2, 2])
    """

    def __init__(self, pools: Iterable[Candidates], add_up: Callable[[Tensor], None], processes: int) -> None:
        self._pools, self._add_up, self._share = list(pools), add_up, 1 / processes
        for pool in self._pools:
            pool.noted = []

    def learn(self) -> None:
        """Take in what the last backward pass noted, in all processes, and give the candidates their gradients."""
        outputs, gradients = [], []
        for pool, (used, new) in zip(self._pools, self._moments(), strict=True):
            sign = pool.take_in(new) if used else torch.zeros_like(new.covariance)
            noted = pool.noted or []
            for seen, error in noted:
                outputs.append(seen)
                gradients.append(
                    torch.zeros_like(seen) if error is None else self._gradient(pool, new, sign, error, seen)
                )
            noted.clear()
        if outputs:
            # Kept, for whoever runs backward through the same graph twice.
            torch.autograd.backward(outputs, gradients, retain_graph=True)

    @torch.no_grad()
    def _moments(self) -> list[tuple[bool, Moments]]:
        # Of each pool, whether any process noted an error, and the moments over all processes.
        own = [self._sums(pool) for pool in self._pools]
        flat = torch.cat(own)
        self._add_up(flat)
        parts = flat.split([part.numel() for part in own])
        used = torch.stack([part[0] for part in parts]).tolist()
        new = [self._unpack(pool, part[1:]) for pool, part in zip(self._pools, parts, strict=True)]
        return list(zip([anywhere > 0 for anywhere in used], new, strict=True))

    def _sums(self, pool: Candidates) -> Tensor:
        used, total = 0.0, Moments(*(torch.zeros_like(value, dtype=torch.float64) for value in pool.moments))
        for outputs, error in pool.noted or ():
            if error is not None:
                used = 1.0
                moments, _ = batch_moments(outputs, self._scaled(error), pool.kind.dim)
                sums = sums_of_moments(moments)
                if error.numel():
                    # One error that is not finite spoils the batch for a neuron, in whichever process it is. Unlike a
                    # zero, NaN is still seen in a sum.
                    sums = sums._replace(samples=torch.where(moments.samples > 0, sums.samples, torch.nan))
                total = Moments(*map(torch.add, total, sums))
        return torch.cat([total.samples.new_tensor([used]), *(value.flatten() for value in total)])

    def _scaled(self, error: Tensor) -> Tensor:
        return error.to(torch.promote_types(error.dtype, torch.float32)) * self._share

    def _unpack(self, pool: Candidates, flat: Tensor) -> Moments:
        own = pool.moments
        parts = flat.split([value.numel() for value in own])
        sums = Moments(*(part.view_as(value) for part, value in zip(parts, own, strict=True)))
        pool.missed.logical_or_(sums.samples.isnan().any())
        return Moments(*(new.to(value.dtype) for new, value in zip(moments_of_sums(sums), own, strict=True)))

    def _gradient(self, pool: Candidates, new: Moments, sign: Tensor, error: Tensor, outputs: Tensor) -> Tensor:
        dim, ndim = pool.kind.dim, error.ndim
        centred = self._scaled(error) - per_neuron(new.mean_error, dim, ndim)
        centred = torch.where(per_neuron(new.samples > 0, dim, ndim), centred, 0)
        return covariance_gradient(sign, centred, outputs, dim)

    @torch.no_grad()
    def add_up_gradients(self) -> None:
        """Give every process the sum of all gradients, before the candidates' optimizer steps.

        A parameter that had none in any process has none afterwards, so that an optimizer passes it over as ever.
        """
        parameters = [parameter for pool in self._pools for parameter in pool.parameters()]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = own[0].new_tensor([float(p.grad is not None) for p in parameters])
        flat = torch.cat([there, *(gradient.flatten() for gradient in own)])
        self._add_up(flat)
        anywhere = flat[: len(parameters)].tolist()
        parts = flat[len(parameters) :].split([p.numel() for p in parameters])
        for parameter, total, found in zip(parameters, parts, anywhere, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if found else None
