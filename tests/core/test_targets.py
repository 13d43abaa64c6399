"""Which layers receive dendrites, and what a user is told about the others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from pl_dendrites.core import attach, detach
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.targets import select_targets
from tests.core.helpers import grow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2))
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU())])
        self.up = nn.EmbeddingBag(8, 8)
        self.head = nn.Linear(8, 2)


ALL = ["encoder.0", "encoder.2", "blocks.0", "blocks.1.0", "head"]


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        pytest.param(None, [], ALL, id="default"),
        pytest.param(["*"], [], ALL, id="star"),
        pytest.param(["head"], [], ["head"], id="name"),
        pytest.param(["encoder.*"], [], ["encoder.0", "encoder.2"], id="glob"),
        pytest.param(["blocks.*"], [], ["blocks.0", "blocks.1.0"], id="glob-goes-deep"),
        pytest.param(["encoder.[0-1]"], [], ["encoder.0"], id="set"),
        pytest.param(["Conv2d"], [], ["encoder.0", "encoder.2"], id="type"),
        pytest.param(["Linear", "encoder.2"], [], ["encoder.2", "blocks.0", "blocks.1.0", "head"], id="type-and-name"),
        pytest.param(["head", "h*", "Linear"], ["blocks.*"], ["head"], id="overlapping"),
        pytest.param(None, ["Linear"], ["encoder.0", "encoder.2"], id="exclude-type"),
        pytest.param(None, ["*.0"], ["encoder.2", "head"], id="exclude-glob"),
        pytest.param(["Linear"], ["head"], ["blocks.0", "blocks.1.0"], id="exclude-name"),
    ],
)
def test_names_globs_and_types_choose_in_the_order_of_the_model(
    targets: Sequence[str] | None, exclude: Sequence[str], expected: list[str]
) -> None:
    model = Net()
    chosen = select_targets(model, targets, exclude).chosen
    assert list(chosen) == expected
    assert all(model.get_submodule(name) is layer for name, layer in chosen.items())
    assert list(attach(model, targets, exclude).layers) == expected


THERE = r"Layers that can: 'encoder.0' \(Conv2d\), 'encoder.2' \(Conv2d\), 'blocks.0' \(Linear\), .*, 'head' \(Linear\)"


@pytest.mark.parametrize(
    ("targets", "exclude", "messages"),
    [
        pytest.param(["decoder.*"], [], [r"`targets`: .*\['decoder.\*'\]", THERE], id="unknown"),
        pytest.param(["head", "tail"], [], [r"`targets`: .*\['tail'\]", THERE], id="one-of-two-unknown"),
        pytest.param(["Head"], [], [r"\['Head'\]", THERE], id="case"),
        pytest.param(["Module"], [], [r"\['Module'\]", THERE], id="the-base-of-all"),
        pytest.param(None, ["decoder"], [r"`exclude`: .*\['decoder'\]", THERE], id="unknown-exclude"),
        pytest.param(
            ["encoder.1"],
            [],
            [r"'encoder.1' \(BatchNorm2d\): it has no weight matrix", THERE],
            id="near-miss",
        ),
        pytest.param(
            ["EmbeddingBag"], [], [r"'up' \(EmbeddingBag\): an embedding has no input", THERE], id="near-type"
        ),
        pytest.param(
            ["blocks"],
            [],
            ["To mean the layers inside it, write 'blocks.*'", r"'blocks' \(ModuleList\): it holds modules"],
            id="container",
        ),
        pytest.param(None, ["encoder"], [r"`exclude`: .*write 'encoder.\*'"], id="exclude-container"),
        pytest.param(["head"], ["Linear"], [r"`targets`: .*\['head'\] without \['Linear'\]", THERE], id="nothing-left"),
        pytest.param(None, ["*"], [r"every supported layer without \['\*'\]", THERE], id="all-excluded"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_layers_there_are(
    targets: Sequence[str] | None, exclude: Sequence[str], messages: list[str]
) -> None:
    model = Net()
    with pytest.raises(ValueError, match="no layer can have dendrites for") as error:
        attach(model, targets, exclude)
    for message in messages:
        assert error.match(message)
    assert not any(hasattr(module, "dendrites") or module._forward_hooks for module in model.modules())


def test_a_pattern_that_names_no_container_gets_no_hint() -> None:
    for pattern in ("decoder", "encoder.1"):
        with pytest.raises(ValueError, match="no layer can") as error:
            select_targets(Net(), [pattern])
        assert "To mean" not in str(error.value)


def test_a_model_without_any_layer_says_so() -> None:
    with pytest.raises(ValueError, match=r"every supported layer\.\nLayers that can: none"):
        attach(nn.Sequential(nn.LayerNorm(3), nn.ReLU()))
    with pytest.raises(ValueError, match=r"\n  '0' \(Embedding\): an embedding has no input .*\nLayers that can: none"):
        attach(nn.Sequential(nn.Embedding(3, 3), nn.ReLU()))


def test_a_name_means_that_layer_even_if_it_is_also_a_pattern_or_a_type() -> None:
    model = nn.ModuleDict({"Linear": nn.Linear(2, 2), "a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})
    assert list(select_targets(model, ["Linear"]).chosen) == ["Linear"]
    assert list(select_targets(model, ["a[0]"]).chosen) == ["a[0]"]
    assert list(select_targets(model, exclude=["a[0]"]).chosen) == ["Linear", "a0"]


def test_subclasses_of_a_type_are_of_that_type() -> None:
    model = nn.Sequential(OwnLinear(2, 2), nn.Linear(2, 2))
    assert list(select_targets(model, ["Linear"]).chosen) == ["0", "1"]
    assert list(select_targets(model, ["OwnLinear"]).chosen) == ["0"]


class GRU(nn.Module):
    """Called like the layer in it, as many are."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 3), nn.Linear(3, 2)


