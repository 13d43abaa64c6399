"""Training steps that look at gradients of the model's own weights work in a correlation phase, which freezes these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.models import Classifier, bits, quick, same_bits, train


class Plain(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def losses(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = self(batch[0])
        return F.cross_entropy(out, batch[1]), out.square().mean()


class Adaptive(Plain):
    """The weight of one loss follows the gradients of both, as in a VQGAN."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = self.losses(batch)
        last = self.net[2].weight
        first, second = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (one, other))
        return one + (first / (second + 1e-4)).clamp(0, 10).detach() * 0.01 * other


class Projected(Plain):
    """PCGrad: gradients of two losses are put together by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, own = self.optimizers(), [p for p in self.parameters() if p.requires_grad]
        one, other = self.losses(batch)
        first = torch.autograd.grad(one, own, retain_graph=True, allow_unused=True)
        second = torch.autograd.grad(other, own, allow_unused=True)
        optimizer.zero_grad()
        for parameter, a, b in zip(own, first, second, strict=True):
            parameter.grad = None if a is None else a + b
        optimizer.step()


class InnerLoop(Plain):
    """MAML."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, y), own = batch, {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        inner = F.cross_entropy(functional_call(self.net, own, (x[:16],)), y[:16])
        steps = torch.autograd.grad(inner, list(own.values()), create_graph=True, allow_unused=True)
        fast = {n: p if g is None else p - 0.1 * g for (n, p), g in zip(own.items(), steps, strict=True)}
        return F.cross_entropy(functional_call(self.net, fast, (x[16:],)), y[16:])


class Norms(Plain):
    def on_after_backward(self) -> None:
        gradients = [p.grad.norm() for p in self.parameters() if p.grad is not None]
        self.log("norm", torch.stack(gradients).norm())


class NormOfAll(Plain):
    def on_after_backward(self) -> None:
        self.log("norm", sum(p.grad.norm() for p in self.net[2].parameters(recurse=False)))


MODELS = [Adaptive, Projected, InnerLoop, Norms, NormOfAll]


def fit(kind: type[Plain], *callbacks: Any, **settings: Any) -> tuple[Plain, Any]:
    torch.manual_seed(0)
    model, dendrites = kind(), quick(max_dendrites=1, max_tries=0)
    train(model, dendrites, *callbacks, **settings)
    return model, dendrites


@pytest.mark.parametrize("kind", MODELS)
def test_such_a_step_works_in_every_phase(kind: type[Plain]) -> None:
    model, dendrites = fit(kind)
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    assert dendrites.history[1]["correlation"]["net.0"]["max"] > 0
    assert "training_step" not in vars(model)
    assert "on_after_backward" not in vars(model)


@pytest.mark.parametrize("kind", [Adaptive, Norms])
def test_the_network_stands_still_all_the_same(kind: type[Plain]) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watching(kind):  # type: ignore[misc, valid-type]
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.callbacks[0].phase == "correlation":
                seen.append(bits(self))
                assert all(parameter.grad is None for parameter in self.parameters())

    fit(Watching)
    assert len(seen) == 8
    assert all(same_bits(seen[0], other) for other in seen)


def test_a_resume_ends_in_the_same_bits(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, told = fit(Projected, saver, enable_checkpointing=True)
    for epoch in (1, 2, 3):
        resumed, again = fit(Projected, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same_bits(bits(whole), bits(resumed))
        assert told.history == again.history


def test_an_error_of_another_kind_is_the_models_own() -> None:
    class Fails(Plain):
        tries = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.callbacks[0].phase == "correlation":
                type(self).tries += 1
                raise RuntimeError("out of memory")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Fails)
    assert Fails.tries == 1
