"""The candidates of one layer, and the statistics by which they compete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.kinds import Inputs, LayerKind, Sparse, weight_of
from pl_dendrites.core.rule.correlation import covariance_gradient, pearson
from pl_dendrites.core.rule.moments import Moments, batch_moments, merge_moments
from pl_dendrites.core.tensors import per_neuron

__all__ = ["Candidates"]

_SIGN_MOMENTUM = 0.95


# Given to the rule: outputs of a pool and their error in, the gradient for the outputs out.
Observe = Callable[[Tensor, Tensor], Tensor | None]


class _Notes(Protocol):
    def watch(self, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> tuple[Tensor, Observe]: ...


class Candidates(nn.Module):
    """A pool of candidates for the next dendrite of every neuron of one layer.

    Args:
        layer: the layer; it is read, not kept.
        kind: the view that its dendrites have of it.
        pool: candidates per neuron, ``P``.
        below: dendrites per neuron that there are, ``k``, whose outputs the candidates see.
        activation: name of what candidates do with their sum.
        generator: for the initial weights, see :meth:`~pl_dendrites.core.kinds.LayerKind.initialise`.

    Attributes:
        nodes: ``P`` nodes for every neuron, as the layer's kind has them.
        fan_in: inputs that each of them sees; ``None``: all.
        links: shape ``(P, k, C)``, weights from the neuron's earlier dendrites.
        pool: ``P``.
        watching: whether errors that come are taken in.
        copies: whether the pool must have a copy of the layer's input, which the model may change in place.
        notes: where uses of the layer and their errors are noted, to be taken in later by
            :class:`~pl_dendrites.core.rule.processes.JointLearning`; ``None``: the backward pass itself takes them in.

    Raises:
        RuntimeError: if the layer's neurons are not known yet.

    Example:
        >>> from pl_dendrites.core.kinds import LinearConv
        >>> layer = nn.Conv2d(3, 8, 3)
        >>> pool = Candidates(layer, LinearConv(layer), pool=4)
        >>> x = torch.randn(2, 3, 9, 9)
        >>> pool(Inputs((x,), {}), layer(x), []).shape
        torch.Size([4, 2, 8, 7, 7])
    """

    missed: Tensor

    def __init__(
        self,
        layer: nn.Module,
        kind: LayerKind,
        pool: int,
        *,
        below: int = 0,
        activation: str = "tanh",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.activation, self.pool = kind, activation, pool
        self.fan_in: int | None = None
        neurons = self.kind.neurons
        if neurons is None:
            raise RuntimeError("the neurons of the layer are not known before its first forward pass")
        self.nodes = self.kind.node_set(layer, pool).train()
        self.kind.initialise(self.nodes, generator)
        reference = weight_of(layer)
        device = reference.device
        self.links = nn.Parameter(torch.zeros(pool, below, neurons, device=device, dtype=reference.dtype))
        wide = torch.promote_types(reference.dtype, torch.float32)
        for name in Moments._fields:
            shape = (neurons,) if name in ("samples", "mean_error", "square_error") else (pool, neurons)
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=wide))
        self.register_buffer("running_covariance", torch.zeros(pool, neurons, device=device, dtype=wide))
        self.register_buffer("reference", torch.zeros(neurons, device=device, dtype=wide))
        self.register_buffer("missed", torch.tensor(False, device=device), persistent=False)
        self.watching = True
        self.copies = False
        self.notes: _Notes | None = None

    def forward(self, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> Tensor:
        """Outputs of the pool.

        Args:
            inputs: what the layer was called with.
            out: the layer's output, whose shape alone matters.
            dendrites: outputs of the ``k`` dendrites there are, each ``(*, C, *)``.

        Returns:
            Shape ``(P, *, C, *)``.
        """
        dim = self.kind.dim
        total = self.kind.potentials(self.nodes, self.pool, inputs, out)
        for j, output in enumerate(dendrites):
            link = per_neuron(self.links[:, j], dim, output.ndim).to(total.dtype)
            total = torch.addcmul(total, link, output.to(total.dtype))
        return ACTIVATIONS[self.activation](total)

    def watched(self, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> tuple[Tensor, Observe]:
        """What :class:`~pl_dendrites.core.rule.correlation.CorrelationRule` is to be given.

        Arguments are those of :meth:`forward`.

        Returns:
            The pool's outputs and :meth:`observe`; or, if errors are to be noted only, what notes them together with
            this use of the layer, and nothing that it needs.
        """
        if self.notes is not None:
            return self.notes.watch(inputs, out, dendrites)
        return self(inputs, out, dendrites), self.observe

    @torch.no_grad()
    def observe(self, outputs: Tensor, error: Tensor) -> Tensor:
        """Take one batch into the statistics.

        Args:
            outputs: outputs of the pool, ``(P, *, C, *)``.
            error: gradient of the loss with respect to the layer's output, ``(*, C, *)``.

        Returns:
            The gradient of minus the covariance with respect to ``outputs``. Its sign is that of a running average of
            the covariance (momentum 0.95), not that of one batch.
        """
        if not self.watching:
            return torch.zeros_like(outputs)
        new, centred = batch_moments(outputs, error, self.kind.dim)
        if error.numel():  # an expert without tokens missed nothing
            self.missed.logical_or_((new.samples == 0).any())
        return covariance_gradient(self.take_in(new), centred, outputs, self.kind.dim)

    @torch.no_grad()
    def take_in(self, new: Moments) -> Tensor:
        """Take the moments of one batch into the statistics.

        Args:
            new: the moments.

        Returns:
            The sign ``(P, C)`` of the running average of the covariance.
        """
        merge_moments(self.moments, new)
        average = self.running_covariance
        assert isinstance(average, Tensor)
        average.lerp_(new.covariance.nan_to_num(0.0, 0.0, 0.0), 1 - _SIGN_MOMENTUM)
        return average.sign()

    @property
    def moments(self) -> Moments:
        """Statistics since the last :meth:`reset`."""
        return Moments(*(getattr(self, name) for name in Moments._fields))

    def correlation(self) -> Tensor:
        """Pearson correlation of each candidate with its neuron's error since the last reset, ``(P, C)``."""
        return pearson(self.moments)

    def spread(self) -> Tensor:
        """Standard deviation of each candidate's outputs since the last reset, ``(P, C)``; 0 where there is none."""
        moments = self.moments
        return torch.nan_to_num((moments.square_output / moments.samples).sqrt(), nan=0.0, posinf=0.0)

    def saw_error(self) -> bool:
        """Whether any neuron of the layer had an error since the last reset: false if the layer is not used."""
        return bool((self.moments.square_error > 0).any())

    def missed_error(self) -> bool:
        """Whether the error of any neuron was not finite since this was last asked."""
        missed = bool(self.missed)
        self.missed.zero_()
        return missed

    @torch.no_grad()
    def keep_strongest(self, layer: nn.Module, fan_in: int) -> None:
        """From now on let each candidate see its strongest inputs alone, those with the largest weights.

        Statistics begin anew; the running sign of the covariance stays.

        Args:
            layer: the layer; it is read, not kept.
            fan_in: how many inputs.

        Raises:
            ValueError: if the layer's dendrites cannot be sparse.
            RuntimeError: if the candidates see a part of the inputs already.
        """
        if self.fan_in is not None:
            raise RuntimeError(f"the candidates see {self.fan_in} inputs each already")
        kind, nodes = Sparse(layer, fan_in), self.nodes
        self.nodes = kind.node_set(layer, self.pool).train()
        for place, values in enumerate(kind.strongest(nodes, self.pool)):
            kind.put(self.nodes, place, values)
        self.kind, self.fan_in = kind, fan_in
        self.reset()
        self.get_buffer("reference").zero_()

    @torch.no_grad()
    def rose(self, min_delta: float) -> bool:
        """Whether the best correlation of any neuron rose by a share of its reference, which then moves up to it.

        Args:
            min_delta: the share.

        Returns:
            True if a neuron's best absolute correlation is above ``(1 + min_delta)`` times its reference.
        """
        best = self.correlation().abs().amax(0)
        reference = self.reference
        assert isinstance(reference, Tensor)
        risen = best > reference * (1 + min_delta)
        reference.copy_(torch.where(risen, best, reference))
        return bool(risen.any())

    @torch.no_grad()
    def reset(self) -> None:
        """Start a new epoch of statistics. The running sign and the reference stay."""
        for value in self.moments:
            value.zero_()
