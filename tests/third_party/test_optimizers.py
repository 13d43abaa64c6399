"""Optimizers of other packages: growth works with them, and a restarted one steps as a new one.

Run by ``make test-third-party``, which installs them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models import Classifier, bits, loaders, quick, train
from tests.test_restart import Switching, as_trainer, steps

collection = pytest.importorskip("pytorch_optimizer")
schedulefree = pytest.importorskip("schedulefree")

pytestmark = pytest.mark.slow

# The most used of the collection, and those that once failed.
NAMES = ["adabelief", "adabound", "adamp", "adan", "ademamix", "adopt", "avagrad", "came", "diffgrad", "grams", "lamb"]
NAMES += ["laprop", "lars", "lion", "madgrad", "mars", "novograd", "prodigy", "radam", "ranger", "ranger21", "sara"]
NAMES += ["shampoo", "soap", "spam", "stablespam", "tiger", "yogi"]


def there(name: str) -> bool:
    return name in collection.get_supported_optimizers()


NAMES = [name for name in NAMES if there(name)]


def made(name: str, parameters: Any) -> Any:
    settings = {"num_iterations": 100} if name == "ranger21" else {}
    return collection.load_optimizer(name)(parameters, lr=1e-3, **settings)


class Chosen(Classifier):
    name = ""

    def configure_optimizers(self) -> Any:
        return made(self.name, self.parameters())


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("learning", ["correlation", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_grows(name: str, learning: str, restart: bool) -> None:
    torch.manual_seed(0)
    model, dendrites = Chosen(), quick(learning=learning, restart=restart)
    model.name = name
    train(model, dendrites)
    assert sum(record["accepted"] is not None for record in dendrites.history) >= 2
    assert all(value.isfinite().all() for value in bits(model).values())


@pytest.mark.parametrize("name", NAMES)
def test_a_restarted_optimizer_steps_as_a_new_one(name: str) -> None:
    from pl_dendrites.training import optimizers

    shapes = [(3, 2), (3,)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]

    def fresh() -> list[nn.Parameter]:
        return [nn.Parameter(value.clone()) for value in start]

    expected, parameters = fresh(), fresh()
    torch.manual_seed(0)
    steps(lambda p: made(name, p), expected)
    torch.manual_seed(0)
    optimizer = made(name, parameters)
    initial = optimizers.OptimizerSettings(as_trainer(optimizer))
    steps(lambda p: made(name, p), parameters, optimizer)
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
    optimizers.forget([optimizer])
    initial.restore()
    torch.manual_seed(0)
    steps(lambda p: made(name, p), parameters, optimizer)
    for one, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(one, other)


class ScheduleFree(Switching):
    kind = ""

    def configure_optimizers(self) -> Any:
        if self.kind == "wrapper":
            return schedulefree.ScheduleFreeWrapper(torch.optim.Adam(self.parameters(), lr=0.02), momentum=0.9)
        return getattr(schedulefree, self.kind)(self.parameters(), lr=0.02)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimizers(kind: str, restart: bool) -> None:
    torch.manual_seed(0)
    model, dendrites = ScheduleFree(), quick(restart=restart)
    model.kind = kind
    trainer = train(model, dendrites)
    assert "correlation" in {record["phase"] for record in dendrites.history}
    score = trainer.validate(model, loaders()[1], verbose=False)[0]["val_loss"]
    assert score == pytest.approx(dendrites.best_model_score)