def test_a_type_name_means_the_layers_of_that_type_before_a_module_that_is_called_so_too() -> None:
    model = nn.Sequential(GRU(), nn.GRU(2, 3))
    assert list(select_targets(model, ["GRU"]).chosen) == ["0.gru", "1"]
    assert list(select_targets(model, ["GRU", "Linear"]).chosen) == ["0.gru", "0.head", "1"]
    assert list(select_targets(model, exclude=["GRU"]).chosen) == ["0.head"]
    assert list(select_targets(model, ["0"]).chosen) == ["0"]
    model[0].gru = model[1] = nn.Identity()
    assert list(select_targets(model, ["GRU"]).chosen) == ["0"]


def test_attention_is_left_alone_with_a_reason_and_the_rest_of_a_transformer_is_not() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    selection = select_targets(model)
    assert list(selection.chosen) == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    projection = "nn.MultiheadAttention uses its weights and never calls it"
    whole = "it grows only where `targets` names it: its dendrites are then copies of it"
    reasons = {"self_attn": whole, "self_attn.out_proj": projection}
    assert selection.skipped == {f"layers.{i}.{name}": reason for i in (0, 1) for name, reason in reasons.items()}
    assert attach(model).skipped == selection.skipped


def lazy() -> nn.Module:
    return nn.LazyLinear(4)


def integers() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


def own_attribute() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.dendrites = "the user's"
    return layer


def own_module() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.dendrites = nn.Linear(4, 4)
    return layer


@pytest.mark.parametrize(
    ("make", "reason", "others"),
    [
        (lazy, "its size is not known before its first forward pass", ["1"]),
        (integers, "its weight is of type torch.int8, not floating point", ["1"]),
        (own_attribute, "it already has an attribute named 'dendrites'", ["1"]),
        (own_module, "it already has an attribute named 'dendrites'", ["0.dendrites", "1"]),
    ],
)
def test_a_layer_that_cannot_is_left_alone_with_the_reason(make: type, reason: str, others: list[str]) -> None:
    model = nn.Sequential(make(), nn.Linear(4, 4))
    before = getattr(model[0], "dendrites", None)
    selection = select_targets(model)
    assert list(selection.chosen) == others
    assert selection.skipped == {"0": reason}
    with pytest.raises(ValueError, match=f"'0' .*: {reason}"):
        select_targets(model, ["0"])
    attach(model)
    assert getattr(model[0], "dendrites", None) is before


def test_a_lazy_layer_can_once_it_knows_its_size() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyConv1d(2, 3))
    with pytest.raises(ValueError, match="its size is not known"):
        attach(model)
    model[0](torch.zeros(1, 3))
    assert list(attach(model).layers) == ["0"]


FROZEN = "its parameters are frozen: name it in `targets` to let it grow"


