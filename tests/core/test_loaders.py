"""Within ``growing()`` whatever loads a model grows it, and nothing else happens, here or in other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from pl_dendrites import attach, grow_on_load, growing

X = torch.linspace(-1, 1, 12).reshape(4, 3)
LOAD = nn.Module.load_state_dict


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def grown() -> nn.Sequential:
    model = net()
    network = attach(model)
    network.grow(["0", "2"])
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.dendrites[0].weights[0].fill_(0.5)
    return model


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert nn.Module.load_state_dict is LOAD
    assert not torch_module._global_module_registration_hooks


def loads(model: nn.Module, grown: nn.Module, **settings: Any) -> bool:
    model.load_state_dict(grown.state_dict(), **settings)
    return torch.equal(model(X), grown(X))


class Renames(nn.Module):
    """A loader of its own kind: names change on the way, and what loads is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({f"inner.{key}": value for key, value in state_dict.items()}, strict, assign)


class Hands(Renames):
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.inner.load_state_dict(state_dict, strict=strict)


@pytest.mark.parametrize("made", [net, Renames, Hands])
@pytest.mark.parametrize("settings", [{}, {"strict": False}, {"assign": True}])
def test_a_model_from_before_the_block_grows(
    made: Callable[[], nn.Module], settings: dict[str, bool], grown: nn.Module
) -> None:
    model = made()
    with growing():
        assert loads(model, grown, **settings)
    assert loads(model, grown)  # and ever after
    plain = made()
    with growing():
        plain.load_state_dict(net().state_dict())
    assert not plain._load_state_dict_pre_hooks


def test_structure_is_read_after_hooks_that_rename(grown: nn.Module) -> None:
    def rename(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        for key in [key for key in state if key.startswith("old.")]:
            state[key.removeprefix("old.")] = state.pop(key)

    model = net()
    grow_on_load(model)
    model.register_load_state_dict_pre_hook(rename)
    with growing():
        model.load_state_dict({f"old.{key}": value for key, value in grown.state_dict().items()})
    assert torch.equal(model(X), grown(X))


def test_what_does_not_fit_is_said_and_nothing_stays(grown: nn.Module) -> None:
    wide = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"'0': .* must have the shape"), growing(), growing():
        wide.load_state_dict(grown.state_dict(), strict=False)
    assert not wide._load_state_dict_pre_hooks
    with growing():
        with growing():
            pass
        assert loads(net(), grown)
    with pytest.raises(RuntimeError, match="Unexpected"):
        loads(net(), grown)


def test_other_threads_load_as_ever(grown: nn.Module) -> None:
    """Two blocks that overlap, the first ends first; a third thread opened none."""
    both, first_is_over = threading.Barrier(3, timeout=10), threading.Event()

    def first() -> bool:
        with growing():
            both.wait()
            done = loads(net(), grown)
        first_is_over.set()
        return done

    def second() -> bool:
        with growing():
            both.wait()
            assert first_is_over.wait(10)
            return loads(net(), grown)

    def third() -> int:
        both.wait()
        return len(net().load_state_dict(grown.state_dict(), strict=False).unexpected_keys)

    with ThreadPoolExecutor() as pool:
        one, two, three = (pool.submit(run) for run in (first, second, third))
    assert one.result()
    assert two.result()
    assert three.result() == sum("dendrites" in key for key in grown.state_dict())


