"""The dendrites and the candidates of one layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.functional import (
    ACTIVATIONS,
    CorrelationRule,
    Moments,
    batch_moments,
    cascade,
    covariance_gradient,
    local,
    merge_moments,
    pearson,
    per_neuron,
)
from pl_dendrites.core.kinds import Inputs, weight_of
from pl_dendrites.core.layers import kind_of

__all__ = ["Candidates", "Dendrites", "add_dendrites", "resume_state"]

_SIGN_MOMENTUM = 0.95


class Dendrites(nn.Module):
    r"""The dendrites of one layer, hung on it as its submodule ``dendrites``.

    .. math:: d_{j,c} = f\Big(V_{j,c} \cdot x + v_{j,c} + \sum_{i<j} u_{j,i,c}\, d_{i,c}\Big), \qquad
              out_c = W_c \cdot x + b_c + \sum_j a_{j,c}\, d_{j,c}

    (arXiv:2501.18018). ``V`` and ``v`` are one module, ``nodes``: of a Linear or convolution a layer of the same type
    with ``k * C`` outputs, of any other layer ``k`` copies, whose output then stands for :math:`V \cdot x + v`. ``u``
    is the parameter ``links`` of shape ``(k (k - 1) / 2, C)``. Both are frozen, and no gradient flows through a
    dendrite into its input, unless the dendrites are live. ``a`` is trained with the network: ``weights``, a list of
    ``k`` parameters of shape ``(C,)``, one for each dendrite, so that an optimizer's state of an older dendrite
    outlives the arrival of a newer one. Without dendrites the module has no entry in a state_dict, and the layer's own
    entries never change.

    Args:
        layer: the layer that the dendrites belong to; it is read, not kept.
        activation: name of :math:`f`, a key of ``ACTIVATIONS``.

    Attributes:
        kind: where the layer's neurons are, and what its nodes look like.
        live: whether the dendrites learn with the network: gradient then flows into all their parameters and through
            them into the layer's input. See :meth:`set_live`.
        called: whether the layer ever ran since it was attached.
        activation: name of :math:`f`.
        candidates: the pool in training, or ``None``. It is no part of the module tree.

    Example:
        >>> layer = nn.Linear(5, 3)
        >>> dendrites = Dendrites(layer)
        >>> dendrites.resize(layer, 2)
        >>> [(name, tuple(p.shape)) for name, p in dendrites.named_parameters()]
        [('links', (1, 3)), ('nodes.weight', (6, 5)), ('nodes.bias', (6,)), ('weights.0', (3,)), ('weights.1', (3,))]
    """

    nodes: nn.Module | None
    links: nn.Parameter | None
    candidates: Candidates | None

    def __init__(self, layer: nn.Module, activation: str = "tanh") -> None:
        super().__init__()
        self.kind = kind_of(layer)
        self.activation = activation
        self.live = self.called = False
        self.register_module("nodes", None)
        self.register_parameter("links", None)
        self.weights = nn.ParameterList()
        self.register_buffer("activation_code", None)
        self.set_candidates(None)

    @property
    def count(self) -> int:
        """Dendrites per neuron, ``k``."""
        return len(self.weights)

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along: not the candidates, for a copy of the model is a model."""
        return {**self.__dict__, "candidates": None}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.count} per neuron, {self.activation}"

    def train(self, mode: bool = True) -> Dendrites:
        """Set the mode of the network; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.nodes is not None and not self.live:
            self.nodes.eval()
        return self

    def set_live(self, live: bool) -> None:
        """Let the dendrites learn with the network, or freeze them.

        Args:
            live: which of the two.
        """
        self.live = live
        if self.nodes is not None and self.links is not None:
            self.nodes.requires_grad_(live).train(live and self.training)
            # Of one dendrite there are no links, and a parameter that gets no gradient is an error under DDP.
            self.links.requires_grad_(live and self.links.numel() > 0)

    def forward(self, inputs: Any, *returned: Any) -> Any:
        """Add the dendrites' signal to a layer's output and let the candidates watch the error.

        Args:
            inputs: what the layer was called with.
            *returned: what it returned. A container that calls its submodules in turn, as ``nn.Sequential`` does, calls
                this one too, with no more than the output of the one before, and gets that back.

        Returns:
            The same with the output that the next layer sees, ``(*, C, *)``, in the place of the layer's own.
        """
        if not returned:
            return inputs
        (out,) = returned
        own = self.kind.output(out)
        if not self.called:
            self.called = True
        # Without gradients nothing is learned: validation, and the first pass of a reentrant activation checkpoint.
        candidates = self.candidates if torch.is_grad_enabled() else None
        if self.nodes is None and candidates is None:
            return out
        outputs, dim, total = self._outputs(inputs, own), self.kind.dim, own
        for weight, output in zip(self.weights, outputs, strict=True):
            signal = per_neuron(local(weight), dim, total.ndim).to(total.dtype)
            total = torch.addcmul(total, signal, output.to(total.dtype))
        if candidates is not None:
            seen = [output.detach() for output in outputs]
            watched, observe = candidates.watched(candidates(inputs, total, seen))
            total = CorrelationRule.apply(total, watched, observe)  # type: ignore[no-untyped-call]
        return self.kind.with_output(out, total)

    def _outputs(self, inputs: Inputs, out: Tensor) -> list[Tensor]:
        if self.nodes is None or self.links is None:
            return []
        with nullcontext() if self.live else torch.no_grad():
            potentials = self.kind.potentials(self.nodes, self.count, inputs, out, self.live)
            return cascade(potentials.unbind(0), self.links, ACTIVATIONS[self.activation], self.kind.dim)

    @torch.no_grad()
    def resize(self, layer: nn.Module, count: int) -> None:
        """Make room for ``count`` dendrites per neuron; the first of those that were there keep their values.

        New ones have undefined ``nodes``, zero ``links`` and zero ``weights``: they change no output until they are
        filled in and trained. Parameters of the output weights of dendrites that stay keep their identity.

        Args:
            layer: the layer that the dendrites belong to.
            count: dendrites per neuron afterwards.
        """
        have, keep = self.count, min(self.count, count)
        if count == have:
            return
        old_nodes, old_links = self.nodes, self.links
        self.weights = self.weights[:keep].train(self.training)
        if count == 0:
            self.nodes, self.links, self.activation_code = None, None, None
            return
        neurons = self.kind.neurons
        assert neurons is not None
        reference = weight_of(layer)
        place: dict[str, Any] = {"device": reference.device, "dtype": reference.dtype}
        self.nodes = self.kind.node_set(layer, count)
        links = torch.zeros(count * (count - 1) // 2, neurons, **place)
        if keep:
            assert old_nodes is not None
            assert old_links is not None
            for j in range(keep):
                self.kind.put(self.nodes, j, old_nodes, j)
            kept = keep * (keep - 1) // 2
            links[:kept] = old_links[:kept]
        self.links = nn.Parameter(links)
        self.set_live(self.live)
        for _ in range(keep, count):
            self.weights.append(nn.Parameter(torch.zeros(neurons, **place)))
        self.activation_code = torch.tensor(list(ACTIVATIONS).index(self.activation), device=reference.device)

    def grow(self, layer: nn.Module, generator: torch.Generator | None = None) -> None:
        """Give every neuron one more dendrite, drawn anew, whose output weight starts at zero.

        Args:
            layer: the layer that the dendrites belong to.
            generator: see :meth:`~pl_dendrites.core.kinds.LayerKind.initialise`.
        """
        nodes = self.kind.node_set(layer, 1)
        self.kind.initialise(nodes, generator)
        have = self.count
        self.resize(layer, have + 1)
        assert self.nodes is not None
        self.kind.put(self.nodes, have, nodes, 0)

    @torch.no_grad()
    def integrate(self, layer: nn.Module) -> Tensor:
        """Make the best candidate of every neuron its next dendrite and let the pool go.

        The best is the one with the largest absolute Pearson correlation over the running statistics; where the layer's
        neurons share their nodes, all take the one with the largest mean. Its output weight starts at zero, so that the
        network's output does not change, but for the rounding of a larger matrix product where there were dendrites
        before.

        Args:
            layer: the layer that the dendrites belong to.

        Returns:
            Shape ``(C,)``: the correlation of the candidate that each neuron took.

        Raises:
            RuntimeError: if there are no candidates.
        """
        pool = self.candidates
        if pool is None:
            raise RuntimeError("there are no candidates to integrate: call start_candidates first")
        correlation = pool.correlation()
        best = self.kind.best(correlation)
        neurons = torch.arange(len(best), device=best.device)
        have = self.count
        self.resize(layer, have + 1)
        assert self.nodes is not None
        assert self.links is not None
        self.kind.put(self.nodes, have, pool.nodes, best)
        if have:
            self.links[-have:] = pool.links[best, :, neurons].T
        self.set_candidates(None)
        return correlation[best, neurons]

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a base phase trains: the output weights, and of live dendrites all else."""
        inner = [] if not self.live or self.nodes is None else [*self.nodes.parameters(), self.links]
        return [*self.weights, *(parameter for parameter in inner if parameter is not None and parameter.numel())]

    def set_candidates(self, candidates: Candidates | None) -> None:
        """Put a pool in place, or take it away (``None``)."""
        # Past nn.Module.__setattr__, which would make them part of the model: its parameters, checkpoints, averages.
        self.__dict__["candidates"] = candidates


