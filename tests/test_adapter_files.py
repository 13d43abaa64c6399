"""One frozen backbone and the files of several tasks: dendrites and a head that were trained beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pl_dendrites import dendrites_state_dict, detach, load_dendrites
from tests.models import Classifier, bits, quick, same_bits, train

X = torch.linspace(-2, 2, 20).reshape(5, 4)
HEAD = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
STATISTICS = {"head.1.running_mean", "head.1.running_var", "head.1.num_batches_tracked"}


class Task(Classifier):
    """A pretrained backbone, frozen whole, and a new head of a layer and a norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.net.requires_grad_(False).eval()
        torch.manual_seed(seed)
        self.head = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=0.02)


@pytest.fixture(scope="module", params=[{"targets": "frozen", "learning": "hybrid"}, {"around": ["net"], "fan_in": 2}])
def tasks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A folder with a file for each of two tasks, and what their networks say of the same inputs."""
    folder, outputs = tmp_path_factory.mktemp("tasks"), []
    for number in range(2):
        model, dendrites = Task(number), quick("train_loss", **request.param, base_epochs=3, max_dendrites=1)
        train(model, dendrites)
        assert dendrites.num_dendrites == 1
        save_file(dendrites_state_dict(model, with_trainable=True), folder / f"{number}.safetensors")
        outputs.append(model.eval()(X))
    return folder, outputs


def test_put_on_and_taken_off_and_the_pretrained_network_comes_back(tasks: Any) -> None:
    folder, outputs = tasks
    model = Task(5).eval()
    pretrained = bits(model.net)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    for number in (0, 1, 0):
        load_dendrites(model, load_file(folder / f"{number}.safetensors"))
        assert torch.equal(model(X), outputs[number])
    assert not torch.equal(outputs[0], outputs[1])
    detach(model)
    assert same_bits(bits(model.net), pretrained)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert not any(parameter.requires_grad for parameter in model.net.parameters())
    load_dendrites(model, load_file(folder / "1.safetensors"))
    assert torch.equal(model(X), outputs[1])


def test_nothing_that_is_frozen_is_in_the_file(tasks: Any) -> None:
    state = load_file(tasks[0] / "1.safetensors")
    beside = {key for key in state if ".dendrites." not in key} - {"pl_dendrites.entries"}
    assert beside == HEAD | STATISTICS


def test_what_is_trainable_is_said_by_flags_and_more_may_be_named() -> None:
    model = Task()
    model.head[1].requires_grad_(False)

    def beside(**settings: Any) -> set[str]:
        return set(dendrites_state_dict(model, **settings)) - {"pl_dendrites.entries"}

    assert beside() == set()
    assert beside(with_trainable=True) == {"head.0.weight", "head.0.bias"}
    model.net[3].bias.requires_grad_(True)
    assert beside(with_trainable=True, also=["head.1"]) == HEAD | STATISTICS | {"net.3.bias"}
    assert beside(also=["head"]) == HEAD | STATISTICS
    model.requires_grad_(False)
    assert beside(with_trainable=True) == set()
