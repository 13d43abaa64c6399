"""What stands still in a model, and what is given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pl_dendrites.core import attach
from pl_dendrites.core.growth.freeze import Freeze


class Moving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(3, 3).tril(), persistent=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.norm(self.line(x) @ self.mask)


def test_buffers_that_move_come_back_and_others_are_not_touched() -> None:
    model = Moving()
    freeze = Freeze(model)
    untouched = model.mask._version
    for _ in range(5):
        model(torch.randn(8, 3))
        freeze.hold()
        assert (float(model.count), model.norm.running_mean.tolist()) == (0.0, [0.0] * 3)
    assert model.mask._version == untouched


@pytest.mark.parametrize("late", [1, 3, 5])
def test_what_begins_to_move_late_comes_back(late: int) -> None:
    model = Moving()
    freeze = Freeze(model)
    for step in range(1, 7):
        if step >= late:
            model.count = model.count + 1
        freeze.hold()
        assert float(model.count) == 0


def test_parameters_whose_values_somebody_keeps_come_back() -> None:
    model = Moving()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    freeze = Freeze(model, values=kept)
    for step in range(4):
        if step % 2:
            model.line.weight.data.mul_(2)
        else:
            with torch.no_grad():
                model.line.bias.add_(1)
        freeze.hold()
        assert torch.equal(model.line.weight, kept["line.weight"])
        assert torch.equal(model.line.bias, kept["line.bias"])


def test_flags_are_the_users_between_batches() -> None:
    model = Moving()
    model.norm.weight.requires_grad_(False)
    freeze = Freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    freeze.thaw()
    assert model.line.weight.requires_grad
    model.line.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(True)
    freeze.freeze()
    assert freeze.trainable == ["line.weight", "norm.weight", "norm.bias"]
    freeze.release()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == freeze.trainable


def test_candidates_do_not_listen_outside_of_training() -> None:
    layer = nn.Linear(3, 2)
    network = attach(layer)
    network.start_candidates(2)
    network.listen(False)
    layer(torch.randn(4, 3)).sum().backward()
    assert network.layers_with_error() == []
    assert layer.weight.grad is not None
    network.listen(True)
    assert layer.weight.grad is None
    layer(torch.randn(4, 3)).square().sum().backward()
    assert network.layers_with_error() == [""]


def test_a_copy_with_batch_norm_is_as_a_dendrite_what_it_was_as_a_candidate() -> None:
    """Four batches, where a running average with momentum 0.1 would have come a third of the way."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
    block[0].bias.data += 3
    model = nn.Sequential(block, nn.Linear(6, 1))
    network = attach(model, targets=["0"])
    batches = torch.randn(4, 64, 4) * 3 + 2
    model(batches[0])
    network.start_candidates(2)
    network.reset_correlations()
    seen: list[torch.Tensor] = []
    network.candidates["0"].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    for x in batches:
        model(x).square().mean().backward()
    best = network.correlations()["0"].abs().mean(1).argmax()
    network.integrate()
    model.eval()
    with torch.no_grad():
        dendrites = [block.dendrites[0].nodes[0](x) for x in batches]
    candidate, dendrite = torch.cat(seen, 1)[best], torch.tanh(torch.cat(dendrites))
    assert float(torch.corrcoef(torch.stack([candidate.flatten(), dendrite.flatten()]))[0, 1]) > 0.97