def test_a_patch_of_somebody_else_over_ours_is_left_to_them(grown: nn.Module) -> None:
    calls = []
    block = growing()
    block.__enter__()
    ours = nn.Module.load_state_dict

    def theirs(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return ours(self, *args, **kwargs)

    nn.Module.load_state_dict = theirs  # type: ignore[method-assign]
    try:
        block.__exit__(None, None, None)
        assert nn.Module.load_state_dict is theirs
        with pytest.raises(RuntimeError, match="Unexpected"):
            loads(net(), grown)
        with growing():
            assert loads(net(), grown)
        assert nn.Module.load_state_dict is theirs
        assert len(calls) == 2
    finally:
        nn.Module.load_state_dict = LOAD  # type: ignore[method-assign]


# -- loaders that read files by themselves -----------------------------------------------------------------------------


class Pretrained(nn.Module):
    """What the classes of models in transformers have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model_prefix = "base"
        self.base = net()

    @classmethod
    def from_pretrained(cls, *args: Any) -> nn.Module:
        with torch.device("meta"):
            model = cls()
        model._load_pretrained_model(model, *args)
        return model


class Unknown(Pretrained):
    """As a later version might be, or another library."""

    @classmethod
    def _load_pretrained_model(cls, model: nn.Module, state: Any, paths: Any) -> None:
        model.to_empty(device="cpu")


def test_dendrites_that_would_be_dropped_are_refused(grown: nn.Module, tmp_path: Path) -> None:
    before = vars(Unknown)["_load_pretrained_model"]
    torch.save(grown.state_dict(), file := tmp_path / "model.bin")
    with growing():
        for given in [(grown.state_dict(), None), (None, [str(file)]), (None, file)]:
            with pytest.raises(RuntimeError, match=r"does not know, .* drop their dendrites\. .*load_state_dict"):
                Unknown.from_pretrained(*given)
        Unknown.from_pretrained(net().state_dict(), ["nowhere.bin"])
        with ThreadPoolExecutor() as pool:
            pool.submit(Unknown.from_pretrained, grown.state_dict(), None).result()
    assert vars(Unknown)["_load_pretrained_model"] is before
    Unknown.from_pretrained(grown.state_dict(), None)


def test_a_version_of_transformers_without_such_a_method_is_warned_of() -> None:
    later = type(
        "Later", (Pretrained,), {"__module__": "transformers.models", "from_pretrained": classmethod(lambda _: 0)}
    )
    with growing():
        Pretrained()
        with pytest.warns(UserWarning, match="drops their dendrites"):
            later()
    later()


def test_an_entry_that_holds_nothing_may_lie_where_the_next_begins(grown: nn.Module) -> None:
    """In a file that is mapped into memory: one dendrite has no links."""
    state = grown.state_dict()
    memory = np.concatenate([value.numpy().ravel().view(np.uint8) for value in state.values()])
    place, mapped = 0, {}
    for key, value in sorted(state.items(), key=lambda entry: entry[1].numel()):
        part = torch.from_numpy(memory[place : place + value.nbytes])
        mapped[key] = part.view(value.dtype).reshape(value.shape).copy_(value)
        place += value.nbytes
    model = net()
    with growing():
        model.load_state_dict(mapped)
    assert torch.equal(model(X), grown(X))


class FromFiles(Pretrained):
    """Each entry that the model has is set by itself, as a new parameter."""

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any = None) -> None:
        entries = state_dict or {k: v for file in checkpoint_files for k, v in torch.load(file).items()}
        own = model.state_dict()
        for name, value in entries.items():
            key = name if name in own else f"base.{name}"
            if key in own:
                path, _, last = key.rpartition(".")
                given = value if last in model.get_submodule(path)._buffers else nn.Parameter(value)
                setattr(model.get_submodule(path), last, given)


@pytest.mark.parametrize("files", [0, 1, 3])
@pytest.mark.parametrize("prefix", ["", "base."])
def test_a_model_without_memory_that_loads_files(grown: nn.Module, files: int, prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in grown.state_dict().items()}
    if prefix:
        state |= {f"head.{key.removeprefix('0.')}": value for key, value in grown.state_dict().items() if key[0] == "0"}
    paths = [tmp_path / f"{number}.bin" for number in range(files)]
    for number, path in enumerate(paths):
        torch.save(dict(list(state.items())[number::files]), path, _use_new_zipfile_serialization=number != 1)
    with growing():
        model = FromFiles.from_pretrained(None if files else state, [str(path) for path in paths])
    assert torch.equal(model.base(X), grown(X))
    flags = {name: parameter.requires_grad for name, parameter in grown.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.base.named_parameters()} == flags
