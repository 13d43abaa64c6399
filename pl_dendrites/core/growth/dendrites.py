"""The dendrites of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pl_dendrites.core.activations import UNBOUNDED
from pl_dendrites.core.growth.block import Block, Form
from pl_dendrites.core.growth.placed_block import PlacedBlock, PlacedForm
from pl_dendrites.core.growth.shared_block import SharedBlock, SharedForm
from pl_dendrites.core.growth.watch import Watch
from pl_dendrites.core.kinds import Inputs, Memory, kind_of, scaled
from pl_dendrites.core.rule.candidates import Candidates
from pl_dendrites.core.rule.correlation import CorrelationRule
from pl_dendrites.core.rule.transforms import TransformedRule

__all__ = ["AnyBlock", "AnyForm", "Dendrites"]

AnyBlock = Block | SharedBlock | PlacedBlock
AnyForm = Form | SharedForm | PlacedForm


def keeps_input(layer: nn.Module) -> bool:
    """Whether a layer's own weights learn, so that PyTorch refuses that its input is changed in place later on.

    Example:
        >>> keeps_input(nn.Linear(2, 2)), keeps_input(nn.Linear(2, 2).requires_grad_(False))
        (True, False)
    """
    own = (parameter for name, parameter in layer.named_parameters() if not name.startswith("dendrites."))
    return any(parameter.requires_grad and parameter.ndim > 1 for parameter in own)


class Dendrites(nn.ModuleList):
    r"""The dendrites of one layer, hung on it as its submodule ``dendrites``.

    .. math:: d_{j,c} = f\Big(V_{j,c} \cdot x + v_{j,c} + \sum_{i<j} u_{j,i,c}\, d_{i,c}\Big), \qquad
              out_c = W_c \cdot x + b_c + \sum_j a_{j,c}\, d_{j,c}

    (arXiv:2501.18018). Sets that follow each other and are alike form one
    :class:`~pl_dendrites.core.growth.block.Block`; this is the list of these. A block's ``V`` and ``v`` are one module,
    ``nodes``: of a Linear or convolution a layer of the same type with ``k * C`` outputs, of any other layer ``k``
    copies, whose output then stands for :math:`V \cdot x + v`. ``u`` is the parameter ``links``. Both are frozen, and
    no gradient flows through a dendrite into its input, unless the dendrites are live. ``a`` is trained with the
    network: ``weights``, a list of ``k`` parameters of shape ``(C,)``, one for each dendrite, so that an optimizer's
    state of an older dendrite outlives the arrival of a newer one. Without dendrites the module has no entry in a
    state_dict, and the layer's own entries never change.

    Args:
        layer: the layer that the dendrites belong to; it is read, not kept.

    Attributes:
        kind: where the layer's neurons are, and what its nodes look like.
        next: what a set to come looks like.
        called: whether the layer ever ran since it was attached.
        reached: whether it ever ran where gradients are computed.
        candidates: the pool in training, or ``None``. It is no part of the module tree.
        watch: looks at inputs and errors; ``None`` while nobody asks for that.
        memory: what outlives a call of the layer; ``None`` where that is nothing.

    Example:
        >>> layer = nn.Linear(5, 3)
        >>> dendrites = Dendrites(layer)
        >>> dendrites.reshape(layer, [Form(count=2)])
        >>> [(name, tuple(p.shape)) for name, p in dendrites.named_parameters()][:3]
        [('0.links', (1, 3)), ('0.weights.0', (3,)), ('0.weights.1', (3,))]
        >>> [(name, tuple(p.shape)) for name, p in dendrites.named_parameters()][3:]
        [('0.nodes.weight', (6, 5)), ('0.nodes.bias', (6,))]
    """

    candidates: Candidates | None
    watch: Watch | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.kind = kind_of(layer)
        self.memory: Memory | None = self.kind.memory()
        self.next = Form(1)
        self.called = self.reached = False
        self.set_candidates(None)
        self.set_watch(None)

    def __iter__(self) -> Iterator[AnyBlock]:
        """The blocks in order."""
        return cast("Iterator[AnyBlock]", super().__iter__())

    @property
    def private(self) -> list[Block]:
        """The blocks of private dendrites."""
        return [block for block in self if isinstance(block, Block)]

    @property
    def shared(self) -> list[SharedBlock]:
        """The blocks of shared dendrites."""
        return [block for block in self if isinstance(block, SharedBlock)]

    @property
    def placed(self) -> list[PlacedBlock]:
        """The blocks of placed dendrites."""
        return [block for block in self if isinstance(block, PlacedBlock)]

    @property
    def count(self) -> int:
        """Dendrites per neuron, ``k``; where neurons differ, of those that have all."""
        return sum(form.count for form in self.forms)

    @property
    def size(self) -> int:
        """Dendrites per neuron and units that all neurons share, together."""
        return self.count + sum(form.units for form in self.forms if not isinstance(form, Form))

    @property
    def forms(self) -> list[AnyForm]:
        """What its blocks look like."""
        return [block.form for block in self]

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take along: not the candidates, for a copy of the model is a model."""
        return {**self.__dict__, "candidates": None, "watch": None}

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` asks all parts of a model for before it compiles them.

        Raises:
            ValueError: always, for it runs no hooks.
        """
        raise ValueError(
            "torch.jit.script compiles layers without their dendrites: give it `pl_dendrites.fuse(model)`, or trace the"
            " model"
        )

    def begin(self, inputs: Inputs) -> Inputs:
        """A call of a layer that has a memory begins.

        Args:
            inputs: what it is called with.

        Returns:
            What it is to be called with instead.
        """
        assert self.memory is not None
        call = self.kind.begin(inputs, self.memory)
        self.memory.begin(call)
        return call

    def forward(self, inputs: Any, *returned: Any, levels: frozenset[int] | None = None) -> Any:
        """Add the dendrites' signal to a layer's output and let the candidates watch the error.

        Args:
            inputs: what the layer was called with.
            *returned: what it returned. A container that calls its submodules in turn, as ``nn.Sequential`` does, calls
                this one too, with no more than the output of the one before, and gets that back.
            levels: the transforms of ``torch.func`` that train the layer; ``None`` where there is none at all.

        Returns:
            The same with the output that the next layer sees, ``(*, C, *)``, in the place of the layer's own.
        """
        if not returned:
            return inputs
        (out,) = returned
        own = self.kind.output(out)
        self._note_call()
        # Without gradients nothing is learned: the first pass of a reentrant activation checkpoint. A validation may
        # well have gradients, and is not listened to.
        candidates = self.candidates
        if candidates is not None and not (candidates.listening and torch.is_grad_enabled()):
            candidates = None
        watch = self.watch
        if watch is not None and not (watch.listening and torch.is_grad_enabled()):
            watch = None
        blocks = list(self)
        if candidates is None and watch is None and not blocks:
            return out
        total = own
        seen: list[Tensor] = []
        for block in blocks:
            outputs = block(inputs, own, seen)
            total = block.add_to(total, outputs)
            if candidates is not None or block is not blocks[-1]:  # else nobody looks
                seen = [*seen, *block.for_all(outputs, own)]
        if candidates is not None:
            watched = candidates.watched(inputs, total, [output.detach() for output in seen])
            total = _followed(total, *watched, levels)
        if watch is not None:
            total = _followed(total, *watch.watched(inputs, total), levels)
        return self.kind.with_output(out, total, inputs)

    def _note_call(self) -> None:
        # Written once: a compiled graph that writes at each call would do so for ever.
        if not self.called:
            self.called = True
        if not self.reached and torch.is_grad_enabled():
            self.reached = True

    def needs_copy(self, layer: nn.Module) -> bool:
        """Whether what learns here must have a copy of the layer's input, for the layer itself does not keep it.

        A frozen layer's backward pass has no use for the input, so the model may change it in place later.

        Args:
            layer: the layer that the dendrites belong to.
        """
        if not torch.is_grad_enabled():
            return False
        if self.candidates is not None:
            return self.candidates.copies
        return any(block.live for block in self) and not keeps_input(layer)

    def reshape(self, layer: nn.Module, forms: Sequence[AnyForm]) -> None:
        """Give the layer dendrites of these forms. Those that were there stay as far as they fit, see `Block.resize`.

        Args:
            layer: the layer that the dendrites belong to.
            forms: of the blocks in order.

        Raises:
            ValueError: if the layer cannot have such dendrites.
        """
        below = 0
        for place, form in enumerate(forms):
            block = cast("AnyBlock", self[place]) if place < len(self) else None
            if block is None or not block.can_take(form, below):
                del self[place:]
                self.append(form.make(layer, self.kind, below).train(self.training))
            elif isinstance(block, Block) and block.count != form.count:
                block.resize(layer, form.count)
            below += form.count
        del self[len(forms) :]

    def grow(self, layer: nn.Module, generator: torch.Generator | None = None) -> None:
        """Give every neuron one more dendrite, drawn anew, whose output weight starts at zero.

        Args:
            layer: the layer that the dendrites belong to.
            generator: see :meth:`~pl_dendrites.core.kinds.LayerKind.initialise`.
        """
        block = self._one_more(layer, self.next)
        nodes = block.kind.node_set(layer, 1)
        block.kind.initialise(nodes, generator)
        block.kind.put(block.nodes, block.count - 1, block.kind.take(nodes, 0))

    def _one_more(self, layer: nn.Module, form: Form) -> Block:
        # Room for a set: in the last block if that is alike. Each set of some neurons is for itself.
        forms, last = self.forms, next(reversed(list(self)), None)
        if last is not None and form.neurons is None and last.can_take(form, self.count - last.form.count):
            forms[-1] = replace(form, count=last.form.count + 1)
        else:
            forms.append(form)
        self.reshape(layer, forms)
        block = self[-1]
        assert isinstance(block, Block)
        return block

    @torch.no_grad()
    def integrate(self, layer: nn.Module, neurons: Tensor | None = None) -> Tensor:
        """Make the best candidate of every neuron its next dendrite and let the pool go.

        The best is the one with the largest absolute Pearson correlation over the running statistics; where the layer's
        neurons share their nodes, all take the one with the largest mean. Its output weight starts at zero, so that the
        network's output does not change, but for the rounding of a larger matrix product where there were dendrites
        before.

        The covariance makes the outputs of ReLU and GELU ever larger, and no learning rate suits the weights of such
        outputs. Where their standard deviation is above 1, the node is divided by it; it is 1 then, of a GELU about 1.

        Args:
            layer: the layer that the dendrites belong to.
            neurons: which neurons get a dendrite, ascending; ``None``: all.

        Returns:
            Shape ``(C,)``: the correlation of each neuron's best candidate.

        Raises:
            RuntimeError: if there are no candidates.
        """
        pool = self.candidates
        if pool is None:
            raise RuntimeError("there are no candidates to integrate: call start_candidates first")
        correlation = pool.correlation()
        best, every = self.kind.best(correlation), torch.arange(correlation.shape[1], device=correlation.device)
        if neurons is not None and len(neurons) == len(every):
            neurons = None
        form = replace(self.next, fan_in=pool.fan_in, neurons=None if neurons is None else len(neurons))
        block = self._one_more(layer, form)
        values, links = pool.kind.take(pool.nodes, best), pool.links[best, :, every].T
        if pool.kind.scalable and pool.activation in UNBOUNDED:
            factor = 1 / pool.spread()[best, every].clamp(min=1)
            values, links = scaled(values, factor), links * factor
        if block.neurons is not None and neurons is not None:
            block.neurons.copy_(neurons)
            values, links = {name: value[neurons] for name, value in values.items()}, links[:, neurons]
        block.kind.put(block.nodes, block.count - 1, values)
        block.links[block.links_of(block.count - 1)] = links
        self.set_candidates(None)
        return correlation[best, every]

    @torch.no_grad()
    def follow(self, layer: nn.Module, source: Dendrites) -> None:
        """Have as many dendrites as another layer: those that are not here yet are copies of its own.

        Their output weights start at zero, so that the network's output does not change.

        Args:
            layer: the layer that the dendrites belong to.
            source: the dendrites of a layer that this one mirrors, of which these are the first.
        """
        there, blocks = self.count, len(self)
        self.reshape(layer, source.forms)
        for new, shared in list(zip(self, source, strict=True))[blocks:]:
            if not isinstance(new, Block):
                new.load_state_dict({**shared.state_dict(), "out": new.out})
        for own, other in zip(self.private, source.private, strict=True):
            for place in range(max(there - own.below, 0), own.count):
                own.kind.put(own.nodes, place, other.kind.take(other.nodes, place))
                own.links[own.links_of(place)] = other.links[other.links_of(place)]
                if own.neurons is not None and other.neurons is not None:
                    own.neurons.copy_(other.neurons)

    def add(self, layer: nn.Module, form: AnyForm) -> AnyBlock:
        """Hang dendrites on a module: a block of their own, to be filled in.

        Args:
            layer: the module that the dendrites belong to.
            form: what they look like.
        """
        self.reshape(layer, [*self.forms, form])
        return list(self)[-1]

    def trained_parameters(self) -> list[nn.Parameter]:
        """What a base phase trains: the output weights, and of live dendrites all else."""
        return [parameter for block in self for parameter in block.trained_parameters()]

    def start(self, layer: nn.Module, pool: int, generator: torch.Generator | None = None) -> Candidates:
        """Put a pool of new candidates in place.

        Args:
            layer: the layer that the dendrites belong to.
            pool: candidates per neuron.
            generator: see :meth:`~pl_dendrites.core.kinds.LayerKind.initialise`.
        """
        below, activation = self.count, self.next.activation
        candidates = Candidates(layer, self.kind, pool, below=below, activation=activation, generator=generator)
        candidates.copies = not keeps_input(layer)
        if self.next.fan_in is not None:
            candidates.watch_inputs(layer)
        self.set_candidates(candidates)
        return candidates

    def set_candidates(self, candidates: Candidates | None) -> None:
        """Put a pool in place, or take it away (``None``)."""
        # Past nn.Module.__setattr__, which would make them part of the model: its parameters, checkpoints, averages.
        self.__dict__["candidates"] = candidates

    def set_watch(self, watch: Watch | None) -> None:
        """Have inputs and errors of the layer looked at, or no longer (``None``)."""
        self.__dict__["watch"] = watch


def _followed(total: Tensor, watched: Tensor, observe: Any, levels: frozenset[int] | None) -> Tensor:
    followed: Tensor
    if levels is None:
        followed = CorrelationRule.apply(total, watched, observe)  # type: ignore[no-untyped-call]
    else:
        followed = TransformedRule.apply(total, watched, observe, levels)  # type: ignore[no-untyped-call]
    return followed
