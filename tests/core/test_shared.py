"""Shared dendrites: what they compute, where they come from, and how their fields move."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.core import attach, detach, restore_structure
from pl_dendrites.core.fields.choose import choose_units
from pl_dendrites.core.fields.product import field_product
from pl_dendrites.core.fields.sample import Reservoir
from pl_dendrites.core.growth.shared_block import SharedBlock
from pl_dendrites.core.shared import SharedNetwork, attach_shared
from pl_dendrites.core.structure import grow_on_load
from pl_dendrites.core.unit_set import UnitSet
from tests.core.helpers import FUNCTIONS


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def data(samples: int = 96, inputs: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, inputs)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long()


def ready(model: nn.Module, wanted: UnitSet, around: tuple[str, ...] = ("",), x: Tensor | None = None) -> SharedNetwork:
    """A network that takes samples."""
    network = attach_shared(model, around)
    model(data()[0] if x is None else x)
    network.set_next(wanted)
    network.start_candidates(pool=8)
    return network


def grown(model: nn.Module, wanted: UnitSet | None = None, around: tuple[str, ...] = ("",)) -> SharedNetwork:
    network = ready(model, wanted or UnitSet(units=6, field=3), around)
    loss_of(model, *data()).backward()
    network.integrate()
    for _, block in network.blocks:
        nn.init.normal_(block.out)
    return network


def reference(block: SharedBlock, x: Tensor, own: Tensor) -> Tensor:
    """The formula, unit by unit."""
    out = own.clone()
    for m in range(block.form.units):
        potential = sum(w * x[:, i] for w, i in zip(block.weight[m], block.field[m].tolist(), strict=True))
        unit = FUNCTIONS["sharp_gelu"](potential + block.bias[m])
        for place, c in enumerate(range(out.shape[1]) if block.feeds is None else block.feeds[m].tolist()):
            out[:, c] = out[:, c] + block.out[m, place] * unit
    return out


@pytest.mark.parametrize("feeds", [None, 2])
@pytest.mark.parametrize("around", ["", "2"])
def test_outputs_and_gradients_are_those_of_the_formula(feeds: int | None, around: str) -> None:
    model = small()
    network = grown(model, UnitSet(units=4, field=3, feeds=feeds), (around,))
    (block,) = network.layers[around].shared
    x = torch.randn(7, 12)
    plain = detach(copy.deepcopy(model))
    before = plain[:2](x) if around else x
    expected = reference(block, before, plain(x))
    assert torch.allclose(model(x), expected, atol=1e-5)
    own = torch.autograd.grad(model(x).square().sum(), [block.weight, block.bias, block.out])
    others = torch.autograd.grad(expected.square().sum(), [block.weight, block.bias, block.out])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("inputs", [6, 60])
def test_both_products_can_be_differentiated_twice(inputs: int) -> None:
    field = torch.stack([torch.randperm(inputs)[:1] for _ in range(3)])
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, inputs), (3, 1), (3,)))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    dense = torch.zeros(3, inputs, dtype=torch.float64).scatter(1, field, weight.detach())
    assert torch.allclose(field_product(x, field, weight, bias), F.linear(x, dense, bias))
    assert torch.autograd.gradcheck(lambda *given: field_product(given[0], field, *given[1:]), leaves)
    assert torch.autograd.gradgradcheck(lambda *given: field_product(given[0], field, *given[1:]), leaves)


def test_new_units_change_no_output_and_cost_what_they_say() -> None:
    model, (x, _) = small(), data()
    before, parameters = model(x), sum(p.numel() for p in model.parameters())
    network = ready(model, UnitSet(units=6, field=4))
    loss_of(model, *data()).backward()
    worth = network.integrate()
    assert torch.equal(model(x), before)
    assert sum(p.numel() for p in model.parameters()) == parameters + 6 * (4 + 1 + 3)
    assert worth[""].shape == (6,)
    assert (worth[""] >= 0).all()


def test_the_network_stands_still_and_is_free_again() -> None:
    model = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    network = ready(model, UnitSet())
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of(model, *data()).backward()
    assert all(p.grad is None for p in model.parameters())
    network.discard()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("feeds", [None, 2])
@pytest.mark.parametrize("around", ["", "2"])
def test_a_fresh_model_grows_to_fit_what_was_saved(feeds: int | None, around: str) -> None:
    model, (x, _) = small(), data()
    grown(model, UnitSet(units=4, field=3, feeds=feeds), (around,))
    fresh = small()
    grow_on_load(fresh)
    assert fresh.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(fresh(x), model(x))
    restored = small()
    restore_structure(restored, model.state_dict())
    narrow = {k: v if v.is_floating_point() else v.to(torch.int16) for k, v in model.state_dict().items()}
    for state, assign in ((model.state_dict(), False), (narrow, True)):
        restored.load_state_dict(state, assign=assign)
        assert torch.equal(restored(x), model(x))
        assert restored.get_submodule(around).dendrites[0].field.dtype == torch.int32
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_model_loses_them_again() -> None:
    model, (x, _) = small(), data()
    before, plain = model(x), dict(model.state_dict())
    grown(model)
    assert not torch.equal(model(x), before)
    model.load_state_dict(plain)
    assert torch.equal(model(x), before)
    detach(model)
    assert list(model.state_dict()) == list(plain)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("field", torch.full((6, 3), 12)),
        ("field", torch.full((6, 3), -1)),
        ("field", torch.zeros(6, 3, dtype=torch.int64)),
        ("field", torch.zeros(6, 3)),
        ("field", torch.zeros(3, 6, dtype=torch.int64)),
        ("weight", torch.zeros(6, 4)),
        ("bias", torch.zeros(5)),
        ("out", torch.zeros(6, 2)),
        ("code", torch.tensor([9, 1, 12, 3])),
        ("code", torch.tensor([0, 1, 2, 3])),
        ("code", torch.tensor([0, 1, 12, 4])),
        ("code", torch.tensor([0, 1])),
        ("weight", torch.zeros(1).expand(6, 3)),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_the_model_left_as_it_was(entry: str, value: Tensor) -> None:
    model = small()
    grown(model)
    state = {**model.state_dict(), f"dendrites.0.{entry}": value}
    fresh = small()
    grow_on_load(fresh)
    with pytest.raises(ValueError, match="does not fit"):
        fresh.load_state_dict(state)
    assert not hasattr(fresh, "dendrites")


def test_private_and_shared_dendrites_hang_side_by_side() -> None:
    model, (x, _) = small(), data()
    private = attach(model, targets=["2"], live=True)
    private.grow(["2"])
    network = grown(model, around=("2",))
    private.grow(["2"])
    nn.init.ones_(network.layers["2"].private[-1].weights[-1])
    fresh = small()
    grow_on_load(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert private.num_dendrites == 2


def test_samples_are_the_inputs_and_the_errors_of_training_alone() -> None:
    model, (x, y) = small(), data()
    network = attach_shared(model)
    out = model(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(out, y), out)
    network.start_candidates()
    watch = network.layers[""].watch
    assert watch is not None
    watch.listening = False
    loss_of(model, x.flip(0), y)  # a validation that takes gradients
    watch.listening = True
    with torch.no_grad():
        model(x)
    loss_of(model, x, y).backward()
    inputs, errors = watch.reservoir.rows()
    assert torch.equal(inputs, x)
    assert torch.allclose(errors, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_sample_of_a_short_batch_counts_as_any_other(reduction: str) -> None:
    x, errors = torch.randn(240, 3), torch.randn(240, 2)
    reservoir = Reservoir(500, 0)
    for batch in (slice(0, 100), slice(100, 200), slice(200, 240)):
        size = batch.stop - batch.start
        reservoir.add(x[batch], errors[batch] / (size if reduction == "mean" else 1))
    _, kept = reservoir.rows()
    ratio = kept / errors
    assert torch.allclose(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-4)


def test_a_reservoir_keeps_each_sample_with_the_same_chance() -> None:
    counts = torch.zeros(60)
    for seed in range(100):
        reservoir = Reservoir(20, seed)
        for batch in torch.arange(60.0).split(16):
            reservoir.add(batch[:, None], torch.ones(len(batch), 1))
        counts[reservoir.rows()[0].flatten().long()] += 1
    assert counts.sum() == 100 * 20
    assert counts.min() > 14
    assert counts.max() < 55  # 33 expected, with a deviation of 5


def test_saved_samples_take_no_more_memory_than_they_have_until_others_are_like_them() -> None:
    reservoir = Reservoir(10**6)
    saved = {"inputs": torch.zeros(1, 10**4), "errors": torch.ones(1, 2), "batch": torch.ones(1)}
    reservoir.load_state_dict({**saved, "seen": torch.tensor([1]), "kept": torch.tensor([1])})
    assert reservoir.rows()[0].shape == (1, 10**4)
    with pytest.raises(ValueError, match="10000 numbers each"):
        reservoir.add(torch.ones(3, 5), torch.ones(3, 2))


def test_padding_is_no_sample() -> None:
    reservoir = Reservoir(10, 0)
    reservoir.add(torch.randn(2, 3, 4), torch.tensor([[[1.0], [0.0], [2.0]], [[0.0], [0.0], [float("nan")]]]))
    assert reservoir.rows()[1].flatten().tolist() == [1.0, 2.0]


def test_fields_are_inputs_that_vary_together() -> None:
    model = nn.Linear(24, 2)
    x = torch.randn(300, 6).repeat_interleave(4, 1) + 0.1 * torch.randn(300, 24)
    x[:, :4] = 1.0  # never vary
    network = ready(model, UnitSet(units=5, field=4), x=x)
    F.cross_entropy(model(x), (x[:, 8] > 0).long()).backward()
    network.integrate()
    groups = model.dendrites[0].field // 4
    assert (groups == groups[:, :1]).all()
    assert (groups > 0).all()


def test_the_greedy_choice_takes_what_least_squares_says() -> None:
    x, errors = torch.randn(200, 15), torch.randn(200, 3)
    errors = errors + x[:, :3]
    errors = errors - errors.mean(0)
    chosen, worth = choose_units(x, errors, 6)
    centred = (x - x.mean(0)).double()[:, chosen]
    left = errors.double() - centred @ torch.linalg.lstsq(centred, errors.double()).solution
    assert worth.sum().item() == pytest.approx(1 - (left.square().sum() / errors.square().sum()).item(), abs=1e-5)
    assert (worth.diff() <= 1e-6).all()
    alone = torch.corrcoef(torch.cat([x, errors], 1).T)[:15, 15:].square() @ errors.square().sum(0)
    assert chosen[0] == alone.argmax()
    assert chosen.unique().numel() == 6


def test_inputs_with_the_largest_gradient_enter_at_zero_and_the_weakest_leave() -> None:
    model, (x, y) = nn.Linear(12, 3), data(inputs=12)
    x[:, 11] = 5.0
    network = ready(model, UnitSet(units=4, field=4))
    loss_of(model, x, y).backward()
    network.integrate()
    block = model.dendrites[0]
    nn.init.normal_(block.out)
    field, weight = block.field.clone(), block.weight.detach().clone()
    # The reference: gradients of weights for all inputs, centred, by autograd on a dense layer of the same values.
    dense = torch.zeros(4, 12).scatter(1, field, weight).requires_grad_()
    centred = x - x.mean(0)
    potential = centred @ dense.T + (dense @ x.mean(0)).detach() + block.bias.detach()
    out = detach(copy.deepcopy(model))(x) + FUNCTIONS["sharp_gelu"](potential) @ block.out.detach()
    (gain,) = torch.autograd.grad(F.cross_entropy(out, y), dense)
    network.look()
    loss_of(model, x, y).backward()
    network.rewire(share=0.5)
    deviation = x.std(0, correction=0)
    for m in range(4):
        strength = weight[m].abs() * deviation[field[m]]
        stays = set(field[m][strength.argsort()[2:]].tolist())
        absent = [i for i in range(11) if i not in field[m].tolist()]
        enters = set(sorted(absent, key=lambda i, m=m: -gain[m, i].abs().item())[:2])
        assert set(block.field[m].tolist()) == stays | enters
        new = torch.tensor([i in enters for i in block.field[m].tolist()])
        assert (block.weight[m][new] == 0).all()
        assert torch.equal(block.weight[m][~new], weight[m][~new])


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "RMSprop", "Adamax"])
def test_what_an_optimizer_remembers_of_an_entry_that_moved_starts_anew(name: str) -> None:
    settings: dict[str, Any] = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}.get(name, {})
    model, (x, y) = nn.Linear(12, 3), data()
    network = ready(model, UnitSet(units=4, field=3))
    loss_of(model, x, y).backward()
    network.integrate()
    block = model.dendrites[0]
    nn.init.normal_(block.out)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **settings)
    for _ in range(2):
        optimizer.zero_grad()
        network.look()
        loss_of(model, x, y).backward()
        optimizer.step()
    before = block.field.clone()
    kept = {key: value.clone() for key, value in optimizer.state[block.weight].items() if isinstance(value, Tensor)}
    network.rewire(0.4, [optimizer])
    moved = block.field != before
    assert moved.sum(1).tolist() == [1] * 4
    like = [key for key, value in kept.items() if value.shape == moved.shape]
    assert like
    for key in like:
        value = optimizer.state[block.weight][key]
        assert (value[moved] == 0).all()
        assert torch.equal(value[~moved], kept[key][~moved])


def test_units_that_feed_some_outputs_rewire_these_too() -> None:
    model, (x, y) = nn.Linear(12, 3), data()
    network = grown(model, UnitSet(units=8, field=3, feeds=1))
    block = model.dendrites[0]
    before = block.feeds.clone()
    network.look()
    loss_of(model, x, y).backward()
    network.rewire(0.5)
    moved = block.feeds != before
    assert moved.all()
    assert (block.out[moved] == 0).all()


def test_frozen_units_let_no_gradient_into_fields_or_inputs() -> None:
    model, (x, y) = small(), data()
    network = grown(model, UnitSet(units=4, field=3, live=False), ("2",))
    (block,) = network.layers["2"].shared
    loss_of(model, x, y).backward()
    assert block.out.grad is not None
    assert block.weight.grad is None
    plain = detach(copy.deepcopy(model))
    own = model[0].weight.grad
    out = plain(x)
    units = (model(x) - out).detach()
    plain.zero_grad()
    F.cross_entropy(out + units, y).backward()
    assert torch.allclose(own, plain[0].weight.grad, atol=1e-6)


def test_images_are_seen_as_one_vector_each() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 3))
    x = torch.randn(16, 1, 6, 6)
    network = ready(model, UnitSet(units=3, field=4), x=x)
    loss_of(model, x, torch.randint(3, (16,))).backward()
    network.integrate()
    assert model.dendrites[0].form.inputs == 36


@pytest.mark.parametrize(
    ("module", "around", "reason"),
    [
        (nn.Sequential(nn.ReLU()), "", "no parameters"),
        (nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), "0", "never called"),
        (nn.Linear(2, 2), "head", "names of modules"),
    ],
)
def test_what_they_cannot_hang_around_is_refused(module: nn.Module, around: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        attach_shared(module, (around,))


def test_a_module_whose_neurons_are_channels_is_left_alone_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    network = attach_shared(model)
    model(torch.randn(2, 3, 5, 5))
    with pytest.raises(RuntimeError, match="dimension -3"):
        network.start_candidates()


def test_a_budget_without_room_for_a_unit_is_told() -> None:
    model, (x, y) = small(), data()
    network = attach_shared(model)
    model(x)
    network.set_next(UnitSet(field=4), max_parameters=sum(p.numel() for p in model.parameters()) + 7)
    network.start_candidates()
    loss_of(model, x, y).backward()
    assert network.integrate() == {}
    assert "no room" in network.skipped[""]


def test_sets_of_a_budget_double() -> None:
    model, (x, y) = small(), data()
    network = attach_shared(model)
    model(x)
    network.set_next(UnitSet(field=4), max_parameters=sum(p.numel() for p in model.parameters()) + 8 * 7, sets=3)
    for _ in range(3):
        network.start_candidates()
        loss_of(model, x, y).backward()
        network.integrate()
    assert [block.form.units for _, block in network.blocks] == [1, 2, 4]


def test_modules_share_a_budget_and_very_many_units_need_no_choice() -> None:
    model, (x, y) = small(), data()
    network = attach_shared(model, ("0", "2"))
    model(x)
    own = sum(p.numel() for p in model.parameters())
    network.set_next(UnitSet(field=4), max_parameters=own + 100_000)
    network.start_candidates(pool=8)
    loss_of(model, x, y).backward()
    network.integrate()
    added = {name: sum(p.numel() for p in block.parameters()) for name, block in network.blocks}
    assert all(49_900 < count <= 50_000 for count in added.values())
    assert model[2].dendrites[0].form.units > 4096


def test_they_learn_what_their_base_cannot() -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(12, 3), data(300)
    network = attach_shared(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def train(steps: int) -> float:
        for step in range(steps):
            if step % 20 == 0:
                network.look()
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                network.rewire(0.3, [optimizer])
        return loss.item()

    alone = train(150)
    network.set_next(UnitSet(units=8, field=4))
    network.start_candidates(pool=8)
    loss_of(model, x, y).backward()
    network.integrate()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    assert train(250) < 0.7 * alone


class Pooling(nn.Module):
    """Every second position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, ::2])


@pytest.mark.parametrize(
    ("module", "x", "says"),
    [
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.arange(9)[None], "no tensor of numbers.*token ids"),
        (Pooling(), torch.randn(2, 6, 4), r"maps \(2, 6, 4\) to \(2, 3, 3\).*the same positions in both. Name modules"),
    ],
    ids=["token ids", "other positions"],
)
def test_a_module_whose_inputs_shared_dendrites_cannot_see_is_refused(module: nn.Module, x: Tensor, says: str) -> None:
    network = attach_shared(nn.Sequential(module), ["0"])
    module(x)
    network.start_candidates()
    with pytest.raises(ValueError, match=f"shared dendrites are to hang around {says}|around is called with {says}"):
        module(x)
