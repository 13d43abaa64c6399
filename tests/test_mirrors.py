"""What mirrors a network without being trained grows with it: averages of weights, target networks, teachers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from pl_dendrites import DendriteCallback, attach, detach, load_from_checkpoint, restore_structure
from pl_dendrites.core.mirrors import find_mirrors
from pl_dendrites.training.fsdp import Shards
from tests.models import Classifier, bits, loaders, quick, same_bits, train


class Mirrored(Classifier):
    """Validated by its mirror, which follows in one of the ways that people write."""

    lowest = float("-inf")

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        if way == "AveragedModel":
            self.teacher = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        else:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.way == "AveragedModel":
            self.teacher.update_parameters(self.net)
        elif self.way == "a copy now and then":
            if self.global_step % 3 == 0:
                self.teacher.load_state_dict(self.net.state_dict())
        elif self.way == "by name":
            own = dict(self.net.named_parameters())
            with torch.no_grad():
                for name, parameter in self.teacher.named_parameters():
                    parameter.lerp_(own[name], 0.2)
        else:
            with torch.no_grad():
                for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    mine.data = mine.data * 0.8 + theirs.data * 0.2

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.teacher(batch[0]), batch[1]))
        self.log("falls", max(-float(self.global_step), self.lowest))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.02)


WAYS = ["in order", "by name", "a copy now and then", "AveragedModel"]


def mirrored(way: str) -> Mirrored:
    torch.manual_seed(0)
    return Mirrored(way)


def inner(model: Mirrored) -> nn.Module:
    return model.teacher.module if isinstance(model.teacher, AveragedModel) else model.teacher


@pytest.mark.parametrize("learning", ["correlation", "gradient", "hybrid"])
@pytest.mark.parametrize("way", WAYS)
def test_a_mirror_has_the_dendrites_of_what_it_mirrors(way: str, learning: str) -> None:
    model, dendrites = mirrored(way), quick("falls", learning=learning)
    train(model, dendrites)
    assert dendrites.num_dendrites > 0
    assert dendrites.network.targets == ["net.0", "net.2"]
    teacher = inner(model)
    own, others = dict(model.net.named_parameters()), dict(teacher.named_parameters())
    assert [(name, p.shape) for name, p in own.items()] == [(name, p.shape) for name, p in others.items()]
    for name, parameter in others.items():
        assert way == "AveragedModel" or not parameter.requires_grad
        if ".weights." in name:
            assert parameter.abs().max() > 0  # the average of output weights has begun to follow
        if learning == "correlation" and (".nodes." in name or ".links" in name):
            torch.testing.assert_close(parameter, own[name])  # frozen here and there
    held = {id(p) for optimizer in model.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
    assert not any(id(parameter) in held for parameter in others.values())


@pytest.mark.parametrize("way", ["in order", pytest.param("AveragedModel", marks=pytest.mark.long)])
def test_a_resumed_fit_has_its_mirrors(way: str, tmp_path: Path) -> None:
    """Also from a checkpoint before any growth, when the mirror is no copy any more."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, told = mirrored(way), quick(max_dendrites=1)
    train(whole, told, saver, enable_checkpointing=True)
    for epoch in (0, 2, 3, 4):
        resumed, again = mirrored(way), quick(max_dendrites=1)
        train(resumed, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.history == told.history
        assert same_bits(bits(whole), bits(resumed)), epoch


def test_a_second_fit_goes_on_with_the_mirror() -> None:
    model = mirrored("in order")
    for _ in range(2):
        dendrites = quick(max_dendrites=1, base_epochs=1, max_tries=0)
        train(model, dendrites, data=loaders())
        assert dendrites.network.mirrors == {"teacher": "net"}


def test_a_set_that_goes_leaves_nothing_of_a_mirror_to_be_trained() -> None:
    model, dendrites = mirrored("in order"), quick("falls", learning="hybrid", max_tries=0)
    model.lowest = -24.0  # reached in the first base phase with dendrites
    train(model, dendrites)
    assert [record["accepted"] for record in dendrites.history if record["phase"] == "base"] == [None, True, False]
    assert dendrites.num_dendrites == model.teacher[0].dendrites.count == 1
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_what_is_frozen_and_only_looks_alike_is_no_mirror() -> None:
    """Half of the blocks of a network are frozen, and all have one shape."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(4)))
    blocks[0].requires_grad_(False)
    blocks[1].requires_grad_(False)
    network = attach(blocks)
    assert network.mirrors == {}
    assert list(network.layers) == ["2.0", "3.0"]


def test_the_outermost_of_modules_that_mirror() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    model = nn.ModuleDict({"q": encoder, "head": nn.Linear(3, 2), "k": copy.deepcopy(encoder).requires_grad_(False)})
    assert find_mirrors(model, ["q.0.0", "q.1", "head"]) == {"k": "q"}


def test_two_networks_with_a_target_each() -> None:
    torch.manual_seed(0)
    critics = {f"q{i}": nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for i in range(2)}
    copies = {f"target{i}": copy.deepcopy(critics[f"q{i}"]).requires_grad_(False) for i in range(2)}
    model = nn.ModuleDict(critics | copies)
    network = attach(model)
    assert network.mirrors == {"target0": "q0", "target1": "q1"}
    network.start_candidates(2)
    x = torch.randn(32, 3)
    sum(model[name](x).square().mean() for name in critics).backward()
    network.integrate()
    for i in range(2):
        model[f"target{i}"].load_state_dict(model[f"q{i}"].state_dict())
        assert torch.equal(model[f"target{i}"](x), model[f"q{i}"](x))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("averaged", [True, False])
def test_each_of_two_mirrors_is_that_of_the_nearest(averaged: bool) -> None:
    """Twin critics have one shape; in a second fit their averages have values of their own."""
    torch.manual_seed(0)
    nets = [perceptron() for _ in range(2)]
    mirrors = [AveragedModel(net) if averaged else copy.deepcopy(net).requires_grad_(False) for net in nets]
    model = nn.ModuleDict({f"q{i}": net for i, net in enumerate(nets)} | {f"m{i}": m for i, m in enumerate(mirrors)})
    first = attach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    inner = ".module" if averaged else ""
    assert first.mirrors == find_mirrors(model, first.targets) == {f"m0{inner}": "q0", f"m1{inner}": "q1"}


def test_layers_of_unknown_size_are_in_nobodys_way() -> None:
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))})
    assert attach(model).targets == ["net.0"]


# -- named --------------------------------------------------------------------------------------------------------


def apart(**modules: nn.Module) -> nn.ModuleDict:
    """A network, one that began for itself and is trainable too, and a head."""
    torch.manual_seed(0)
    return nn.ModuleDict({"net": perceptron(), "target": perceptron(), "head": nn.Linear(2, 4), **modules})


def by_hand(net: nn.Sequential, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a perceptron puts out that has just these values; tanh dendrites in one block, of which some may be new."""
    for place, layer in enumerate(net):
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        own = {name.removeprefix(f"{place}."): value for name, value in values.items() if name.startswith(f"{place}.")}
        out, seen, row = nn.functional.linear(x, own["weight"], own["bias"]), [], 0
        count = sum(name.startswith("dendrites.0.weights.") for name in own)
        for j in range(count):
            nodes = (own[f"dendrites.0.nodes.{part}"].chunk(count)[j] for part in ("weight", "bias"))
            total = nn.functional.linear(x, *nodes)
            for earlier in seen:
                total, row = total + own["dendrites.0.links"][row] * earlier, row + 1
            seen.append(total.tanh())
            out = out + own[f"dendrites.0.weights.{j}"] * seen[-1]
        x = out
    return x


def named(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("live", [False, True])
def test_a_named_mirror_begins_apart_and_pairs_in_every_way(live: bool) -> None:
    model = apart()
    network = attach(model, live=live, mirrors={"target": "net"})
    assert network.targets == ["net.0", "net.2", "head"]
    x = torch.randn(32, 3)
    for _ in range(2):
        before = model["target"](x)
        network.start_candidates(2)
        model["net"](x).square().mean().backward()
        network.integrate()
        torch.testing.assert_close(model["target"](x), before)
        for trained in (False, True):
            pair = [
                [(n, p.shape) for n, p in model[name].named_parameters() if p.requires_grad or not trained]
                for name in ("net", "target")
            ]
            assert pair[0] == pair[1]
    model["target"].load_state_dict(model["net"].state_dict())
    assert torch.equal(model["target"](x), model["net"](x))


@pytest.mark.parametrize("shape", [{"fan_in": 2}, {}])
def test_a_mirror_that_comes_late_has_all_of_what_is_there(shape: dict[str, Any]) -> None:
    """Of a network that grew without it: a teacher that is made of the plain model, and then named."""
    model = apart()
    network = attach(model, ["net.*"], **shape)
    for kind in ("tanh", "relu", "relu"):
        network.set_next(kind, share=0.5, **shape)
        network.start_candidates(2)
        model["net"](torch.randn(32, 3)).square().mean().backward()
        network.integrate()
    for name, parameter in model["net"].named_parameters():
        if ".links" in name or ".weights." in name:
            nn.init.normal_(parameter)
    x = torch.randn(8, 3)
    before = model["target"](x)
    restored = restore_structure(model, model.state_dict(), {"target": "net"})
    assert list(restored.layers) == ["net.0", "net.2"]
    torch.testing.assert_close(model["target"](x), before)
    own, others = (dict(model[name].named_parameters()) for name in ("net", "target"))
    assert list(own) == list(others)
    assert all(torch.equal(own[name], others[name]) for name in own if ".nodes." in name or ".links" in name)
    with torch.no_grad():
        for mine, theirs in zip(model["target"].parameters(), model["net"].parameters(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(model["target"](x), model["net"](x))


class Other(nn.Linear):
    """Has the parameters of a Linear."""


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": (["target"], "must be names of modules"),
    "no names": ({"target": 3}, "must be names of modules"),
    "the whole model": ({"target": ""}, "must be names of modules"),
    "itself": ({"net": "net"}, "'net' cannot mirror 'net': one is the other, or inside it"),
    "its own part": ({"net.0": "net"}, "'net.0' cannot mirror 'net': one is the other, or inside it"),
    "a chain": ({"target": "net", "third": "target"}, "'target' is a mirror"),
    "a part of a mirror": (
        {"target": "net", "target.0": "head"},
        "no part of another or of what is mirrored: 'target.0'",
    ),
    "no such mirror": ({"targt": "net"}, r"no module 'targt' of its own. It has \['net', 'net.0', .*'target', "),
    "no such source": ({"target": "nett"}, "no module 'nett'"),
    "one module": ({"same": "net"}, "no module 'same' of its own"),
    "nothing in it": ({"net.1": "head"}, "'net.1' cannot mirror 'head': it has no parameters"),
    "other shapes": ({"wide": "net"}, r"'0.weight' is \(5, 3\) in it and \(4, 3\) there. These fit: \['target'\]"),
    "other names": ({"head": "net"}, "'weight' is a parameter of one of them alone. These fit: .*'target'"),
    "other layers": ({"other": "head"}, "'' is a Other in it and a Linear there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_module_that_cannot_mirror_another(case: str) -> None:
    mirrors, says = WRONG[case]
    model = apart(wide=nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), other=Other(2, 4))
    model["same"] = model["net"]
    with pytest.raises(ValueError, match=f"`mirrors`.*{says}"):
        attach(model, mirrors=mirrors)
    assert not any("dendrites" in name for name, _ in model.named_modules())


def test_what_the_callback_can_know_it_refuses_at_once() -> None:
    for case in ("no mapping", "no names", "itself", "a chain"):
        with pytest.raises(ValueError, match=f"`mirrors`.*{WRONG[case][1]}"):
            DendriteCallback("val_loss", mirrors=WRONG[case][0])


def test_a_mirror_with_other_dendrites_is_refused() -> None:
    model = apart()
    attach(model).grow(["target.0"])
    with pytest.raises(ValueError, match="'target' cannot mirror 'net': it has other dendrites"):
        restore_structure(model, model.state_dict(), {"target": "net"})


def test_who_names_mirrors_names_all() -> None:
    model = apart(still=perceptron().requires_grad_(False))
    model["still"].load_state_dict(model["net"].state_dict())
    assert attach(model, mirrors={}).targets == ["net.0", "net.2", "target.0", "target.2", "head"]
    network = attach(detach(model), ["head"], mirrors={"target": "net"})  # what does not grow has nothing to follow
    assert list(network.layers) == ["head"]
    with pytest.raises(ValueError, match=re.escape("{'target.0': \"it is a part of 'target', which mirrors 'net'\"}")):
        attach(detach(model), ["target.0"], mirrors={"target": "net"})


def test_a_layer_that_is_left_alone_is_so_in_its_mirror() -> None:
    model = apart()
    network = attach(model, mirrors={"target": "net"})
    network.leave_alone(["net.0"], "nobody trains it")
    network.grow(["net.2"])
    assert [name for name, _ in model.named_modules() if name.endswith(".dendrites")] == [
        "net.2.dendrites",
        "target.2.dendrites",
        "head.dendrites",
    ]


def test_mirrors_of_a_sharded_model_are_refused() -> None:
    shards = Shards(lambda *_: {})
    shards._loading = SimpleNamespace(release=lambda: None)
    with pytest.raises(MisconfigurationException, match=r"sharded model cannot grow.*\{'target': 'net'\}"):
        shards.begin_training(attach(apart(), mirrors={"target": "net"}))


class Apart(Mirrored):
    """Its mirror begins for itself, and the optimizer holds it too."""

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__("in order")
        self.teacher = copy.deepcopy(self.net)
        for layer in (self.teacher[0], self.teacher[2]):
            layer.reset_parameters()
        self.weight = weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.weight * nn.functional.cross_entropy(self.teacher(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def made(kind: type[Mirrored], *args: Any) -> Mirrored:
    torch.manual_seed(0)
    return kind(*args)


def follows(**settings: Any) -> DendriteCallback:
    return quick("falls", mirrors={"teacher": "net"}, **settings)


@pytest.mark.parametrize(("weight", "learning"), [(0.0, "correlation"), (1.0, "hybrid")])
def test_a_named_mirror_that_an_optimizer_holds_resumes(weight: float, learning: str, tmp_path: Path) -> None:
    """Trained or not, its dendrites are where and what the rest of it is."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, told = made(Apart, weight), follows(learning=learning)
    trainer = train(whole, told, saver, enable_checkpointing=True)
    assert (told.num_dendrites, list(told.network.layers)) == (2, ["net.0", "net.2"])
    assert_alike(whole, trainer)
    for epoch in (3, 5):
        resumed, again = made(Apart, weight), follows(learning=learning)
        train(resumed, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.history == told.history
        assert same_bits(bits(whole), bits(resumed)), epoch
    assert_alike(whole, train(whole, follows(learning=learning), max_epochs=1))


def assert_alike(model: Mirrored, trainer: L.Trainer) -> None:
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for own, other in zip(model.net.parameters(), model.teacher.parameters(), strict=True):
        assert (own.requires_grad, id(own) in held) == (other.requires_grad, id(other) in held)


def test_a_resumed_fit_keeps_its_named_mirrors(tmp_path: Path) -> None:
    """Those of the checkpoint where none are named, no others, and none that the model has not."""
    saver, first, path = ModelCheckpoint(tmp_path, "last", save_top_k=-1), made(Apart), tmp_path / "last.ckpt"
    train(first, follows(max_dendrites=1), saver, enable_checkpointing=True, max_epochs=5)
    resumed, again = made(Apart), quick("falls", max_dendrites=1)
    train(resumed, again, ckpt_path=path)
    assert again.network.mirrors == {"teacher": "net"}
    assert list(again.network.layers) == ["net.0", "net.2"]
    with pytest.raises(MisconfigurationException, match=r"mirrors are \{'teacher': 'net'\}.*mirrors=\{\}. Go on with"):
        train(made(Apart), quick("falls", mirrors={}), ckpt_path=path)
    checkpoint = torch.load(path, weights_only=True)
    state = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("DendriteCallback"))
    for wrong, says in (({"teacher": "nett"}, "no module 'nett'"), ({"net": "net"}, "'net' cannot mirror 'net'")):
        state["mirrors"] = wrong
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=f"`mirrors`.*{says}"):
            train(made(Apart), quick("falls"), ckpt_path=path)


# -- a DQN, as tutorials write it ---------------------------------------------------------------------------------


class Corridor:
    """Four places; the right end is worth 1, and an episode ends there or after eight steps."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.place, self.steps = 0, 0

    def look(self) -> Tensor:
        return torch.tensor([self.place / 3, self.steps / 8, 1.0])

    def step(self, action: int) -> tuple[float, bool]:
        self.place, self.steps = min(3, max(0, self.place + (1 if action else -1))), self.steps + 1
        return float(self.place == 3), self.place == 3 or self.steps == 8


class Replay(IterableDataset):
    """Some of what was seen; an epoch is four batches."""

    def __init__(self, buffer: list[tuple[Any, ...]]) -> None:
        self.buffer = buffer

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (self.buffer[i] for i in torch.randint(len(self.buffer), (64,)).tolist())


class DQN(L.LightningModule):
    """Two networks that begin for themselves; the target is a copy of the other every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.target_net = perceptron(), perceptron()
        self.world, self.buffer = Corridor(), []
        self.copied: dict[str, Tensor] = {}
        self.checked = 0
        for _ in range(32):
            self.play(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @torch.no_grad()
    def play(self, epsilon: float) -> None:
        seen = self.world.look()
        random = float(torch.rand(())) < epsilon
        action = int(torch.randint(2, ())) if random else int(self.net(seen[None]).argmax())
        reward, done = self.world.step(action)
        self.buffer.append((seen, action, reward, done, self.world.look()))
        if done:
            self.world.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seen, action, reward, done, then = batch
        self.play(0.2)
        value = self.net(seen).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            following = self.target_net(then).amax(1).masked_fill(done, 0.0)
        if self.global_step % 3 == 0:
            self.target_net.load_state_dict(self.net.state_dict())
            if self.dendrites.phase == "base":
                self.copied = named(self.net)
        self.log("falls", -float(self.global_step), on_step=False, on_epoch=True)
        return nn.functional.mse_loss(value, (reward + 0.9 * following).float())

    def on_train_batch_end(self, *_: Any) -> None:
        if self.dendrites.phase != "base":
            self.copied = {}  # what happens to weights in between is undone when the phase ends
        elif self.copied:
            x = torch.randn(5, 3)
            torch.testing.assert_close(self.target_net(x), by_hand(self.target_net, self.copied, x))
            self.checked += any("dendrites" in name for name in self.copied)

    def train_dataloader(self) -> Any:
        return DataLoader(Replay(self.buffer), 16)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)


def test_a_dqn_grows_its_target_network_with_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dendrites = DQN(), quick("falls", mirrors={"target_net": "net"}, dirpath=tmp_path)
    model.dendrites = dendrites
    trainer = L.Trainer(
        max_epochs=-1, callbacks=[dendrites], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model)
    assert [record["accepted"] for record in dendrites.history if record["phase"] == "base"] == [None, True, True]
    assert model.checked > 5  # the copies were right by name, and their output that of the formula
    assert [(n, p.shape) for n, p in model.net.named_parameters()] == [
        (n, p.shape) for n, p in model.target_net.named_parameters()
    ]
    x = torch.randn(6, 3)
    grown = model.target_net(x)
    assert not torch.allclose(detach(copy.deepcopy(model.target_net))(x), grown)
    again = load_from_checkpoint(DQN, dendrites.best_model_path)
    assert torch.equal(again.target_net(x), grown)
    assert torch.equal(again.net(x), model.net(x))
