"""Candidates that learn from the samples of several processes as if one process had them all.

Three steps, all after the backward pass: what it showed was noted (:class:`Use`), processes hand each other samples
where that is cheap (:func:`gather_rows`), and candidates learn (:class:`JointLearning`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pl_dendrites.core.kinds import Inputs
from pl_dendrites.core.rule.candidates import Candidates
from pl_dendrites.core.rule.common_scale import CommonScale
from pl_dendrites.core.rule.correlation import covariance_gradient
from pl_dendrites.core.rule.moments import Moments, Sums, batch_moments
from pl_dendrites.core.tensors import flat_nested, is_transformed, per_neuron

__all__ = ["Gathered", "JointLearning", "Rows", "Use", "gather_rows"]

_HALF = (None, torch.float16, torch.bfloat16)
_Seen = list[tuple[Tensor, Tensor | None]]  # outputs of a pool and their error, for each use of the layer


# -- what a forward pass leaves --------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """All that the candidates of a Linear layer learn from, a row for each sample.

    Attributes:
        inputs: shape ``(samples, n)``.
        dendrites: shape ``(samples, k, C)``, outputs of the dendrites there are.
        error: shape ``(samples, C)``.
    """

    inputs: Tensor
    dendrites: Tensor
    error: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Rows:
        """All rows, one part after another."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def outputs(self, pool: Candidates, dtype: torch.dtype, half: torch.dtype | None) -> Tensor:
        """Outputs of a pool, shape ``(P, samples, C)``.

        Args:
            pool: the candidates.
            dtype: of their weights.
            half: what autocast has them compute in, if it does.
        """
        x, dendrites = (value.to(dtype) for value in (self.inputs, self.dendrites))
        return _compute(pool, Inputs((x,), {}), self.error, list(dendrites.unbind(1)), half)


