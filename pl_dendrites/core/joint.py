"""Candidates that learn from the samples of several processes as if one process had them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from pl_dendrites.core.candidates import Candidates
from pl_dendrites.core.functional import Moments, batch_moments, covariance_gradient, moments_of_sums, sums_of_moments
from pl_dendrites.core.gathering import Gathered, gather_rows
from pl_dendrites.core.shapes import per_neuron

__all__ = ["JointLearning"]

_Seen = list[tuple[Tensor, Tensor | None]]  # outputs of a pool and their error, for each use of the layer


class JointLearning:
    r"""Lets the candidates of several processes, each with its part of a batch, learn from the whole batch.

    The rule needs two figures of the whole batch before a candidate has its gradient: the neuron's mean error and the
    sign of the running covariance. A gradient with another mean could be put right afterwards only by a second one,
    that of :math:`\sum_p D_p`, which would double the work and what is communicated. So a backward pass only notes
    outputs and errors. After it, :meth:`learn` adds up a few sums per neuron over all processes and then computes the
    gradients. Nothing is communicated within a backward pass: a process whose part never reached a layer adds zeros.

    Where it communicates no more than a base step does, see :func:`~pl_dendrites.core.gathering.gather_rows`, every
    process gets the samples of all instead, and computes the gradients of the whole batch by itself.

    Several uses of a layer in one backward pass count as one batch here; without other processes each counts by itself.

    Args:
        pools: the candidates, those of all layers in the same order in every process.
        add_up: adds up a tensor over all processes, in place.
        processes: how many there are. Each one's loss is a mean over its own part; the mean of these is the loss whose
            error counts.
        gather: the tensors of all processes, stacked, given that of this one; ``None``: samples are never gathered.

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

    def __init__(
        self,
        pools: Iterable[Candidates],
        add_up: Callable[[Tensor], None],
        processes: int,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._pools, self._add_up, self._gather, self._share = list(pools), add_up, gather, 1 / processes
        # Since the last step: which pools have gradients of a part of a batch, and gradients of whole batches.
        self._in_parts: dict[Candidates, bool] = dict.fromkeys(self._pools, False)
        self._whole: dict[nn.Parameter, Tensor] = {}
        for pool in self._pools:
            pool.noted = []

    def learn(self) -> None:
        """Take in what the last backward pass noted, in all processes, and give the candidates their gradients."""
        gathered = {} if self._gather is None else gather_rows(self._pools, self._gather)
        for pool, samples in gathered.items():
            self._learn_whole(pool, samples)
        rest = [pool for pool in self._pools if pool not in gathered]
        if rest:
            self._learn_parts(rest)
        for pool in self._pools:
            (pool.noted or []).clear()  # the list stays: a second backward pass through a graph notes in it

    def _learn_whole(self, pool: Candidates, samples: Gathered) -> None:
        outputs, error = samples.rows.outputs(pool, pool.links.dtype, samples.half), samples.rows.error
        new, _ = batch_moments(outputs.detach(), self._scaled(error), pool.kind.dim)
        pool.missed.logical_or_((new.samples == 0).any())
        gradient = self._gradient(pool, new, pool.take_in(new), error, outputs)
        parameters = list(pool.parameters())
        # Apart from what the parameters have: that is of this process' part alone, and still to be added up.
        found = torch.autograd.grad(outputs, parameters, gradient, allow_unused=True)
        for parameter, own in zip(parameters, found, strict=True):
            if own is not None:
                self._whole[parameter] = self._whole[parameter] + own if parameter in self._whole else own

    def _learn_parts(self, pools: list[Candidates]) -> None:
        outputs, gradients = [], []
        seen = {pool: [(use.outputs(), error) for use, error in pool.noted or ()] for pool in pools}
        for pool, (used, new) in zip(pools, self._moments(seen), strict=True):
            self._in_parts[pool] = True
            sign = pool.take_in(new) if used else torch.zeros_like(new.covariance)
            for own, error in seen[pool]:
                outputs.append(own)
                gradient = torch.zeros_like(own) if error is None else self._gradient(pool, new, sign, error, own)
                gradients.append(gradient)
        if outputs:
            # Kept, for whoever runs backward through the same graph twice.
            torch.autograd.backward(outputs, gradients, retain_graph=True)

    @torch.no_grad()
    def _moments(self, seen: Mapping[Candidates, _Seen]) -> list[tuple[bool, Moments]]:
        # Of each pool, whether any process noted an error, and the moments over all processes.
        own = [self._sums(pool, uses) for pool, uses in seen.items()]
        flat = torch.cat(own)
        self._add_up(flat)
        parts = flat.split([part.numel() for part in own])
        used = torch.stack([part[0] for part in parts]).tolist()
        new = [self._unpack(pool, part[1:]) for pool, part in zip(seen, parts, strict=True)]
        return list(zip([anywhere > 0 for anywhere in used], new, strict=True))

    def _sums(self, pool: Candidates, uses: _Seen) -> Tensor:
        used, total = 0.0, Moments(*(torch.zeros_like(value, dtype=torch.float64) for value in pool.moments))
        for outputs, error in uses:
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
        return covariance_gradient(sign, centred, outputs.detach(), dim)

    @torch.no_grad()
    def add_up_gradients(self) -> None:
        """Give every process the sum of all gradients, before the candidates' optimizer steps.

        A parameter that had none in any process has none afterwards, so that an optimizer passes it over as ever.
        """
        parameters = [parameter for pool in self._pools if self._in_parts[pool] for parameter in pool.parameters()]
        if parameters:
            self._add_up_parts(parameters)
        for parameter, whole in self._whole.items():
            parameter.grad = whole if parameter.grad is None else parameter.grad + whole
        self._in_parts, self._whole = dict.fromkeys(self._pools, False), {}

    def _add_up_parts(self, parameters: list[nn.Parameter]) -> None:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = own[0].new_tensor([float(p.grad is not None) for p in parameters])
        flat = torch.cat([there, *(gradient.flatten() for gradient in own)])
        self._add_up(flat)
        anywhere = flat[: len(parameters)].tolist()
        parts = flat[len(parameters) :].split([p.numel() for p in parameters])
        for parameter, total, found in zip(parameters, parts, anywhere, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if found else None