class Candidates(nn.Module):
    """A pool of candidates for the next dendrite of every neuron of one layer.

    Args:
        layer: the layer; it is read, not kept.
        dendrites: its present dendrites, whose outputs the candidates see.
        pool: candidates per neuron, ``P``.
        generator: for the initial weights, see :meth:`~pl_dendrites.core.kinds.LayerKind.initialise`.

    Attributes:
        nodes: ``P`` nodes for every neuron, as the layer's kind has them.
        links: shape ``(P, k, C)``, weights from the neuron's earlier dendrites.
        pool: ``P``.
        watching: whether errors that come are taken in.
        noted: outputs and errors that a :class:`~pl_dendrites.core.joint.JointLearning` has yet to take in, ``None``
            for an error that was not watched; ``None``: they are taken in by the backward pass itself.

    Raises:
        RuntimeError: if the layer's neurons are not known yet.

    Example:
        >>> layer = nn.Conv2d(3, 8, 3)
        >>> pool = Candidates(layer, Dendrites(layer), pool=4)
        >>> x = torch.randn(2, 3, 9, 9)
        >>> pool(Inputs((x,), {}), layer(x), []).shape
        torch.Size([4, 2, 8, 7, 7])
    """

    missed: Tensor

    def __init__(
        self, layer: nn.Module, dendrites: Dendrites, pool: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.kind, self.activation, self.pool = dendrites.kind, dendrites.activation, pool
        neurons = self.kind.neurons
        if neurons is None:
            raise RuntimeError("the neurons of the layer are not known before its first forward pass")
        self.nodes = self.kind.node_set(layer, pool).train()
        self.kind.initialise(self.nodes, generator)
        reference = weight_of(layer)
        device = reference.device
        self.links = nn.Parameter(torch.zeros(pool, dendrites.count, neurons, device=device, dtype=reference.dtype))
        wide = torch.promote_types(reference.dtype, torch.float32)
        for name in Moments._fields:
            shape = (neurons,) if name in ("samples", "mean_error", "square_error") else (pool, neurons)
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=wide))
        self.register_buffer("running_covariance", torch.zeros(pool, neurons, device=device, dtype=wide))
        self.register_buffer("reference", torch.zeros(neurons, device=device, dtype=wide))
        self.register_buffer("missed", torch.tensor(False, device=device), persistent=False)
        self.watching = True
        self.noted: list[tuple[Tensor, Tensor | None]] | None = None

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

    def watched(self, outputs: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor | None]]:
        """What :class:`~pl_dendrites.core.functional.CorrelationRule` is to be given.

        Args:
            outputs: outputs of the pool.

        Returns:
            The outputs and :meth:`observe`; or, if errors are to be noted only, outputs without a history and what
            notes them together with those that have one.
        """
        noted = self.noted
        if noted is None:
            return outputs, self.observe

        def note(_: Tensor, error: Tensor) -> None:
            noted.append((outputs, error.detach() if self.watching else None))

        return outputs.detach().requires_grad_(), note

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
        for name, value in merge_moments(self.moments, new)._asdict().items():
            getattr(self, name).copy_(value)
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

    def saw_error(self) -> bool:
        """Whether any neuron of the layer had an error since the last reset: false if the layer is not used."""
        return bool((self.moments.square_error > 0).any())

    def missed_error(self) -> bool:
        """Whether the error of any neuron was not finite since this was last asked."""
        missed = bool(self.missed)
        self.missed.zero_()
        return missed

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


def add_dendrites(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The forward hook of a layer that has dendrites; a function of the module, so that it can be pickled."""
    dendrites = layer.dendrites
    assert isinstance(dendrites, Dendrites)
    return dendrites(Inputs(args, kwargs), out)


def resume_state(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The forward pre-hook of a layer with a state of its own."""
    dendrites = layer.dendrites
    assert isinstance(dendrites, Dendrites)
    return dendrites.kind.before(layer, Inputs(args, kwargs))
