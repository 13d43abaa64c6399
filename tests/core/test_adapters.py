"""Layers that an adapter wraps, and the adapter's own, are left alone unless they are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import attach, restore_structure, select_targets


class LoraLinear(nn.Module):
    """As peft has it."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class WithoutBase(nn.Module):
    """As torchtune has it: the weight is the module's own."""

    def __init__(self, inputs: int, neurons: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(neurons, inputs), requires_grad=False)
        self.lora_a, self.lora_b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, neurons, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.lora_b(self.lora_a(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = LoraLinear(nn.Linear(3, 4)), WithoutBase(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


PARTS = ["first.base_layer", "first.lora_A.default", "first.lora_B.default", "second.lora_a", "second.lora_b"]


@pytest.mark.parametrize("targets", [None, ["*"], ["Linear"]])
def test_parts_of_an_adapter_are_left_alone_with_the_reason(targets: list[str] | None) -> None:
    selection = select_targets(Net(), targets)
    assert list(selection.chosen) == ["head"]
    for name in PARTS:
        wrapper = name.partition(".")[0]
        assert f"it is a part of '{wrapper}', a " in selection.skipped[name]
        assert "knows no dendrites" in selection.skipped[name]


def test_a_glob_names_no_part() -> None:
    with pytest.raises(ValueError, match=r"'first.base_layer' .*: it is a part of 'first'"):
        select_targets(Net(), ["first.*"])


def test_a_part_that_is_named_grows_and_comes_back() -> None:
    model = Net()
    network = attach(model, targets=["first.lora_B.default", "first.base_layer"])
    assert network.targets == ["first.base_layer", "first.lora_B.default"]
    network.grow(network.targets)
    fresh = Net()
    assert restore_structure(fresh, model.state_dict()).num_dendrites == 1
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("targets", [["first"], ["LoraLinear"]])
def test_the_wrapped_layer_grows_as_one_where_it_is_named(targets: list[str]) -> None:
    model = Net()
    network = attach(model, targets=targets)
    assert network.targets == ["first"]
    model(torch.randn(5, 3))
    network.start_candidates(pool=2)
    model(torch.randn(5, 3)).square().sum().backward()
    assert list(network.integrate()) == ["first"]


def test_a_model_of_nothing_but_adapters_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"'0.lora_A.default' \(Linear\): it is a part of '0', a LoraLinear that wraps"
    ):
        attach(nn.Sequential(LoraLinear(nn.Linear(3, 4))))


def test_the_adapters_of_the_package_itself() -> None:
    peft = pytest.importorskip("peft")

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu())

    model = peft.get_peft_model(
        Base(), peft.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["fc2"], lora_alpha=8)
    )
    selection = select_targets(model)
    assert list(selection.chosen) == ["base_model.model.fc2.modules_to_save.default"]
    assert "wraps a layer" in selection.skipped["base_model.model.fc1.lora_A.default"]
    assert "wraps a layer" in selection.skipped["base_model.model.fc1.base_layer"]
