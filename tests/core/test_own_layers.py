"""Layers of a user's own that are derived from PyTorch's: those that compute in another way grow as copies."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pl_dendrites.core import attach, detach, restore_structure, select_targets
from pl_dendrites.core.kinds import LinearConv, OwnLayer, kind_of
from tests.core.helpers import grow, output_of, randomise


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class CausalCrop(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


class PaddedInside(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight, bias)


class CropTransposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(x)[..., : x.shape[-1] * self.stride[0]]


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=self.padding)


class AlongOne(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class ChannelsLast(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class InAPair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Halved(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.glu(super().forward(x), 1)


class Dropped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Normed(nn.GRUCell):
    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return F.layer_norm(super().forward(x, state), (self.hidden_size,))


# Each with an input, and the neurons and their dimension that are to be found.
GROWING = [
    pytest.param(lambda: Causal(3, 4, 3, dilation=2), (2, 3, 8), (4, -2), id="pads"),
    pytest.param(lambda: Causal(4, 4, 3), (4, 4, 4), (4, -2), id="pads, equal sizes"),
    pytest.param(lambda: Causal(4, 4, 3, groups=2), (4, 8), (4, -2), id="pads, groups, no batch"),
    pytest.param(lambda: CausalCrop(3, 4, 3, padding=2), (2, 3, 8), (4, -2), id="crops"),
    pytest.param(lambda: PaddedInside(2, 3, 3), (2, 2, 5, 5), (3, -3), id="pads in _conv_forward"),
    pytest.param(lambda: PaddedInside(2, 1, 3), (1, 2, 5, 5), (1, -3), id="one neuron, batch of one"),
    pytest.param(lambda: CropTransposed(4, 6, 4, stride=2, groups=2), (2, 4, 8), (6, -2), id="crops transposed"),
    pytest.param(lambda: Standardized(3, 4, 3, padding=1), (2, 3, 5, 5), (4, -3), id="weight of a weight"),
    pytest.param(lambda: AlongOne(8, 6), (2, 8, 5), (6, -2), id="along another dimension"),
    pytest.param(lambda: AlongOne(5, 5), (5, 5, 5), (5, -2), id="along another dimension, equal sizes"),
    pytest.param(lambda: ChannelsLast(3, 4, 1), (4, 4, 3), (4, -1), id="channels last, equal sizes"),
    pytest.param(lambda: InAPair(3, 4), (5, 3), (4, -1), id="a tuple"),
    pytest.param(lambda: Halved(3, 8, 3, padding=1), (2, 3, 4), (4, -2), id="half as many"),
    pytest.param(lambda: Dropped(3, 4), (4, 4, 3), (4, -1), id="random"),
    pytest.param(lambda: Normed(3, 4), (5, 3), (4, -1), id="a cell"),
]


@pytest.mark.parametrize(("make", "shape", "found"), GROWING)
def test_it_grows_as_copies_without_being_named(
    make: Callable[[], nn.Module], shape: tuple[int, ...], found: tuple[int, int]
) -> None:
    layer, x = make().eval(), torch.randn(shape)
    before, model = output_of(layer(x)), nn.ModuleDict({"layer": layer, "plain": nn.Linear(2, 2)})
    random = torch.get_rng_state()
    network = attach(model)
    assert network.targets == ["layer", "plain"]
    assert torch.equal(output_of(layer(x)), before)
    assert torch.equal(torch.get_rng_state(), random)
    kind = layer.dendrites.kind
    assert isinstance(kind, OwnLayer)
    assert (kind.neurons, kind.dim) == found
    for _ in range(2):
        network.start_candidates(pool=2)
        output_of(layer(x)).square().sum().backward()
        assert "layer" in network.integrate()
        randomise(layer.dendrites)
    out = output_of(layer(x))
    assert out.shape == before.shape
    block, along = layer.dendrites[0], (-1, *[1] * (-found[1] - 1))
    first = output_of(block.nodes[0](x)).tanh()
    second = (output_of(block.nodes[1](x)) + block.links[0].view(along) * first).tanh()
    expected = before + block.weights[0].view(along) * first + block.weights[1].view(along) * second
    torch.testing.assert_close(out, expected)

    twin = make().eval()
    restore_structure(nn.ModuleDict({"layer": twin}), {f"layer.{k}": v for k, v in layer.state_dict().items()})
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(output_of(other(x)), out)
    assert torch.equal(output_of(detach(layer)(x)), before)


class Flattened(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


class Softmaxed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class InADict(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": super().forward(x), "input": x}


class Unpacked(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Replaced(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        plain = super().forward
        self.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        pytest.param(lambda: Flattened(3, 4, 1), (2, 3, 5), "its neurons cannot be told from its output", id="flat"),
        pytest.param(lambda: Softmaxed(3, 4), (2, 3), "its neurons cannot be told from its output", id="mixed"),
        pytest.param(lambda: InADict(3, 4), (2, 3), "its neurons cannot be told: .*set `neuron_output`", id="dict"),
        pytest.param(lambda: Unpacked(3, 4), (5, 2, 3), "its neurons cannot be told from its output", id="recurrent"),
        pytest.param(lambda: Replaced(3, 4), (2, 3), "`forward` was replaced on the instance", id="replaced"),
        pytest.param(lambda: weight_norm(Causal(3, 4, 1)), (2, 3, 5), "computed from others", id="parametrized"),
    ],
)
def test_where_neurons_cannot_be_told_it_is_left_alone_with_the_reason(
    make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    network = attach(nn.ModuleDict({"layer": layer, "plain": nn.Linear(2, 2)}))
    torch.testing.assert_close(layer(x), before)
    assert network.can_grow() == ["plain"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(network.skipped["layer"])
    network.start_candidates(pool=1)
    torch.testing.assert_close(layer(x), before)


def test_an_attribute_says_where_neurons_are_that_cannot_be_told() -> None:
    layer = Softmaxed(3, 4)
    layer.neuron_dim = -1
    network = attach(layer)
    layer(torch.randn(5, 3))
    network.start_candidates(pool=2)
    layer(torch.randn(5, 3)).square().sum().backward()
    assert list(network.integrate()) == [""]


def test_dendrites_that_a_file_holds_are_not_added_anywhere_by_chance() -> None:
    grown = Softmaxed(3, 4)
    grown.neuron_dim = -1
    network = attach(grown)
    grown(torch.randn(5, 3))
    network.grow([""])
    fresh = Softmaxed(3, 4)
    restore_structure(fresh, grown.state_dict())
    with pytest.raises(ValueError, match="a Softmaxed has dendrites, but its neurons cannot be told"):
        fresh(torch.randn(5, 3))


def test_a_method_that_is_bound_on_the_instance_is_the_copys_own() -> None:
    layer, x = nn.Linear(3, 4), torch.randn(5, 3)
    layer.forward = types.MethodType(lambda self, x: F.linear(x.flip(-1), self.weight, self.bias), layer)
    network = attach(layer)
    layer(x)
    network.grow([""])
    node = layer.dendrites[0].nodes[0]
    torch.testing.assert_close(node(x), F.linear(x.flip(-1), node.weight, node.bias))


class Reset(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        return "mine"


@pytest.mark.parametrize("make", [Reset, lambda *size: weight_norm(nn.Linear(*size))], ids=["reset", "parametrized"])
def test_a_subclass_that_computes_as_its_base_does_is_a_layer_of_that_type(make: Callable[..., nn.Module]) -> None:
    layer = make(3, 4)
    assert type(layer) is not nn.Linear
    assert isinstance(kind_of(layer), LinearConv)
    assert select_targets(layer).chosen[""] is layer


def test_a_lazy_layer_is_one_of_its_type_after_its_first_forward_pass() -> None:
    layer = nn.LazyConv2d(4, 3)
    layer(torch.randn(1, 2, 5, 5))
    assert isinstance(kind_of(layer), LinearConv)


@pytest.mark.parametrize(("size", "reason"), [(8, None), (4, "set `neuron_dim`")])
def test_the_last_layer_inside_a_module_is_not_believed_by_chance(size: int, reason: str | None) -> None:
    block = nn.Sequential(nn.Linear(4, 4), AlongOne(5, 4) if size == 4 else Causal(5, 4, 1))
    model = nn.ModuleDict({"block": block})
    attach(model, targets=["block"])
    x = torch.randn(2, 5, size)
    block[0] = nn.Linear(size, size)
    if reason is None:
        block(x)
        assert (block.dendrites.kind.neurons, block.dendrites.kind.dim) == (4, -2)
    else:
        with pytest.raises(ValueError, match=reason):
            block(x)


def test_sparse_dendrites_are_asked_of_it_in_vain() -> None:
    layer = AlongOne(8, 6)
    network = attach(layer, fan_in=2)
    layer(torch.randn(2, 8, 5))
    network.start_candidates(pool=2)
    assert network.keep_strongest() == []
    grow(layer, 0)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_finds_out_where_neurons_are() -> None:
    model = nn.Sequential(AlongOne(5, 5), nn.Flatten(), nn.Linear(25, 2))
    network = attach(model)
    torch.compile(model, backend="eager")(torch.randn(5, 5, 5))
    assert network.can_grow() == ["0", "2"]
    assert model[0].dendrites.kind.dim == -2