class Use:
    """One use of a layer in a forward pass.

    Args:
        pool: its candidates; they compute later, if they can wait.
        inputs: what the layer was called with.
        out: the layer's output, whose shape alone matters.
        dendrites: outputs of the ``k`` dendrites there are.

    Attributes:
        half: what autocast has the candidates compute in, if it does.
    """

    def __init__(self, pool: Candidates, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> None:
        device = out.device.type
        self.half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._pool, self._seen = pool, (inputs, out.detach(), dendrites)
        self._outputs = None if can_wait(pool) else pool(*self._seen)

    def outputs(self) -> Tensor:
        """Outputs of the pool."""
        return _compute(self._pool, *self._seen, self.half) if self._outputs is None else self._outputs

    def rows(self, error: Tensor) -> Rows | None:
        """What candidates that wait learn from, of a Linear layer; ``None`` if it was called in a way of its own.

        Args:
            error: gradient of the loss with respect to the layer's output.
        """
        inputs, _, dendrites = self._seen
        if not inputs.args:
            return None
        x = inputs.args[0].detach()
        x = flat_nested(x) if x.is_nested else x
        neurons = error.shape[-1]
        samples, below = error.numel() // neurons, (len(dendrites), neurons)
        stacked = torch.stack(dendrites, -2) if dendrites else error.new_empty(samples, *below)
        return Rows(x.reshape(samples, x.shape[-1]), stacked.reshape(samples, *below), error.reshape(samples, neurons))


class Shown:
    """One use of a layer under transforms of ``torch.func``, which the rule alone can see through.

    Args:
        outputs: outputs of the pool, below all transforms.
    """

    half = None

    def __init__(self, outputs: Tensor) -> None:
        self._outputs = outputs

    def outputs(self) -> Tensor:
        """Outputs of the pool."""
        return self._outputs

    def rows(self, error: Tensor) -> Rows | None:
        """Nothing that could be gathered."""
        return None


def can_wait(pool: Candidates) -> bool:
    """Whether candidates can compute after the backward pass, with samples of other processes beside their own.

    Those of a Linear layer can. Any other may have a state, or random numbers.
    """
    return type(pool.nodes) is nn.Linear


class Notes:
    """Uses of one layer and their errors that the candidates have yet to take in.

    Args:
        pool: the candidates.

    Attributes:
        uses: of the last backward pass, each with its error; ``None`` for one that was not watched.
    """

    def __init__(self, pool: Candidates) -> None:
        self.uses: list[tuple[Use | Shown, Tensor | None]] = []
        self._pool = pool

    def watch(
        self, inputs: Inputs, out: Tensor, dendrites: list[Tensor]
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
        """See :meth:`~pl_dendrites.core.rule.candidates.Candidates.watched`: nothing is needed, errors are noted."""
        if is_transformed():
            # What the layer was called with stands for other tensors, and is nothing any more when the transform ends.
            def note_outputs(outputs: Tensor, error: Tensor) -> None:
                self.uses.append((Shown(outputs), error if self._pool.watching else None))

            return self._pool(inputs, out, dendrites), note_outputs

        use = Use(self._pool, inputs, out, dendrites)

        def note(_: Tensor, error: Tensor) -> None:
            self.uses.append((use, error.detach() if self._pool.watching else None))

        return out.new_zeros(()).requires_grad_(), note


@torch.enable_grad()
def _compute(pool: Candidates, inputs: Inputs, out: Tensor, seen: list[Tensor], half: torch.dtype | None) -> Tensor:
    with torch.autocast(out.device.type, half, enabled=half is not None):
        outputs: Tensor = pool(inputs, out, seen)
    return outputs


# -- what processes hand each other ----------------------------------------------------------------------------------


class Gathered(NamedTuple):
    """What the candidates of a layer learn from in all processes.

    Attributes:
        rows: the samples, in the order of the processes.
        half: what autocast has the candidates compute in, if it does.
    """

    rows: Rows
    half: torch.dtype | None


@torch.no_grad()
def gather_rows(notes: Mapping[Candidates, Notes], gather: Callable[[Tensor], Tensor]) -> dict[Candidates, Gathered]:
    r"""Gather the samples of those layers where that communicates no more than a base step does.

    A base step adds up the gradients of a layer's ``W`` weights; those of a pool would be ``P W``. Over a ring each of
    ``R`` processes then sends :math:`2 (R - 1) / R` times as many numbers, and ``R - 1`` times its own part where parts
    are gathered. So samples are no dearer as long as all their numbers, of all processes, are at most ``2 W``. Each
    process then computes with all of them: where they are more, that too would be dear.

    Args:
        notes: by their candidates, those of all layers in the same order in every process.
        gather: the tensors of all processes, stacked, given that of this one; they are of one shape.

    Returns:
        What was gathered. Layers that the batch did not reach are not among it.
    """
    pools = [pool for pool in notes if can_wait(pool)]
    if not pools:
        return {}
    own = {pool: _rows(pool, notes[pool]) for pool in pools}
    counts = gather(
        torch.tensor([_count(notes[pool], own[pool]) for pool in pools], device=pools[0].links.device)
    ).tolist()
    samples = {pool: [int(count[i][0]) for count in counts] for i, pool in enumerate(pools)}
    chosen = {pool: own[pool] for pool in pools if _pays(pool, samples[pool])}
    if not chosen:
        return {}
    parts = _exchange(chosen, samples, gather)
    halves = {pool: _HALF[max(int(count[i][1]) for count in counts)] for i, pool in enumerate(pools)}
    return {pool: Gathered(rows, halves[pool]) for pool, rows in parts.items()}


def _rows(pool: Candidates, notes: Notes) -> Rows | None:
    parts = [use.rows(error) for use, error in notes.uses if error is not None]
    nothing = Rows(*(pool.moments.samples.new_empty(0, *width) for width in _widths(pool)))
    known = [part for part in parts if part is not None]
    return Rows.joined([nothing, *known]) if len(known) == len(parts) else None


def _count(notes: Notes, rows: Rows | None) -> tuple[int, int]:
    # Samples, and what autocast has the pool compute in: a process without samples has to know.
    half = max((_HALF.index(use.half) for use, _ in notes.uses), default=0)
    return (-1 if rows is None else len(rows.error)), half


def _pays(pool: Candidates, samples: list[int]) -> bool:
    if min(samples) < 0:
        return False
    weights = sum(parameter.nbytes for parameter in pool.parameters()) / pool.pool
    return 0 < len(samples) * max(samples) * _row_size(pool) * pool.moments.samples.itemsize <= 2 * weights


def _widths(pool: Candidates) -> list[tuple[int, ...]]:
    # Shapes of one row of inputs, outputs of dendrites, and errors.
    assert isinstance(pool.nodes, nn.Linear)
    _, dendrites, neurons = pool.links.shape
    return [(pool.nodes.in_features,), (dendrites, neurons), (neurons,)]


def _row_size(pool: Candidates) -> int:
    return sum(map(math.prod, _widths(pool)))


def _exchange(
    own: Mapping[Candidates, Rows | None], samples: Mapping[Candidates, list[int]], gather: Callable[[Tensor], Tensor]
) -> dict[Candidates, Rows]:
    # One tensor of everything, as long in all processes.
    pools, processes = list(own), range(len(next(iter(samples.values()))))
    sizes = [[samples[pool][rank] * _row_size(pool) for pool in pools] for rank in processes]
    flat = torch.cat([value.flatten() for rows in own.values() if rows is not None for value in rows])
    length = max(map(sum, sizes))
    found = gather(torch.nn.functional.pad(flat, (0, length - len(flat))))
    parts: dict[Candidates, list[Rows]] = {pool: [] for pool in pools}
    for rank, size in enumerate(sizes):
        for pool, part in zip(pools, found[rank, : sum(size)].split(size), strict=True):
            widths = _widths(pool)
            shapes = [(samples[pool][rank], *width) for width in widths]
            values = part.split([math.prod(shape) for shape in shapes])
            parts[pool].append(Rows(*(value.view(shape) for value, shape in zip(values, shapes, strict=True))))
    return {pool: Rows.joined(rows) for pool, rows in parts.items()}


# -- learning --------------------------------------------------------------------------------------------------------


class JointLearning:
    r"""Lets the candidates of several processes, each with its part of a batch, learn from the whole batch.

    The rule needs two figures of the whole batch before a candidate has its gradient: the neuron's mean error and the
    sign of the running covariance. A gradient with another mean could be put right afterwards only by a second one,
    that of :math:`\sum_p D_p`, which would double the work and what is communicated. So a backward pass only notes
    outputs and errors. After it, :meth:`learn` adds up a few sums per neuron over all processes and then computes the
    gradients. Nothing is communicated within a backward pass: a process whose part never reached a layer adds zeros.

    Where it communicates no more than a base step does, see :func:`gather_rows`, every
    process gets the samples of all instead, and computes the gradients of the whole batch by itself.

    Several uses of a layer in one backward pass count as one batch.

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
        self._epochs: dict[Candidates, int] = {}  # in which each pool was looked at
        self._notes = {pool: Notes(pool) for pool in self._pools}
        for pool, notes in self._notes.items():
            pool.notes = notes
            if pool.spread_of_inputs is not None:
                pool.spread_of_inputs.wait()

    def learn(self) -> None:
        """Take in what the last backward pass noted, in all processes, and give the candidates their gradients."""
        self._look()
        self._learn_inputs()
        gathered = {} if self._gather is None else gather_rows(self._notes, self._gather)
        for pool, samples in gathered.items():
            self._learn_whole(pool, samples)
        rest = [pool for pool in self._pools if pool not in gathered]
        if rest:
            self._learn_parts(rest)
        for notes in self._notes.values():
            notes.uses.clear()  # the list stays: a second backward pass through a graph notes in it

    def _look(self) -> None:
        # At each epoch's first batch alone: what is multiplied and what is left out is the same in all processes.
        scales = {pool: pool.common_scale for pool in self._pools if pool.epoch != self._epochs.get(pool)}
        self._epochs.update({pool: pool.epoch for pool in scales})
        if not scales:
            return
        rows = [self._looks(pool) for pool in scales]
        flat = torch.tensor(rows, dtype=torch.float64, device=self._pools[0].links.device).flatten()
        self._add_up(flat)
        for scale, (largest, empty) in zip(scales.values(), flat.view(-1, 2).tolist(), strict=True):
            scale.see(largest, float(not empty))

    def _looks(self, pool: Candidates) -> tuple[float, float]:
        # The largest error, and whether there are positions without any.
        seen = [CommonScale.look(e, pool.kind.dim) for _, e in self._notes[pool].uses if e is not None and e.numel()]
        largest = max((size for size, _ in seen), default=0.0)
        return largest, float(largest > 0 and any(least == 0 for _, least in seen))

    def _learn_inputs(self) -> None:
        spreads = [pool.spread_of_inputs for pool in self._pools if pool.spread_of_inputs is not None]
        waiting = [spread.waiting for spread in spreads if spread.waiting is not None]
        if waiting:
            flat = torch.cat(waiting)
            self._add_up(flat)
            for spread, sums in zip(spreads, flat.split([len(own) for own in waiting]), strict=True):
                spread.take_in(sums)

    def _learn_whole(self, pool: Candidates, samples: Gathered) -> None:
        outputs, error = samples.rows.outputs(pool, pool.links.dtype, samples.half), samples.rows.error
        scaled, real = self._samples(pool, error)
        new, _ = batch_moments(outputs.detach(), scaled, pool.kind.dim, real)
        pool.missed.logical_or_(~new.mean_error.isfinite().all())
        sign = pool.take_in(new, len(error) if real is None else real.sum())
        gradient = self._gradient(pool, new, sign, error, outputs)
        parameters = list(pool.parameters())
        # Apart from what the parameters have: that is of this process' part alone, and still to be added up.
        found = torch.autograd.grad(outputs, parameters, gradient, allow_unused=True)
        for parameter, own in zip(parameters, found, strict=True):
            if own is not None:
                self._whole[parameter] = self._whole[parameter] + own if parameter in self._whole else own

    def _learn_parts(self, pools: list[Candidates]) -> None:
        outputs, gradients = [], []
        seen = {pool: [(use.outputs(), error) for use, error in self._notes[pool].uses] for pool in pools}
        for pool, (used, samples, new) in zip(pools, self._moments(seen), strict=True):
            self._in_parts[pool] = True
            sign = pool.take_in(new, samples) if used else torch.zeros_like(new.covariance)
            for own, error in seen[pool]:
                outputs.append(own)
                gradient = torch.zeros_like(own) if error is None else self._gradient(pool, new, sign, error, own)
                gradients.append(gradient)
        if outputs:
            # Kept, for whoever runs backward through the same graph twice.
            torch.autograd.backward(outputs, gradients, retain_graph=True)

    @torch.no_grad()
    def _moments(self, seen: Mapping[Candidates, _Seen]) -> list[tuple[bool, int, Moments]]:
        # Of each pool, whether any process noted an error, and samples and moments over all processes.
        own = [self._sums(pool, uses) for pool, uses in seen.items()]
        flat = torch.cat(own)
        self._add_up(flat)
        parts = flat.split([part.numel() for part in own])
        counted = torch.stack([part[:2] for part in parts]).tolist()
        new = [self._unpack(pool, part[2:]) for pool, part in zip(seen, parts, strict=True)]
        return [(used > 0, int(size), moments) for (used, size), moments in zip(counted, new, strict=True)]

    def _sums(self, pool: Candidates, uses: _Seen) -> Tensor:
        total = Sums.nothing(pool.moments)
        counted = total.samples.new_zeros(2)
        for outputs, error in uses:
            if error is not None:
                scaled, real = self._samples(pool, error)
                size = error.numel() // max(error.shape[pool.kind.dim], 1) if real is None else real.sum()
                counted += torch.stack([counted.new_ones(()), torch.as_tensor(size, device=counted.device)])
                moments, _ = batch_moments(outputs, scaled, pool.kind.dim, real)
                sums = Sums.of(moments)
                if error.numel():
                    # One error that is not finite spoils the batch for a neuron, in whichever process it is. Unlike a
                    # zero, NaN is still seen in a sum.
                    finite = moments.mean_error.isfinite()
                    sums = sums._replace(samples=torch.where(finite, sums.samples, torch.nan))
                total = total.plus(sums)
        return torch.cat([counted, *(value.flatten() for value in total)])

    def _samples(self, pool: Candidates, error: Tensor) -> tuple[Tensor, Tensor | None]:
        error, real = pool.common_scale.samples_of(error, pool.kind.dim)
        return error.to(torch.promote_types(error.dtype, torch.float32)) * self._share, real

    def _unpack(self, pool: Candidates, flat: Tensor) -> Moments:
        own = pool.moments
        parts = flat.split([value.numel() for value in own])
        sums = Sums(*(part.view_as(value) for part, value in zip(parts, own, strict=True)))
        pool.missed.logical_or_(sums.samples.isnan().any())
        return Moments(*(new.to(value.dtype) for new, value in zip(sums.moments(), own, strict=True)))

    def _gradient(self, pool: Candidates, new: Moments, sign: Tensor, error: Tensor, outputs: Tensor) -> Tensor:
        dim, ndim = pool.kind.dim, error.ndim
        scaled, real = self._samples(pool, error)
        centred = scaled - per_neuron(new.mean_error, dim, ndim)
        centred = torch.where(per_neuron(new.samples > 0, dim, ndim), centred, 0)
        return covariance_gradient(sign, centred if real is None else centred * real, outputs.detach(), dim)

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

    def gradients(self) -> list[Tensor | None]:
        """Of each parameter what waits for a step, of all processes together. All must call this."""
        parts = [parameter for pool in self._pools if self._in_parts[pool] for parameter in pool.parameters()]
        if parts:
            self._add_up_parts(parts)
        for parameter in parts:
            own, parameter.grad = parameter.grad, None
            if own is not None:
                self._whole[parameter] = self._whole[parameter] + own if parameter in self._whole else own
        self._in_parts = dict.fromkeys(self._pools, False)
        return [self._whole.get(parameter) for pool in self._pools for parameter in pool.parameters()]

    def load_gradients(self, saved: Sequence[Tensor | None]) -> None:
        """Go on from :meth:`gradients`; from nothing, if there were none."""
        parameters = [parameter for pool in self._pools for parameter in pool.parameters()]
        pairs = zip(parameters, saved, strict=True) if saved else ()
        self._whole = {p: g.to(p.device, p.dtype, copy=True) for p, g in pairs if g is not None}

    def _add_up_parts(self, parameters: list[nn.Parameter]) -> None:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        there = own[0].new_tensor([float(p.grad is not None) for p in parameters])
        flat = torch.cat([there, *(gradient.flatten() for gradient in own)])
        self._add_up(flat)
        anywhere = flat[: len(parameters)].tolist()
        parts = flat[len(parameters) :].split([p.numel() for p in parameters])
        for parameter, total, found in zip(parameters, parts, anywhere, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if found else None
