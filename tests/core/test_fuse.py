"""A fused model does what the grown one does, and is nothing but PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import Form, Soma, UnitSet, attach, attach_shared, fuse
from pl_dendrites.core.fuse import fuse_with
from pl_dendrites.core.fusing.fetch import Few
from tests.core.helpers import grow, output_of, randomise
from tests.core.test_stacks import LAYERS_WITH_MIXTURES, make_layer, random_input
from tests.layer_table import Causal, Conv1D

ALONE = """
import sys
sys.modules["pl_dendrites"] = None
import torch
model, x, out = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(x), out)
"""


def is_plain(model: nn.Module) -> bool:
    """Whether it has neither hooks nor anything of this package."""
    return not any(
        type(part).__module__.startswith("pl_dendrites")
        or any(value for name, value in vars(part).items() if name.endswith("_hooks"))
        for part in model.modules()
    )


def assert_fused(model: nn.Module, *inputs: Tensor, compact: bool = False) -> nn.Module:
    """Fuse a model that was called before; its output, and itself, stay what they were."""
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        fused = fuse(model, compact=compact)
        torch.testing.assert_close(fused(*inputs), expected)
    assert is_plain(fused)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return fused


@pytest.mark.parametrize(("make", "shape", "forms"), LAYERS_WITH_MIXTURES)
def test_every_layer_with_every_mixture(
    make: Callable[[], nn.Module], shape: tuple[int, ...], forms: list[Form]
) -> None:
    layer, x = make_layer(make, forms), random_input(shape)
    for compact in (False, True):
        assert_fused(layer, x, compact=compact)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "gelu", "sharp_gelu"])
def test_every_activation(activation: str) -> None:
    forms = [Form(2, activation), Form(2, activation, fan_in=2, neurons=2), Form(1, activation)]
    for make in (lambda: nn.Linear(5, 4), lambda: nn.Conv1d(5, 4, 2), lambda: Sequence(nn.Linear(5, 4))):
        layer = make_layer(make, forms) if not isinstance(make(), Sequence) else grown(make(), ["0"], activation)
        assert_fused(layer, random_input((3, 5, 5)))


class Sequence(nn.Sequential):
    """A container of a type of its own."""


def grown(model: nn.Module, targets: list[str] | None, activation: str = "tanh", x: Tensor | None = None) -> nn.Module:
    """A model with two dendrites per neuron, random in every part."""
    model = model.double()
    randomise(model, 1)
    network = attach(model, targets, activation=activation)
    if x is not None:
        model.eval()(x)
    for name in network.targets:
        layer = model.get_submodule(name)
        grow(layer, 2)
    return model


@pytest.mark.parametrize("make", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_with_and_without_a_state(make: type[nn.RNNCellBase]) -> None:
    model, x = grown(make(5, 3), [""], x=random_input((4, 5))), random_input((4, 5))
    fused = assert_fused(model, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x, fused(x)), model(x, model(x)))


def test_copies_of_a_module_that_works_in_place() -> None:
    block = nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(5, 4), nn.BatchNorm1d(4))
    model = grown(nn.Sequential(nn.Linear(5, 5), block), ["1"], x=random_input((7, 5)))
    assert_fused(model, random_input((7, 5)))


def shared(model: nn.Module, around: str, x: Tensor, *sets: UnitSet) -> nn.Module:
    """A model with sets of shared dendrites, random in every part that is a number."""
    network = attach_shared(model, [around])
    for wanted in sets:
        model(x)
        network.set_next(wanted)
        network.start_candidates()
        (model(x) - 1).square().sum().backward()
        network.integrate()
    assert len(network.blocks) == len(sets)
    for _, block in network.blocks:
        randomise(block)
    return model.eval()


UNITS = UnitSet(units=5, field=2)
SETS = [[UNITS], [UNITS, UnitSet(units=3, field=2)], [UNITS, UnitSet(units=4, field=3, activation="relu", feeds=1)]]


@pytest.mark.parametrize("sets", SETS, ids=["one", "two", "of two kinds"])
def test_shared_dendrites(sets: list[UnitSet]) -> None:
    x = torch.randn(32, 20)
    for compact in (True, False):
        assert_fused(shared(Soma(20, 3), "", x, *sets), x, compact=compact)
        base = nn.Sequential(nn.Linear(20, 4), nn.ReLU(), nn.Linear(4, 3))
        assert_fused(shared(base, "", x, *sets), x, compact=compact)


def test_shared_dendrites_that_feed_few_of_many_outputs() -> None:
    x, wanted = torch.randn(32, 20), UnitSet(units=6, field=2, feeds=2)
    model = shared(Soma(20, 30), "", x, wanted, wanted)
    fused = assert_fused(model, x, compact=True)
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("few", "most"), [(Few.FETCHED, 1e-5), (Few.NARROW, 0.02), (Few.SPREAD, 1e-5)])
def test_fields_are_kept_as_they_are_best_for_what_runs_them(few: Few, most: float) -> None:
    x = torch.randn(64, 100)
    model = shared(Soma(100, 3), "", x, UnitSet(units=6, field=4))
    fused, out = fuse_with(model, few), model(x)
    assert (fused(x) - out).abs().max() < most * out.abs().max()
    kept = {value.dtype: value.numel() for value in fused.state_dict().values() if value.shape == (6, 4)}
    assert (torch.int8 in kept) is (few is Few.NARROW)
    assert max(value.numel() for value in fused.state_dict().values()) < 100, "no zeros are kept"
    assert ("scatter" in fused.code) is (few is not Few.FETCHED)


def test_shared_dendrites_around_images_and_other_positions() -> None:
    images = torch.randn(32, 1, 4, 4)
    assert_fused(shared(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "", images, UNITS), images)
    x = torch.randn(8, 5, 6)
    assert_fused(shared(nn.Sequential(nn.Linear(6, 3), nn.Tanh()), "", x, UNITS), x)


def test_shared_dendrites_around_what_has_grown_inside() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(32, 6)
    attach(model, ["0"])
    grow(model[0], 2)
    assert_fused(shared(model, "", x, UNITS), x)


def test_a_soma_without_dendrites() -> None:
    soma = nn.Sequential(Soma(4, 3))
    nn.init.normal_(soma[0].bias)
    assert_fused(soma, torch.randn(5, 4))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_is_folded_where_it_follows(affine: bool) -> None:
    for layer, norm, shape in (
        (nn.Linear(5, 4), nn.BatchNorm1d, (7, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
        (nn.ConvTranspose1d(3, 4, 3, bias=False), nn.BatchNorm1d, (2, 3, 5)),
    ):
        features = getattr(layer, "out_features", None) or layer.out_channels
        model = nn.Sequential(layer, norm(features, affine=affine), nn.ReLU())
        grown(model, ["0"])
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        assert not any(isinstance(part, norm) for part in assert_fused(model, random_input(shape)).modules())


class Residual(nn.Module):
    """Convolutions with normalisations in a forward of its own, as a ResNet has them."""

    def __init__(self, seen: bool = False, asks: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            *(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)),
            *(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)),
        )
        self.seen, self.asks = seen, asks

    def forward(self, x: Tensor) -> Tensor:
        before = self.conv1(x)
        out = self.bn2(self.conv2(self.bn1(before).relu()))
        if self.asks and out.sum() > 0:
            return out
        return out + x + (before if self.seen else 0)


@pytest.mark.parametrize(
    ("settings", "left"), [({}, []), ({"seen": True}, ["bn1"]), ({"asks": True}, ["bn1", "bn2"])], ids=str
)
def test_batch_normalisation_in_a_forward_of_ones_own(settings: dict[str, bool], left: list[str]) -> None:
    model = grown(Residual(**settings), ["conv1", "conv2"])
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_()
    fused = assert_fused(model, random_input((2, 3, 4, 4)))
    assert [name for name, part in fused.named_modules() if isinstance(part, nn.BatchNorm2d)] == left


def test_batch_normalisation_stays_where_something_else_comes_between_or_uses_the_layer() -> None:
    model = grown(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.BatchNorm1d(4)), ["0"])
    model[2].running_mean.normal_()
    assert isinstance(assert_fused(model, random_input((7, 5)))[2], nn.BatchNorm1d)
    layer = nn.Linear(5, 5)
    model = grown(nn.Sequential(layer, nn.BatchNorm1d(5), layer), ["0"])
    model[1].running_mean.normal_()
    assert isinstance(assert_fused(model, random_input((7, 5)))[1], nn.BatchNorm1d)


def test_a_transformer_layer_reads_no_weights_past_the_dendrites() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = grown(nn.TransformerEncoder(layer, 2), None)
    fused, x = fuse(model.eval()), random_input((3, 5, 8))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[0, 4] = True
        padded = [part(x, src_key_padding_mask=mask)[~mask] for part in (fused, model)]  # the rest is left to chance
        torch.testing.assert_close(*padded)


def test_gpt2s_linear_layer_and_layers_of_ones_own() -> None:
    assert_fused(grown(Conv1D(4, 5), [""]), random_input((2, 3, 5)))
    assert_fused(grown(Causal(3, 4, 3), [""], x=random_input((2, 3, 7))), random_input((2, 3, 7)))


def test_arguments_may_be_given_by_name_and_a_size_asked_for() -> None:
    layer, x = grown(nn.ConvTranspose2d(3, 4, 3, stride=2), [""]).eval(), random_input((2, 3, 5, 5))
    fused = fuse(layer)
    torch.testing.assert_close(fused(input=x, output_size=[12, 12]), layer(input=x, output_size=[12, 12]))


def test_a_layer_with_a_parametrized_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    assert_fused(grown(nn.Sequential(layer), ["0"]), random_input((7, 5)))


def test_what_cannot_be_fused_is_named_with_the_reason() -> None:
    model = grown(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), None)
    model[1].register_forward_hook(lambda layer, args, out: out * 2)
    with pytest.raises(ValueError, match=r"'1': it has hooks of its own"):
        fuse(model)
    block = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)))
    grown(block, ["0"], x=random_input((7, 5)))
    block[0].dendrites.kind.returns_tensor = None  # as of one that was loaded
    with pytest.raises(ValueError, match=r"'0': it is not known what it returns: call the model once"):
        fuse(block)


def test_a_file_of_it_loads_where_the_package_is_not_installed(tmp_path: Path) -> None:
    x = torch.randn(4, 9)
    model = nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    attach(model, ["0", "3"])
    for name in ("0", "3"):
        grow(model.get_submodule(name), 2)
    shared(model, "", x, UNITS)
    torch.save((assert_fused(model, x), x, model(x).detach()), tmp_path / "fused.pt")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "fused.pt")], check=True, cwd=tmp_path)


def test_its_graph_is_small_and_it_exports_with_any_batch() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    attach(model)
    for name in ("0", "2"):
        grow(model.get_submodule(name), 3)
    fused, x = fuse(model.eval()), torch.randn(4, 6)
    assert len(torch.export.export(fused, (x,)).graph.nodes) <= 45
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:2]), model(x[:2]))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_it_can_be_scripted() -> None:
    model, x = grown(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), None), random_input((2, 5))
    torch.testing.assert_close(torch.jit.script(assert_fused(model, x))(x), model(x))


def test_a_state_dict_of_a_fused_model_has_plain_tensors_alone() -> None:
    model = grown(nn.Sequential(nn.Linear(5, 4)), ["0"])
    assert all(isinstance(value, Tensor) for value in fuse(model).state_dict().values())
    assert output_of(fuse(model)(random_input((2, 5)))).requires_grad  # an ordinary network, which can be trained
