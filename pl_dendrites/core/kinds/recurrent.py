"""Recurrent layers: their dendrites are recurrent layers of the same kind, with a hidden state of their own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence

from pl_dendrites.core.kinds.base import Inputs, Memory, register
from pl_dendrites.core.kinds.whole_module import WholeModule
from pl_dendrites.core.tensors import below_transforms, is_exporting, map_tensors

__all__ = ["Cell", "Recurrent", "RecurrentCall", "States"]

_FORGOTTEN = (
    "a recurrent layer with dendrites is called with a state that it does not know, and its dendrites start from that."
    " If a compiled call returned it, they should go on from states of their own, which such a call keeps only if it is"
    " given a state itself, zeros for example"
)


@register(nn.RNNCellBase, nn.RNNCell, nn.GRUCell, nn.LSTMCell)
class Cell(WholeModule):
    """``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell``.

    A neuron is a hidden unit. Its dendrites see what the cell sees: the input and the state that it was called with. So
    they have no state of their own, and what they add to the hidden state comes back to them in the next step.

    Args:
        layer: the cell; it is read, not kept.
    """

    def __init__(self, layer: nn.RNNCellBase) -> None:
        super().__init__(layer)
        self.neurons, self.dim = layer.hidden_size, -1


@register(nn.RNNBase, nn.RNN, nn.GRU, nn.LSTM)
class Recurrent(WholeModule):
    """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, with any number of layers, both directions, and projections.

    A neuron is an entry of the output sequence. A dendrite adds to that sequence, and to the final hidden state, which
    is the sequence's last entry; the layer's own recurrence does not see it. A state that the layer returned and is
    called with again is recognised, as it is or detached: then the layer and each dendrite go on from their own state,
    and a sequence in pieces gives the same output as in one. From any other state they all start alike. A program that
    is exported could not tell the one from the other: a state is refused there. In a trace a warning says so.

    Args:
        layer: the layer; it is read, not kept.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__(layer)
        self._directions = 2 if layer.bidirectional else 1
        self._size: int = layer.proj_size or layer.hidden_size
        self.neurons, self.dim = self._directions * self._size, -1
        self._time_dim = 1 if layer.batch_first else 0

    def memory(self) -> States:
        """What calls of the layer returned."""
        return States()

    def begin(self, inputs: Inputs, memory: Memory) -> Inputs:
        """Give the layer its own state back where it is called with one that it returned."""
        assert isinstance(memory, States)
        if is_exporting() or _in_one_graph(inputs):
            return inputs
        args, kwargs = inputs
        given = _given(inputs)
        past = memory.find(given)
        if past is None:
            return RecurrentCall(inputs, memory)
        # Only a state with a graph brings back its past: of one that was detached nobody wants it.
        states: Any = given if isinstance(given, tuple | list) else [given]
        goes_on = any(state.grad_fn is not None for state in states)
        own, starts = (value if goes_on else map_tensors(Tensor.detach, value) for value in (past.own, past.ends))
        resumed = Inputs((args[0], own), kwargs) if len(args) > 1 else Inputs(args, {**kwargs, "hx": own})
        return RecurrentCall(resumed, memory, starts)

    def output(self, out: Any) -> Tensor:
        """The output sequence; of a packed one all its entries, without padding."""
        sequence = out[0]
        tensor: Tensor = sequence.data if isinstance(sequence, PackedSequence) else sequence
        return tensor

    def potentials_apart(
        self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False
    ) -> list[Tensor]:
        """See :meth:`LayerKind.potentials_apart`.

        Raises:
            ValueError: if the layer is exported and called with a state.
        """
        assert isinstance(nodes, nn.ModuleList)
        args, kwargs = seen = inputs if live else Inputs(*map_tensors(Tensor.detach, tuple(inputs)))
        sequence, given = args[0] if args else kwargs["input"], _given(seen)
        call = inputs if isinstance(inputs, RecurrentCall) else None
        starts = None if call is None else call.starts.get(nodes)
        if given is not None and starts is None:
            _tell_who_records()
        outputs, ends = [], []
        for j, node in enumerate(nodes):
            returned = node(sequence, given if starts is None else starts[j])
            outputs.append(self.output(returned))
            ends.append(returned[1] if live else map_tensors(Tensor.detach, returned[1]))
        if call is not None:
            call.ends[nodes] = ends
        return outputs

    def with_output(self, out: Any, tensor: Tensor, inputs: Inputs) -> Any:
        """The sequence and the final state, both with the dendrites' signal."""
        sequence, state = out
        hidden = state[0] if isinstance(state, tuple) else state
        sequence = sequence._replace(data=tensor) if isinstance(sequence, PackedSequence) else tensor
        final = torch.cat([hidden[: -self._directions], self._last(sequence).to(hidden.dtype)])
        returned = (final, *state[1:]) if isinstance(state, tuple) else final
        if isinstance(inputs, RecurrentCall):
            inputs.states.keep(returned, state, inputs.ends)
        return sequence, returned

    def _last(self, sequence: Tensor | PackedSequence) -> Tensor:
        # The last entry of the forward direction and the first of the other: shape (directions, *, size).
        if isinstance(sequence, PackedSequence):
            first = torch.arange(int(sequence.batch_sizes[0]), device=sequence.batch_sizes.device)
            lengths = (sequence.batch_sizes > first[:, None]).sum(1)
            offsets = sequence.batch_sizes.cumsum(0) - sequence.batch_sizes
            last = (offsets[lengths - 1] + first).to(sequence.data.device)
            ends = [sequence.data[last], sequence.data[: len(first)]]
            if sequence.unsorted_indices is not None:
                ends = [end[sequence.unsorted_indices] for end in ends]
        else:
            dim = self._time_dim if sequence.ndim > 2 else 0  # noqa: PLR2004 - a single sequence has no batch
            ends = [sequence.select(dim, -1), sequence.select(dim, 0)]
        parts = [ends[d][..., d * self._size : (d + 1) * self._size] for d in range(self._directions)]
        return torch.stack(parts)


