"""Hooks of a user's own, registered before dendrites or after: all see, keep or replace what the layer returns."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import attach, detach, restore_structure
from tests.core.helpers import grow, output_of, randomise

LAYERS = [
    pytest.param(lambda: nn.Linear(3, 4), (5, 3), id="linear"),
    pytest.param(lambda: nn.Conv1d(3, 4, 2), (2, 3, 6), id="convolution"),
    pytest.param(lambda: nn.LSTM(3, 4), (6, 2, 3), id="lstm"),
    pytest.param(lambda: nn.GRUCell(3, 4), (5, 3), id="cell"),
]
# How a layer comes to its dendrites, after the hook is there.
WAYS: list[Any] = [
    pytest.param(lambda layer: layer, id="attached"),
    pytest.param(copy.deepcopy, id="copied"),
    pytest.param(lambda layer: pickle.loads(pickle.dumps(layer)), id="pickled"),
]


class Tap:
    """A hook that keeps what it sees."""

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        module.seen = out  # type: ignore[assignment]


def halve(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2, *args[1:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_hook_of_the_models_own_sees_what_the_layer_returns(
    make: Callable[[], nn.Module], shape: tuple[int, ...], way: Callable[[nn.Module], nn.Module]
) -> None:
    layer = make()
    layer.register_forward_hook(Tap())
    attach(layer)
    grow(layer, 2)
    layer = way(layer)
    x = torch.randn(shape)
    returned = output_of(layer(x))
    assert torch.equal(output_of(layer.seen), returned)
    assert not torch.equal(returned, output_of(layer.forward(x)))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_head_that_is_fed_by_a_hook_gives_an_error(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer = make()
    layer.register_forward_hook(Tap())
    network = attach(layer)
    network.start_candidates(pool=2)
    layer(torch.randn(shape))
    output_of(layer.seen).sin().sum().backward()
    assert network.layers_with_error() == [""]


def test_a_mask_that_a_hook_lays_over_neurons_silences_their_dendrites_too() -> None:
    layer, mask = nn.Linear(3, 4), torch.tensor([1.0, 0.0, 1.0, 0.0])
    layer.register_forward_hook(lambda module, args, out: out * mask)
    network = attach(layer)
    network.start_candidates(pool=2)
    layer(torch.randn(9, 3)).sin().sum().backward()
    assert (layer.dendrites.candidates.moments.square_error > 0).tolist() == [True, False, True, False]
    network.integrate()
    randomise(layer.dendrites)
    assert (layer(torch.randn(9, 3)).abs().amax(0) > 0).tolist() == [True, False, True, False]


def test_a_grown_model_that_is_loaded_has_its_dendrites_before_the_hooks_that_are_there() -> None:
    grown, fresh = nn.Linear(3, 4), nn.Linear(3, 4)
    attach(grown)
    grow(grown, 1)
    fresh.register_forward_hook(Tap())
    restore_structure(fresh, grown.state_dict())
    fresh.load_state_dict(grown.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(fresh(x), grown(x))
    assert torch.equal(fresh.seen, grown(x))
    detach(fresh)
    assert [type(hook) for hook in fresh._forward_hooks.values()] == [Tap]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 3)])
def test_dendrites_see_the_input_that_a_pre_hook_made(shape: tuple[int, ...], when: str) -> None:
    """Of layers with a memory too, whose pre-hook is not the only one."""
    layer, plain = nn.GRU(3, 4), nn.GRU(3, 4)
    if when == "before":
        layer.register_forward_pre_hook(halve)
    for each in (layer, plain):
        attach(each)
        grow(each, 2)
    plain.load_state_dict(layer.state_dict())
    if when == "after":
        layer.register_forward_pre_hook(halve)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x)[0], plain(x / 2)[0])
    _, state = layer(x[:2])
    torch.testing.assert_close(layer(x[2:], state)[0], plain(x / 2)[0][2:])


def test_a_hook_may_replace_what_a_layer_returns() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layer[0].register_forward_hook(lambda module, args, out: {"features": out})
    layer[1].register_forward_pre_hook(lambda module, args: (args[0]["features"],))
    network = attach(layer)
    network.start_candidates(pool=2)
    layer(torch.randn(9, 3)).sin().sum().backward()
    assert set(network.integrate()) == {"0", "1"}
    assert isinstance(layer(torch.randn(9, 3)), Tensor)
