"""What tools that replace layers, or read their weights, do to a grown network, and to a fused one.

The table in docs/guides/export.md says the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization
from torch.nn.utils import fusion, parametrizations, prune
from torch.testing import assert_close

from pl_dendrites.core import attach, detach, fuse
from tests.core.conftest import DEVICE
from tests.core.helpers import grow, randomise
from tests.core.test_fuse import grown

pytestmark = [
    pytest.mark.skipif(DEVICE is not None, reason="tools make tensors where they like"),
    pytest.mark.filterwarnings("ignore"),  # most of these tools are about to be replaced
]

Tool = Callable[[nn.Module], nn.Module]


def network() -> tuple[nn.Module, Tensor]:
    """Convolution, normalisation, Linear; grown, and called in evaluation mode."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8)),
        nn.Linear(8, 3),
    )
    grown(model, None)
    for norm in (model[1], model[5]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.float().eval(), torch.randn(16, 3, 4, 4)


def off(answers: Tensor, expected: Tensor) -> float:
    """How far answers are from others, for each of which 1 is usual."""
    return ((answers - expected).square().mean().sqrt() / expected.std()).item()


def with_layers(model: nn.Module, first: int, made: nn.Module) -> nn.Module:
    # In the place of a layer and the normalisation after it.
    return nn.Sequential(*model[:first], made, nn.Identity(), *model[first + 2 :])


def static(model: nn.Module, x: Tensor) -> nn.Module:
    mapping = quantization.get_default_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_fx(model, mapping, (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared)


SILENT: dict[str, Tool] = {
    "fx.experimental.optimization.fuse": optimization.fuse,
    "fuse_conv_bn_eval": lambda m: with_layers(m, 0, fusion.fuse_conv_bn_eval(m[0], m[1])),
    "fuse_linear_bn_eval": lambda m: with_layers(m, 4, fusion.fuse_linear_bn_eval(m[4], m[5])),
    "fuse_modules": lambda m: quantization.fuse_modules(m, [["0", "1"]]),
}


@pytest.mark.parametrize("name", SILENT)
def test_merging_with_a_normalisation_makes_another_network(name: str) -> None:
    """Where this fails, the tool has learned better, and the guide may say so."""
    model, x = network()
    with torch.no_grad():
        assert off(SILENT[name](copy.deepcopy(model))(x), model(x)) > 0.1


def test_a_fused_network_has_nothing_left_to_merge() -> None:
    model, x = network()
    fused = fuse(model)
    assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in fused.modules())
    assert_close(optimization.fuse(fused)(x), model(x))


@pytest.mark.long
def test_static_quantisation_by_tracing_takes_the_plain_layers_alone() -> None:
    model, x = network()
    del model[1], model[3:]
    plain = copy.deepcopy(model)
    detach(plain)
    with torch.no_grad():
        answers = static(copy.deepcopy(model), x)(x)
        assert off(answers, plain(x)) < 0.1 < off(answers, model(x))
        assert off(static(fuse(model), x)(x), model(x)) < 0.1


REPLACED: dict[str, Tool] = {
    "quantize_dynamic": lambda m: quantization.quantize_dynamic(m, {nn.Linear}),
    "prepare_qat": lambda m: quantization.prepare_qat(prepared_for_qat(m)),
}


def prepared_for_qat(model: nn.Module) -> nn.Module:
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")
    return model


@pytest.mark.parametrize("name", REPLACED)
def test_what_takes_a_layers_place_with_its_hooks_refuses_and_names_fuse(name: str) -> None:
    model, x = network()
    with pytest.raises(ValueError, match=r"has taken the place of a layer that has dendrites.*pl_dendrites\.fuse"):
        REPLACED[name](copy.deepcopy(model))(x)
    with torch.no_grad():
        assert off(REPLACED[name](fuse(model)).eval()(x), model(x)) < 0.1


def test_recurrent_layers_too() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    attach(model)
    grow(model[0], 1)
    randomise(model[0])
    with pytest.raises(ValueError, match=r"pl_dendrites\.fuse"):
        quantization.quantize_dynamic(model, {nn.LSTM})(torch.randn(5, 2, 3))


def test_torchscript_names_fuse() -> None:
    with pytest.raises(ValueError, match=r"pl_dendrites\.fuse"):
        torch.jit.script(network()[0])


def test_code_that_passes_the_hooks_by_has_the_plain_layer() -> None:
    model, x = grown(nn.Sequential(nn.Linear(5, 4)), None), torch.randn(3, 5).double()
    plain = copy.deepcopy(model)
    detach(plain)
    layer = model[0]
    for answers in (layer.forward(x), nn.functional.linear(x, layer.weight, layer.bias)):
        assert_close(answers, plain(x))
        assert off(answers, model(x)) > 0.1


def masked(model: nn.Module) -> nn.Module:
    prune.custom_from_mask(model[4], "weight", torch.zeros_like(model[4].weight))
    return model


def normed(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[4])
    return model


def swapped(model: nn.Module) -> nn.Module:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[4].weight.zero_()
    return model


KEPT: dict[str, tuple[Tool, Tool]] = {
    "prune": (masked, zeroed),
    "parametrizations": (normed, lambda m: m),
    "deepcopy": (copy.deepcopy, lambda m: m),
    "swap_tensors": (swapped, lambda m: m),
    "SyncBatchNorm": (nn.SyncBatchNorm.convert_sync_batchnorm, lambda m: m),
    "symbolic_trace": (torch.fx.symbolic_trace, lambda m: m),
    "freeze": (lambda m: torch.jit.freeze(torch.jit.trace(m, torch.randn(16, 3, 4, 4))), lambda m: m),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_leaves_layers_where_they_are_keeps_dendrites(name: str) -> None:
    (tool, same), (model, x) = KEPT[name], network()
    with torch.no_grad():
        expected = same(copy.deepcopy(model))(x)
        assert_close(tool(copy.deepcopy(model))(x), expected)
