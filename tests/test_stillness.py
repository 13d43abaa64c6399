"""In a correlation phase candidates learn from training alone, the network is what it was, and flags are the user's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback
from tests.models import Classifier, bits, half, loaders, quick, same_bits, train


def seeded(kind: type[L.LightningModule], *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args)


def correlations(dendrites: DendriteCallback) -> list[Any]:
    return [record["correlation"] for record in dendrites.history if record["phase"] == "correlation"]


class Forces(L.LightningModule):
    """A validation step that takes gradients: of the loss itself, or of the inputs."""

    def __init__(self, takes: str) -> None:
        super().__init__()
        self.takes = takes
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            out = self.net(x)
            if self.takes == "gradients of inputs":
                torch.autograd.grad(out.sum(), x)
            else:
                (out.square().mean() + x.sum()).backward()
        self.log("val_loss", (out.detach()[:, 0] - batch[1]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


@pytest.mark.parametrize("takes", ["gradients of inputs", "a backward pass"])
def test_validations_teach_candidates_nothing(takes: str) -> None:
    runs = []
    for skip_validation in (False, True):
        model, dendrites = seeded(Forces, takes), quick(skip_validation=skip_validation)
        train(model, dendrites)
        runs.append((correlations(dendrites), bits(model), dendrites.best_model_score))
    assert runs[0][0]
    assert runs[0][0] == runs[1][0]
    assert same_bits(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


class Samples(L.Callback):
    """How many samples candidates have seen at the end of each epoch of a correlation phase."""

    def __init__(self, dendrites: DendriteCallback) -> None:
        self.dendrites = dendrites
        self.seen: list[tuple[int, int]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for pool in self.dendrites.network.candidates.values():
            self.seen.append((trainer.current_epoch, int(pool.moments.samples.max())))


def test_a_phase_that_begins_inside_an_epoch_does_not_count_that_part_of_one() -> None:
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, (x[:, :2].prod(1) > 0).long()), 16)
    dendrites = quick(base_epochs=None, patience=2, max_dendrites=1, max_correlation_epochs=3, max_tries=0)
    samples = Samples(dendrites)
    train(seeded(Classifier), dendrites, samples, data=(data, data), val_check_interval=7)
    epochs = [record["epochs"] for record in dendrites.history if record["phase"] == "correlation"]
    assert epochs[0] == 3
    assert list(dict(samples.seen).values()) == [16, 128, 128, 128]  # of one batch the first whole epoch knows nothing


class Own(Classifier):
    """Moves parameters itself, in one of the ways that models do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.average = copy.deepcopy(self.net[4]).requires_grad_(False)
        self.average.weight.data += 1  # begins apart: no mirror, which would grow with the layer
        self.looks: list[tuple[str, dict[str, Tensor]]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            if self.how == "an average":
                for name in ("weight", "bias"):
                    own, other = (module.get_parameter(name) for module in (self.average, self.net[4]))
                    own.mul_(0.9).add_(other, alpha=0.1).add_(0.01)
            elif self.how == "data":
                self.average.weight.data.mul_(0.99)
            elif self.how == "clamp":
                self.net[0].weight.data.clamp_(-0.1, 0.1)
            elif self.how == "a copy" and self.global_step % 3 == 0:
                self.average.load_state_dict({k: v + 1 for k, v in self.average.state_dict().items()})

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.looks.append((self.trainer.callbacks[0].phase, bits(self)))


@pytest.mark.parametrize("how", ["an average", "data", "clamp", "a copy"])
def test_parameters_that_the_model_moves_itself_stand_still_too(how: str) -> None:
    model, dendrites = seeded(Own, how), quick(max_dendrites=1, max_correlation_epochs=4)
    train(model, dendrites)
    own = {name for name in bits(model) if "dendrites" not in name}
    looks = [found for phase, found in model.looks if phase == "correlation"]
    assert len(looks) == 4
    for found in looks[1:]:
        assert same_bits({key: looks[0][key] for key in own}, {key: found[key] for key in own})
    moved = [found["average.weight"] for phase, found in model.looks if phase == "base"]
    assert how == "clamp" or not torch.equal(moved[0], moved[1])


class TwoParts(Classifier):
    """Freezes or thaws its first layer when an epoch starts."""

    def __init__(self, at: int, trainable: bool, way: str) -> None:
        super().__init__()
        self.at, self.trainable, self.way = at, trainable, way
        self.net[0].requires_grad_(not trainable)
        self.flags: list[bool] = []

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.at and self.way == "a call":
            self.net[0].requires_grad_(self.trainable)
        elif self.current_epoch == self.at:
            for parameter in self.net[0].parameters():
                parameter.requires_grad = self.trainable
        self.flags.append(self.net[0].weight.requires_grad)


@pytest.mark.parametrize("way", ["a call", "an assignment"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_what_the_user_freezes_in_any_phase_stays_so(at: int, trainable: bool, way: str) -> None:
    model, dendrites = seeded(TwoParts, at, trainable, way), quick(targets=["net.*"], max_dendrites=1)
    train(model, dendrites, max_epochs=6)
    assert [record["phase"] for record in dendrites.history] == ["base", "correlation", "base"]
    assert model.flags == [(epoch < at) is not trainable for epoch in range(6)]
    assert model.net[0].weight.requires_grad is trainable


def test_a_checkpoint_between_batches_knows_what_is_trainable(tmp_path: Path) -> None:
    """Models that save what they train look at the flags."""

    seen: list[int] = []

    class Watch(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: Any) -> None:
            seen.append(sum(parameter.requires_grad for parameter in module.parameters()))

    model = seeded(Classifier)
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    train(model, quick(max_dendrites=1), Watch(), saver, max_epochs=4, enable_checkpointing=True)
    assert set(seen) == {trainable}


class Cache(Classifier):
    """A rotary cache: tables as long as the longest batch so far, and a number beside them that says how long."""

    def __init__(self) -> None:
        super().__init__()
        self._make(8)

    def _make(self, length: int) -> None:
        self.length = length
        self.register_buffer("table", torch.arange(length).float().cos(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self._make(len(x))
        return self.net(x) + 0 * self.table[: len(x), None]


def test_a_cache_that_grows_in_a_correlation_phase_stays_as_long() -> None:
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()

    class Sizes(torch.utils.data.IterableDataset):
        epoch = 0

        def __iter__(self) -> Any:
            for size in (4, 32 if self.epoch == 2 else 8):
                yield x[:size], y[:size]
            self.epoch += 1

    model = seeded(Cache)
    data = DataLoader(Sizes(), batch_size=None), DataLoader([(x[:4], y[:4])], batch_size=None)
    train(model, quick(max_dendrites=1), data=data)
    assert model.length == len(model.table) == 32
    model.eval()(x[:32])


class Threshold(Classifier):
    """Keeps in a buffer what its validation finds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(0.5))

    def on_validation_epoch_end(self) -> None:
        self.threshold = torch.tensor(float(self.current_epoch))


def test_what_a_validation_changes_is_the_users_affair() -> None:
    model, seen = seeded(Threshold), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Threshold, *_: Any) -> None:
            seen.append((trainer.current_epoch, float(module.threshold)))

    train(model, quick(max_dendrites=1), Watch(), max_epochs=6, num_sanity_val_steps=0)
    assert all(value == (epoch - 1 if epoch else 0.5) for epoch, value in seen if epoch != 4)  # 4: the best came back


def test_a_loss_scale_that_changes_is_not_in_the_statistics() -> None:
    """The same fit with a scale that doubles every other batch and with one that stays."""
    found = []
    for interval in (2, 1000):
        model, dendrites = seeded(Classifier), quick(max_dendrites=1, max_correlation_epochs=1)
        scaler = half(init_scale=2.0**4, growth_interval=interval)
        train(model, dendrites, plugins=[scaler])
        found.append(correlations(dendrites)[0])
    for name, figures in found[0].items():
        assert figures == pytest.approx(found[1][name], abs=2e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_candidates_in_half_precision_move_however_small_the_step(precision: str) -> None:
    """A step below the last bit of a weight adds up with others."""
    starts: list[Tensor] = []
    ends: list[Tensor] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            pools = dendrites.network.candidates
            if pools and not starts:
                starts.append(pools["net.0"].nodes.weight.detach().clone())

        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            if dendrites.network.candidates:
                ends.append(dendrites.network.candidates["net.0"].nodes.weight.detach().clone())

    def small(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=2e-4)

    class Plain(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Identity(), nn.Identity(), nn.Linear(6, 2))

    dendrites = quick(optimizer=small, max_dendrites=1, max_correlation_epochs=10)
    model = seeded(Plain)
    model.optimizers_of = lambda module: torch.optim.SGD(module.parameters(), lr=0.1)
    train(model, dendrites, Watch(), precision=precision)
    assert (ends[-1] != starts[0]).float().mean() > 0.7


class Stateful(torch.utils.data.Sampler[int]):
    """The rows in order; says where it stands, so that a fit can go on in the middle of an epoch."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def __iter__(self) -> Any:
        while self.at < self.size:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def __len__(self) -> int:
        return self.size


class StatefulLoader(DataLoader[Any]):
    def __init__(self, data: TensorDataset, batch: int) -> None:
        super().__init__(data, batch, sampler=Stateful(len(data)))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.sampler.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.at = state["at"]


@pytest.mark.parametrize("settings", [{"candidate_batches": 3}, {"fan_in": 2, "max_correlation_epochs": 4}])
def test_a_resume_between_two_steps_of_the_candidates_ends_in_the_same_bits(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    def data() -> Any:
        plain, val = loaders()
        return StatefulLoader(plain.dataset, 16), val

    def fit(path: Any = None, *callbacks: L.Callback) -> tuple[Any, DendriteCallback]:
        model, dendrites = seeded(Classifier), quick(max_dendrites=1, **settings)
        train(model, dendrites, *callbacks, data=data(), ckpt_path=path, enable_checkpointing=bool(callbacks))
        return model, dendrites

    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    whole, told = fit(None, saver)
    for step in (17, 18, 20, 27, 30):
        path = tmp_path / f"step={step}.ckpt"
        assert torch.load(path)["callbacks"]["DendriteCallback"]["machine"]["phase"] == "correlation"
        resumed, again = fit(path)
        assert same_bits(bits(whole), bits(resumed)), step
        assert told.history == again.history
