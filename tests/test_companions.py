"""The examples of companions: each has its control, and keeps what it promises while a network grows."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pl_dendrites import fuse
from pl_dendrites.controls import masks_of, parameters_left

COMPANIONS = Path(__file__).parents[1] / "examples" / "companions"

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports an example with little data, so that its phases are a moment."""
    monkeypatch.syspath_prepend(COMPANIONS)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what an example seeds is no other test's
    common = importlib.import_module("common")
    trainer = common.quiet_trainer
    monkeypatch.setattr(common, "quiet_trainer", lambda **arguments: trainer(limit_train_batches=3, **arguments))
    return importlib.import_module


def tiny(here: Any) -> Any:
    return here("common").Settings(epochs=4, correlation_epochs=1, dendrites=1)


def test_what_is_pruned_stays_so_while_it_grows_and_its_control_has_as_many_weights(here: Any) -> None:
    pruning, settings = here("pruning"), tiny(here)
    rows = pruning.compare(0, settings)
    assert rows["control: pruned alone, as many left"].size == rows["pruned, then grown"].size
    assert rows["control: pruned alone, as many left"].epochs == rows["pruned, then grown"].epochs

    model, cut = pruning.prune(pruning.LEFT, 7, 0)
    masks = {name: mask.clone() for name, mask in masks_of(model).items()}
    pruning.grow(model, settings)
    assert parameters_left(model) > cut.size == pruning.LEFT, "no set was accepted"
    for name, mask in masks.items():
        assert mask.logical_not().any()
        assert model.get_parameter(name)[~mask].count_nonzero() == 0


def values_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def test_a_teacher_stays_what_it_was_while_its_student_grows(here: Any) -> None:
    distillation, settings = here("distillation"), tiny(here)
    rows = distillation.compare(0, settings)
    grown, control = rows["student, grown"], rows["control: wider student, equal parameters"]
    assert abs(grown.size - control.size) <= 75 / 2  # half of what a hidden neuron takes
    assert grown.epochs == control.epochs

    teacher, _ = distillation.teach(0, settings)
    before = values_of(teacher)
    model = distillation.student(teacher, distillation.HIDDEN, 0)
    callback = here("common").growing(settings)
    here("common").fit(model, callback)
    assert callback.num_dendrites == 1
    assert set(callback.network.layers) == {"net.0", "net.2"}
    torch.testing.assert_close(values_of(model.teacher), before, rtol=0, atol=0)


def test_an_average_grows_with_its_network_and_goes_on_being_its_average(here: Any) -> None:
    recursive, settings = here("recursive"), tiny(here)
    rows = recursive.compare(0, settings)
    grown, control = rows["recursive, grown"], rows["control: wider block, equal parameters"]
    assert abs(grown.size - control.size) <= (3 * recursive.STATE + 1) / 2
    assert grown.epochs == control.epochs

    model = recursive.averaged(recursive.HIDDEN, 0)
    callback = here("common").growing(settings)
    here("common").fit(model, callback)
    assert callback.num_dendrites == 1
    before, own = values_of(model.average), values_of(model.net)
    assert list(before) == list(own)
    assert any("dendrites" in name for name in before)
    model.on_train_batch_end()
    trained = dict(model.net.named_parameters())
    goal = {n: model.decay * before[n] + (1 - model.decay) * own[n] if n in trained else before[n] for n in before}
    torch.testing.assert_close(values_of(model.average), goal)


def test_weights_have_three_bits_whichever_order_and_the_control_has_as_many(here: Any) -> None:
    quantised, settings = here("quantised"), tiny(here)
    rows = quantised.compare(0, settings)
    grown, control = rows["QAT before and after"], rows["control: plain, QAT, equal parameters"]
    assert abs(grown.size - control.size) <= 75 / 2
    assert grown.epochs == control.epochs

    model, _ = quantised.trained(0, settings, before=True, after=True)
    layers = [layer for layer in model.net.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 2
    for layer in layers:
        assert all(len(row.unique()) <= 2**quantised.BITS - 1 for row in layer.weight.detach())


def test_together_what_was_cut_stays_zero_in_three_bits(here: Any) -> None:
    together, settings = here("together"), tiny(here)
    rows = together.compare(0, settings)
    grown, control = rows["all together, grown"], rows["control: all together, not grown"]
    assert grown.epochs == control.epochs
    assert len(rows) == 6

    teacher, _ = here("distillation").teach(0, settings)
    net, _ = together.cut(teacher, together.LEFT, 7, 0)
    net, _ = together.grow(net, teacher, settings)
    assert parameters_left(net) > together.LEFT, "no set was accepted"
    model = together.in_bits(net, teacher, 2)
    masks = masks_of(model.average)
    assert masks
    assert any(not mask.all() for mask in masks.values())
    for name, mask in masks.items():
        assert model.average.get_parameter(name)[~mask].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that its tool will move
def test_the_tool_of_pytorch_is_for_what_was_fused(here: Any) -> None:
    common, settings = here("common"), tiny(here)
    tool = torch.ao.quantization
    of_weights = tool.QConfig(activation=torch.nn.Identity, weight=tool.default_weight_fake_quant)

    def prepared(net: torch.nn.Module) -> torch.nn.Module:
        net.qconfig = of_weights
        return tool.prepare_qat(net.train())

    before = common.Classifier(prepared(common.mlp(4)))
    for layer in (before.net[0], before.net[2]):
        layer.neuron_dim = -1
    common.fit(before, common.growing(settings))
    assert hasattr(before.net[0].dendrites[0].nodes[0], "weight_fake_quant")
    with pytest.raises(ValueError, match="it has hooks of its own"):
        fuse(before.net.eval())

    grown = common.Classifier(common.mlp(4))
    common.fit(grown, common.growing(settings))
    x = torch.randn(5, 64)
    goal, after = grown.net.eval()(x), prepared(fuse(grown.net))
    torch.testing.assert_close(after(x), goal, atol=0.05, rtol=0.05)  # eight bits
    after(x).square().sum().backward()
    layers = [layer for layer in after.modules() if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == [2 * 4, 2 * 10]  # the layers', and those of their dendrites
    assert all(hasattr(layer, "weight_fake_quant") and layer.weight.grad.any() for layer in layers)
