"""Recurrent layers: their dendrites are recurrent layers of the same kind, with a hidden state of their own."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pl_dendrites.core.copies import Copies, map_tensors
from pl_dendrites.core.kinds import Inputs

__all__ = ["Cell", "Recurrent"]


class Cell(Copies):
    """``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell``.

    A neuron is a hidden unit. Its dendrites see what the cell sees: the input and the state that it was called with. So
    they have no state of their own, and what they add to the hidden state comes back to them in the next step.

    Args:
        layer: the cell; it is read, not kept.
    """

    def __init__(self, layer: nn.RNNCellBase) -> None:
        super().__init__(layer)
        self.neurons, self.dim = layer.hidden_size, -1


class Recurrent(Copies):
    """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``, with any number of layers, both directions, and projections.

    A neuron is an entry of the output sequence. A dendrite adds to that sequence, and to the final hidden state, which
    is the sequence's last entry; the layer's own recurrence does not see it. A state that the layer returned and is
    called with again is recognised, as it is or detached: then the layer and each dendrite go on from their own state,
    and a sequence in pieces gives the same output as in one. From any other state they all start alike.

    Args:
        layer: the layer; it is read, not kept.
    """

    stateful = True

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__(layer)
        self._directions = 2 if layer.bidirectional else 1
        self._size: int = layer.proj_size or layer.hidden_size
        self.neurons, self.dim = self._directions * self._size, -1
        self._time_dim = 1 if layer.batch_first else 0
        self._forget()

    def _forget(self) -> None:
        # Of the last call in training and of the last one outside, so that a validation does not end a sequence.
        self._calls: dict[bool, _Call] = {}
        self._before: _Call | None = None
        self._training = True
        self._ends: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_calls", "_before", "_ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def before(self, layer: nn.Module, inputs: Inputs) -> Inputs:
        """Give the layer its own state back where it is called with what it returned last."""
        args, kwargs = inputs
        given = args[1] if len(args) > 1 else kwargs.get("hx")
        last = self._calls.get(layer.training)
        self._before = last if last is not None and last.returned(given) else None
        self._ends, self._training = WeakKeyDictionary(), layer.training
        if self._before is None:
            return inputs
        own = self._before.own_state()
        return Inputs((args[0], own), kwargs) if len(args) > 1 else Inputs(args, {**kwargs, "hx": own})

    def output(self, out: Any) -> Tensor:
        """The output sequence; of a packed one all its entries, without padding."""
        sequence = out[0]
        tensor: Tensor = sequence.data if isinstance(sequence, PackedSequence) else sequence
        return tensor

    def potentials(self, nodes: nn.Module, count: int, inputs: Inputs, out: Tensor, live: bool = False) -> Tensor:
        """See :meth:`LayerKind.potentials`."""
        assert isinstance(nodes, nn.ModuleList)
        args, kwargs = inputs if live else map_tensors(Tensor.detach, tuple(inputs))
        sequence = args[0] if args else kwargs["input"]
        given = args[1] if len(args) > 1 else kwargs.get("hx")
        starts = None if self._before is None else self._before.start(nodes)
        outputs, self._ends[nodes] = [], []
        for j, node in enumerate(nodes):
            returned = node(sequence, given if starts is None else starts[j])
            outputs.append(self.output(returned))
            self._ends[nodes].append(returned[1] if live else map_tensors(Tensor.detach, returned[1]))
        return torch.stack(outputs)

    def with_output(self, out: Any, tensor: Tensor) -> Any:
        """The sequence and the final state, both with the dendrites' signal."""
        sequence, state = out
        hidden = state[0] if isinstance(state, tuple) else state
        sequence = sequence._replace(data=tensor) if isinstance(sequence, PackedSequence) else tensor
        final = torch.cat([hidden[: -self._directions], self._last(sequence).to(hidden.dtype)])
        returned = (final, *state[1:]) if isinstance(state, tuple) else final
        self._calls[self._training], self._before = _Call(state, returned, self._ends), None
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


class _Call:
    # What a call returned is known again by where its values lie and that nobody has changed them; holding a view of
    # them keeps that place from being used for others.
    def __init__(self, own: Any, returned: Any, ends: WeakKeyDictionary[nn.Module, list[Any]]) -> None:
        self._own, self._ends, self._goes_on = own, ends, False
        self._returned = [(view, _version(view)) for view in map(Tensor.detach, _tensors(returned))]

    def returned(self, given: Any) -> bool:
        if given is None:
            return False
        tensors = _tensors(given)
        # Only a state with a graph brings back its past: of one that was detached nobody wants it.
        self._goes_on = any(tensor.grad_fn is not None for tensor in tensors)
        return len(tensors) == len(self._returned) and all(
            tensor.data_ptr() == view.data_ptr()
            and tensor.shape == view.shape
            and tensor.stride() == view.stride()
            and _version(tensor) == version
            for tensor, (view, version) in zip(tensors, self._returned, strict=True)
        )

    def own_state(self) -> Any:
        return self._own if self._goes_on else map_tensors(Tensor.detach, self._own)

    def start(self, nodes: nn.Module) -> list[Any] | None:
        ends = self._ends.get(nodes)
        return ends if self._goes_on or ends is None else map_tensors(Tensor.detach, ends)


def _tensors(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple | list) else [state]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