def _given(inputs: Inputs) -> Any:
    args, kwargs = inputs
    return args[1] if len(args) > 1 else kwargs.get("hx")


def _tell_who_records() -> None:
    # What is recorded now would be done with every state, one that the recording itself returned among them.
    if is_exporting():
        raise ValueError(
            "a recurrent layer that has dendrites is called with a state, in which an exported program finds none of"
            " theirs: export what `fuse(model, streaming=...)` returns"
        )
    if torch._C._get_tracing_state() is not None:
        warnings.warn(
            "a recurrent layer that has dendrites is traced with a state: from any state the layer and they all start"
            " alike. To go on with a sequence, trace what `fuse(model, streaming=...)` returns",
            TracerWarning,
            stacklevel=2,
        )


class RecurrentCall(Inputs):
    """One call of a recurrent layer.

    Attributes:
        states: take in what the call returns.
        starts: by node set, the states that its nodes go on from; empty: the one that the layer is called with.
        ends: by node set, the states that its nodes ended in.
    """

    states: States
    starts: dict[nn.Module, list[Any]]
    ends: dict[nn.Module, list[Any]]

    def __new__(cls, inputs: Inputs, states: States, starts: dict[nn.Module, list[Any]] | None = None) -> RecurrentCall:
        """A tuple of arguments, as :class:`Inputs` is."""
        self = super().__new__(cls, *inputs)
        self.states, self.starts, self.ends = states, starts or {}, {}
        return self

    def with_arguments(self, other: Inputs) -> RecurrentCall:
        """The same call with the arguments of another."""
        return RecurrentCall(other, self.states, self.starts)


class _Past:
    # What a call left behind: the layer's own final state, and those of its dendrites' nodes.
    def __init__(self, returned: list[Tensor], own: Any, ends: dict[nn.Module, list[Any]]) -> None:
        self.own, self.ends = own, ends
        self._marks = list(map(_mark, returned))

    def returned(self, given: list[Tensor]) -> bool:
        # Nobody has changed the values since, and all of them are here.
        return list(map(_mark, given)) == self._marks


class States(Memory):
    """States that calls of one recurrent layer returned, each for as long as anybody keeps it.

    The hidden state is known again by the memory that its values lie in, which a view and a detached tensor share.

    Attributes:
        forgets: whether a compiled call ever returned a state that was not kept.

    Example:
        >>> states = States()
        >>> returned = torch.ones(1, 2)
        >>> states.keep(returned, own=torch.zeros(1, 2), ends={})
        >>> states.find(returned.detach()).own
        tensor([[0., 0.]])
        >>> states.find(torch.ones(1, 2))
    """

    def __init__(self) -> None:
        super().__init__()
        self._past: dict[StorageWeakRef, _Past] = {}
        self.forgets = False

    def begin(self, call: Inputs) -> None:
        """See :meth:`Memory.begin`."""
        if _in_one_graph(call):
            self.forgets = True
        else:
            super().begin(call)

    def running(self, inputs: Inputs) -> Inputs:
        """See :meth:`Memory.running`."""
        if not _in_one_graph(inputs):
            return super().running(inputs)
        self.forgets = True
        return inputs

    def find(self, given: Any) -> _Past | None:
        """What the call left behind that returned a state; ``None`` for any other state."""
        if given is None:
            return None
        tensors = _tensors(given)
        past = self._past.get(_place(tensors[0]))
        if past is not None and past.returned(tensors):
            return past
        if self.forgets and not torch.compiler.is_compiling() and any(bool(tensor.any()) for tensor in tensors):
            warnings.warn(_FORGOTTEN, stacklevel=2)
        return None

    def keep(self, returned: Any, own: Any, ends: dict[nn.Module, list[Any]]) -> None:
        """A call of the layer returns.

        Args:
            returned: the state that its caller gets; the first tensor of it is no view.
            own: the layer's own.
            ends: those of the dendrites' nodes.
        """
        for place in [place for place in list(self._past) if place.expired()]:
            self._past.pop(place, None)
        tensors = _tensors(returned)
        self._past[_place(tensors[0])] = _Past(tensors, own, ends)


def _in_one_graph(inputs: Inputs) -> bool:
    # Tensors of a graph that is compiled lie nowhere yet. So a whole sequence is not kept, and one that goes on from a
    # state, which can only be found while the model runs, is looked up outside of the graph.
    compiled = torch.compiler.is_dynamo_compiling() and not is_exporting()
    return compiled and _given(inputs) is None


def _tensors(state: Any) -> list[Tensor]:
    return [below_transforms(tensor) for tensor in (state if isinstance(state, tuple | list) else [state])]


def _place(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    # What was before a trace would be constants in it.
    return tensor.data_ptr(), tensor.shape, tensor.stride(), version, torch._C._get_tracing_state() is not None
