"""The candidates of one layer, and the statistics by which they compete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pl_dendrites.core.activations import ACTIVATIONS, UNBOUNDED
from pl_dendrites.core.kinds import Inputs, LayerKind, LinearConv, Sparse, inputs_of, weight_of
from pl_dendrites.core.rule.common_scale import CommonScale
from pl_dendrites.core.rule.correlation import covariance_gradient, pearson
from pl_dendrites.core.rule.inputs import InputSpread
from pl_dendrites.core.rule.moments import Moments, batch_moments, merge_moments, scaled_errors
from pl_dendrites.core.tensors import below_transforms, per_neuron

__all__ = ["Candidates"]

_SIGN_MOMENTUM = 0.95
# The covariance makes outputs ever larger, and past 65504 they would be infinite, and their statistics nothing.
_MOST_IN_HALF = 1e4


# Given to the rule: outputs of a pool and their error in, the gradient for the outputs out.
Observe = Callable[[Tensor, Tensor], Tensor | None]


class _Notes(Protocol):
    def watch(self, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> tuple[Tensor, Observe]: ...


@dataclass
class _Pass:
    # The last backward pass: PyTorch's number of it, the sign in it, samples in it, and in forward passes since.
    number: int = -1
    sign: Tensor = field(default_factory=lambda: torch.empty(0))
    samples: int = 0
    ahead: int = 0


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
        listening: whether the layer's uses are looked at: those of training, not those of a validation.
        watching: whether errors that come are taken in.
        copies: whether the pool must have a copy of the layer's input, which the model may change in place.
        loss_scale: what the loss was multiplied by before the backward pass; ``None``: nothing.
        epoch: how often statistics began anew.
        spread_of_inputs: how much each input varies, if anybody wants to know.
        common_scale: what makes a sample count the same in whatever batch it comes.
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
    running_covariance: Tensor
    reference: Tensor

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
        self.kind.begin_epoch(self.nodes)
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
        self.common_scale = CommonScale(device)
        self.listening = self.watching = True
        self.copies = False
        self.epoch = 0
        self.loss_scale: Tensor | None = None
        self.spread_of_inputs: InputSpread | None = None
        self._pass = _Pass()
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
        if total.dtype == torch.float16 and self.activation in UNBOUNDED:
            total = total.clamp(-_MOST_IN_HALF, _MOST_IN_HALF)
        return ACTIVATIONS[self.activation](total)

    def watched(self, inputs: Inputs, out: Tensor, dendrites: list[Tensor]) -> tuple[Tensor, Observe]:
        """What :class:`~pl_dendrites.core.rule.correlation.CorrelationRule` is to be given.

        Arguments are those of :meth:`forward`.

        Returns:
            The pool's outputs and :meth:`observe`; or, if errors are to be noted only, what notes them together with
            this use of the layer, and nothing that it needs.
        """
        if self.spread_of_inputs is not None and isinstance(self.kind, LinearConv):
            self.spread_of_inputs.add(below_transforms(self.kind.input_of(inputs, live=False)), self.kind.dim)
        if self.notes is not None:
            return self.notes.watch(inputs, out, dendrites)
        if torch._C._current_graph_task_id() < 0:  # else a forward pass is recomputed, for activation checkpointing
            self._pass.ahead += below_transforms(out).numel() // max(out.shape[self.kind.dim], 1)
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
        dim, scale = self.kind.dim, self.common_scale
        if not scale.looked:
            scale.see(*scale.look(error, dim))
        error, real = scale.samples_of(error, dim)
        new, centred = batch_moments(outputs, error, dim, real)
        if error.numel():  # an expert without tokens missed nothing
            self.missed.logical_or_((new.samples == 0).any() if real is None else ~new.mean_error.isfinite().all())
        samples = self._samples(error.numel() // max(error.shape[dim], 1)) if real is None else real.sum()
        return covariance_gradient(self._take_in(new, samples), centred, outputs, dim)

    def _samples(self, own: int) -> int:
        # Of all uses of the layer in this backward pass; those that a second pass through a graph has are its own.
        this, last = torch._C._current_graph_task_id(), self._pass
        if this < 0 or this != last.number:
            last.samples, last.ahead = last.ahead or own, 0
        return last.samples

    @torch.no_grad()
    def take_in(self, new: Moments, samples: int | Tensor) -> Tensor:
        """Take the moments of one batch into the statistics.

        Args:
            new: the moments.
            samples: in the batch, of all uses of the layer; a tensor where only the device knows.

        Returns:
            The sign ``(P, C)`` of the running average of the covariance, times what brings the batch's errors to the
            common scale. It stays one sign throughout a backward pass, however often that uses the layer.
        """
        return self._take_in(new, samples)

    def _take_in(self, new: Moments, samples: int | Tensor) -> Tensor:
        if self.loss_scale is not None:
            new = scaled_errors(new, 1 / self.loss_scale)
        so_far = self.moments
        factor = self.common_scale.factor(new, so_far, samples)
        new = scaled_errors(new, factor)
        merge_moments(so_far, new)
        average, covariance = self.running_covariance, new.covariance.nan_to_num(0.0, 0.0, 0.0)
        this, last = torch._C._current_graph_task_id(), self._pass
        if this >= 0 and this == last.number:
            average.add_(covariance, alpha=1 - _SIGN_MOMENTUM)  # all uses together are what the average moves towards
        else:
            average.lerp_(covariance, 1 - _SIGN_MOMENTUM)
            last.number, last.sign = this, average.sign()
        return last.sign if isinstance(factor, float) else last.sign * factor

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
        moments = self.moments
        return bool(((moments.square_error > 0) | (moments.mean_error != 0)).any())

    def missed_error(self) -> bool:
        """Whether the error of any neuron was not finite since this was last asked."""
        missed = bool(self.missed)
        self.missed.zero_()
        return missed

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; a state may be older than what came later."""
        since = {
            key: value
            for key, value in self.state_dict().items()
            if key.startswith(("common_scale.", "spread_of_inputs."))
        }
        return super().load_state_dict({**since, **state_dict}, strict, assign)

    def watch_inputs(self, layer: nn.Module) -> None:
        """From now on see how much each input varies, which :meth:`keep_strongest` wants to know.

        Args:
            layer: the layer; it is read, not kept.
        """
        self.spread_of_inputs = InputSpread(inputs_of(layer), self.links.device)

    @torch.no_grad()
    def keep_strongest(self, layer: nn.Module, fan_in: int) -> None:
        """From now on let each candidate see its strongest inputs alone: by weight times standard deviation.

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
        deviation = None if self.spread_of_inputs is None else self.spread_of_inputs.deviation()
        for place, values in enumerate(kind.strongest(nodes, self.pool, deviation)):
            kind.put(self.nodes, place, values)
        self.kind, self.fan_in, self.spread_of_inputs = kind, fan_in, None
        self.reset()
        self.reference.zero_()

    @torch.no_grad()
    def rose(self, min_delta: float) -> bool:
        """Whether the neurons' best correlations rose, in their mean, by a share of their references.

        The references then move up to them. A mean, for each neuron's best candidate may go on changing for ever
        between some that are about as good.

        Args:
            min_delta: the share.

        Returns:
            True if the mean of the best absolute correlations is above ``1 + min_delta`` times that of the references.
        """
        best = self.correlation().abs().amax(0)
        risen = best.mean() > self.reference.mean() * (1 + min_delta)
        self.reference.copy_(torch.where(risen, best, self.reference))
        return bool(risen)

    @torch.no_grad()
    def reset(self) -> None:
        """Start a new epoch of statistics. The running sign and the reference stay."""
        self.epoch += 1
        self.kind.begin_epoch(self.nodes)
        self.common_scale.looked = False
        for value in self.moments:
            value.zero_()
