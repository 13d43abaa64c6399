"""Fused recurrent layers: with a whole sequence, and step by step with the states of all their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pl_dendrites.core import Form, attach, fuse
from tests.core.conftest import DEVICE
from tests.core.helpers import randomise
from tests.core.test_fuse import assert_fused, grown
from tests.core.test_recurrent import LAYERS, ONE_WAY, random, tensors

Stepwise = Callable[..., tuple[Tensor, Any]]


def in_steps(step: Stepwise, x: Tensor, time: int, state: Any = None) -> tuple[Tensor, Any]:
    """A sequence, fed entry by entry."""
    outs = []
    for entry in x.split(1, time):
        out, state = step(entry, state)
        outs.append(out)
    return torch.cat(outs, time), state


def time_of(layer: nn.RNNBase, x: Tensor) -> int:
    return 1 if layer.batch_first and x.ndim == 3 else 0


class Net(nn.Module):
    """Hands a state through, as a model that goes on with a sequence does."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        out, state = self.rnn(x, state)
        return self.head(out), state


def grown_net() -> nn.Module:
    return grown(Net(), None).float().eval()


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_whole_sequence(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer, x = grown(make(), [""]), random(*shape)
    fused = assert_fused(layer, x)
    for found, expected in zip(tensors(fused(x, None)), tensors(layer(x)), strict=True):  # the state's shape, too
        assert_close(found, expected)
    with pytest.raises(AssertionError, match="streaming"):  # never another result in silence
        fused(x, fused(x)[1])


class Own(nn.LSTM):
    """A layer of one's own class, into which a trace would go."""


def test_looking_for_normalisations_leaves_nothing_in_it() -> None:
    for model in (nn.LSTM(3, 4), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Own(3, 4))):
        fused = fuse(grown(model, None))
        recurrent = [part for part in fused.modules() if isinstance(part, nn.RNNBase)]
        assert recurrent
        assert all(isinstance(weight, Tensor) for part in recurrent for weight in part._flat_weights)


@pytest.mark.parametrize(("make", "shape"), ONE_WAY)
def test_a_sequence_step_by_step_is_the_whole_one(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer, x = grown(make(), [""]).eval(), random(*shape)
    with torch.no_grad():
        fused = fuse(layer, streaming=["*"])
        whole, last = layer(x)
        found, state = in_steps(fused, x, time_of(layer, x))
        assert_close(found, whole)
        assert_close(fused(x)[0], whole)
    for own, grown_state in zip(tensors(last), tensors(state), strict=True):
        assert len(grown_state) == (2 + 2) * layer.num_layers  # two dendrites
        assert_close(grown_state[-layer.num_layers :], own)  # what a model reads of a state is what it was


def test_states_may_be_copied_and_reordered() -> None:
    model, x, order = grown_net(), torch.randn(3, 6, 3), torch.tensor([2, 0, 0])
    step = fuse(model, streaming=["LSTM"])
    state = [part[:, order].clone() for part in step(x[:, :4])[1]]
    out, _ = step(x[order, 4:], state)
    assert_close(out, model(x[order])[0][:, 4:])


@pytest.mark.parametrize(("make", "shape"), ONE_WAY)
def test_all_parts_start_alike_from_a_state_of_elsewhere(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer, x = grown(make(), [""]).eval(), random(*shape)
    fused = fuse(layer, streaming=["*"])
    other = [random(*h.shape, seed=5) for h in tensors(layer(x)[1])]
    other = tuple(other) if len(other) > 1 else other[0]
    whole = layer(x, other)[0]
    assert_close(fused(x, hx=other)[0], whole)
    assert_close(in_steps(fused, x, time_of(layer, x), other)[0], whole)


def test_a_layer_that_hands_its_state_to_another() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.GRU(3, 4), nn.GRU(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x, self.encoder(x)[1])[0]

    model, x = grown(Pair(), None).eval(), random(6, 2, 3)
    assert_close(fuse(model, streaming=["decoder"])(x), model(x))


def test_which_layers_stream_is_asked_by_name_or_type() -> None:
    model, x = grown_net(), torch.randn(2, 6, 3)
    for pattern in ("rnn", "r*", "LSTM"):
        assert_close(in_steps(fuse(model, streaming=[pattern]), x, 1)[0], model(x)[0])
    with pytest.raises(ValueError, match=r"no recurrent layer 'head'; those that there are: 'rnn'"):
        fuse(model, streaming=["head"])
    both = grown(nn.GRU(3, 4, bidirectional=True), [""])
    with pytest.raises(ValueError, match=r"'': it runs in both directions"):
        fuse(both, streaming=["GRU"])


@pytest.mark.long
def test_a_streaming_model_is_exported_with_the_states_of_all_parts() -> None:
    model, x, batch = grown_net(), torch.randn(2, 6, 3), torch.export.Dim("batch")
    fused = fuse(model, streaming=["rnn"])
    start = tuple(map(torch.zeros_like, fused(x[:, :1])[1]))
    sizes = ({0: batch}, ({1: batch}, {1: batch}))
    program = torch.export.export(fused, (x[:, :1], start), dynamic_shapes=sizes).module()
    x = torch.randn(3, 6, 3)
    start = tuple(torch.zeros(len(h), 3, h.shape[2]) for h in start)
    assert_close(in_steps(program, x, 1, start)[0], model(x)[0])


@pytest.mark.long
@pytest.mark.skipif(DEVICE is not None, reason="the mode that makes tensors elsewhere is not exported")
def test_with_its_hooks_it_is_exported_without_a_state_and_refuses_one() -> None:
    """A program could not tell a state that it returned itself from another one."""
    model, x = grown_net(), torch.randn(2, 6, 3)
    state = model(x)[1]
    with pytest.raises(ValueError, match="streaming"):
        torch.export.export(model, (x, state), strict=False)
    assert_close(torch.export.export(model, (x,), strict=False).module()(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_trace_with_a_state_says_what_becomes_of_dendrites() -> None:
    model, x = grown_net(), torch.randn(2, 6, 3)
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning, match="streaming"):
        torch.jit.trace(model, (x, model(x)[1]), check_trace=False)


def test_dendrites_of_several_kinds_stream() -> None:
    layer, x = nn.GRU(3, 4).double(), random(6, 2, 3)
    attach(layer)
    layer.dendrites.reshape(layer, [Form(1, "relu"), Form(2, "sharp_gelu")])
    randomise(layer)
    assert_close(in_steps(fuse(layer.eval(), streaming=["GRU"]), x, 0)[0], layer(x)[0])