def test_a_frozen_layer_grows_only_where_it_is_asked_for() -> None:
    model = Net()
    model.encoder.requires_grad_(False)
    model.blocks[0].weight.requires_grad_(False)  # its bias still learns
    selection = select_targets(model)
    assert list(selection.chosen) == ["blocks.0", "blocks.1.0", "head"]
    assert {name: selection.skipped[name] for name in ("encoder.0", "encoder.2")} == dict.fromkeys(
        ("encoder.0", "encoder.2"), FROZEN
    )
    assert list(select_targets(model, ["encoder.*", "head"]).chosen) == ["encoder.0", "encoder.2", "head"]
    assert list(select_targets(model, exclude=["encoder.*"]).chosen) == ["blocks.0", "blocks.1.0", "head"]
    with pytest.raises(ValueError, match=f"'encoder.0' .*: {FROZEN}"):
        select_targets(model.requires_grad_(False))


def test_all_frozen_layers_are_meant_by_a_word() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"for every frozen layer\.\n.*'encoder.0' .*: it is trainable"):
        select_targets(model, "frozen")
    model.encoder.requires_grad_(False)
    model.blocks[0].weight.requires_grad_(False)  # its bias still learns
    selection = select_targets(model, "frozen")
    assert list(selection.chosen) == ["encoder.0", "encoder.2"]
    assert selection.skipped["head"] == "it is trainable, and `targets` means the frozen layers"
    assert list(select_targets(model, "frozen", exclude=["encoder.0"]).chosen) == ["encoder.2"]
    network = attach(model, "frozen", live=True)
    network.grow(network.targets)
    assert list(select_targets(model, "frozen").chosen) == ["encoder.0", "encoder.2"], "whatever of their dendrites is"


def test_a_frozen_layer_with_dendrites_that_learn_is_still_frozen() -> None:
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    attach(model, targets=["0"])
    grow(model[0], 2)
    assert list(select_targets(model).chosen) == ["1"]


def test_layers_asked_for_by_a_glob_are_reported_where_they_cannot() -> None:
    skipped = select_targets(Net(), ["encoder.*"]).skipped
    assert skipped == {"encoder.1": "it has no weight matrix"}


def test_dendrites_are_no_targets_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network = attach(model, targets=["0"])
    grow(model[0], 2)
    assert list(network.layers) == ["0"]
    assert list(select_targets(model).chosen) == list(select_targets(model, ["*"]).chosen) == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", ""),
        ("_orig_mod", ""),
        ("net._orig_mod.0", "net.0"),
        ("_orig_mod.net.0", "net.0"),
        ("net._orig_mod", "net"),
        ("my_orig_mod.x", "my_orig_mod.x"),
    ],
)
def test_names_are_those_that_the_author_knows(name: str, expected: str) -> None:
    assert plain_name(name) == expected


@pytest.mark.parametrize("where", ["whole", "part", "layer"])
def test_a_compiled_model_is_named_grown_and_detached_as_if_it_were_not(where: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    if where == "whole":
        model = torch.compile(model)
    elif where == "part":
        model[0] = torch.compile(model[0])
    else:
        model[0][0] = torch.compile(model[0][0])
    keys = list(model.state_dict())
    network = attach(model, targets=["0.*"])
    assert list(network.layers) == ["0.0"]
    detach(model)
    assert list(model.state_dict()) == keys
    network = attach(model)
    assert list(network.layers) == ["0.0", "1"]
    network.grow(["0.0"])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value for key, value in state.items() if "dendrites" not in key})
    assert network.num_dendrites == 0
    model.load_state_dict(state)
    assert network.num_dendrites == 1
    detach(model)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_a_text_is_not_read_letter_by_letter(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be a list of names or patterns.*, got 'Linear'"):
        select_targets(nn.Sequential(nn.Linear(2, 2)), **{argument: "Linear"})


class Renaming(nn.Linear):
    def forward(self, hidden: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return super().forward(hidden) * scale


def test_a_subclass_may_call_its_input_as_it_likes() -> None:
    layer, x = Renaming(3, 2), torch.randn(4, 3)
    attach(layer)
    layer(x)
    grow(layer, 1)
    assert torch.equal(layer(scale=1.0, hidden=x), layer(x))
    assert not torch.equal(layer(x), layer.forward(x))
