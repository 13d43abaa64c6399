"""Compiled models: PyTorch runs a graph again without asking whether a layer has hooks that it had not before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from pl_dendrites.core import attach, restore_structure
from tests.core.conftest import DEVICE
from tests.core.helpers import LAYERS, TORCH, grow

# What tells a layer with dendrites from one without is looked at by newer versions alone.
pytestmark = [
    pytest.mark.skipif(TORCH < (2, 13), reason="README: attach before the first compiled pass"),
    pytest.mark.skipif(DEVICE is not None, reason="the mode that makes tensors elsewhere is not compiled"),
]

KINDS = [case for case in LAYERS if case.id in ("linear", "conv2d-groups", "transposed2d-stride")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x).relu())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("how", ["attach", "restore_structure"])
def test_dendrites_work_in_a_model_that_ran_compiled_before_it_had_any(how: str, in_place: bool) -> None:
    network = Net()
    x = torch.randn(8, 4)
    compiled = torch.compile(network, backend="eager")
    if in_place:
        network.compile(backend="eager")
        compiled = network
    plain = compiled(x).detach()
    if how == "attach":
        attach(compiled)
    else:
        source = Net()
        attach(source)
        grow(source.hidden, 1)
        restore_structure(network, source.state_dict())
    for layer in (network.hidden, network.head):
        if hasattr(layer, "dendrites"):
            grow(layer, 2)
    out = compiled(x)
    torch.testing.assert_close(out, network.forward(x))
    assert not torch.allclose(out, plain, atol=1e-3)


def test_a_plain_and_a_grown_model_of_one_class_do_not_run_each_others_graphs() -> None:
    plain, grown = Net(), Net()
    grown.load_state_dict(plain.state_dict())
    attach(grown)
    grow(grown.hidden, 2)
    x = torch.randn(8, 4)
    for network in (grown, plain, grown, plain):
        out = torch.compile(network, backend="eager")(x)
        torch.testing.assert_close(out, network.forward(x))
    assert not torch.allclose(plain(x), grown(x), atol=1e-3)


@pytest.mark.parametrize(("live", "fan_in"), [(False, None), (True, None), (False, 1)])
@pytest.mark.parametrize(("make", "shape"), KINDS)
def test_a_layer_and_its_dendrites_are_one_graph(
    make: Callable[[], nn.Module], shape: tuple[int, ...], live: bool, fan_in: int | None
) -> None:
    """Where a graph breaks, nothing is fused across, and what compiling gains is lost."""
    torch.compiler.reset()
    layer, x = make(), torch.randn(shape)
    attach(layer, live=live, fan_in=fan_in)
    grow(layer, 2)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


RECURRENT = [
    pytest.param(lambda: nn.GRU(3, 4), False, id="gru"),
    pytest.param(lambda: nn.LSTM(3, 4, 2, bidirectional=True), True, id="lstm-two-layers-both-ways-live"),
]


@pytest.fixture
def recurrent_layers_compiled() -> Iterator[None]:
    """PyTorch leaves them out of graphs unless it is told otherwise."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.long
@pytest.mark.usefixtures("recurrent_layers_compiled")
@pytest.mark.parametrize(("make", "live"), RECURRENT)
def test_a_recurrent_layer_and_its_dendrites_are_one_graph(make: Callable[[], nn.Module], live: bool) -> None:
    network = nn.Sequential(make())
    attach(network, live=live)
    grow(network[0], 2)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))


@pytest.mark.long
@pytest.mark.usefixtures("recurrent_layers_compiled")
def test_a_state_that_a_compiled_call_returned_is_known_or_missed_aloud() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(6, 2, 3)
    attach(layer)
    grow(layer, 2)
    compiled, (whole, _) = torch.compile(layer, backend="eager"), layer(x)
    _, state = compiled(x[:4])
    with pytest.warns(UserWarning, match="a state that it does not know"):
        layer(x[4:], state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a state that it does not know")
        first, state = compiled(x[:4], torch.zeros(1, 2, 4))
        rest, _ = layer(x[4:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)
