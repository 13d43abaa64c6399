"""A grown network in a file for use elsewhere; what needs more packages is in third_party/test_routes.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pl_dendrites import attach, export_fused, fuse
from pl_dendrites.core import Soma, UnitSet, attach_shared
from pl_dendrites.core.fusing.fetch import Few
from pl_dendrites.export import main
from pl_dendrites.exporting import fused as exporting
from pl_dendrites.exporting.fused import Exported
from tests.models import QUIET, bits, classifier, loaders, quick, same_bits, train

ENDINGS = {"pickle": "pt", "pt2": "pt2"}

# Of the reader, in a file of their own, where neither this package nor its tests are.
NETS = """
import lightning as L
import torch
from torch import nn
class Net(L.LightningModule):
    def __init__(self, hidden=6):
        super().__init__()
        self.body, self.head = nn.Linear(4, hidden), nn.Linear(hidden, 3)
    def forward(self, x):
        return self.head(torch.relu(self.body(x)))
class Sized(Net):
    def __init__(self, size):
        super().__init__(size)
class Shown(Net):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.ones(2, 4)
"""
READ = """
import sys
sys.modules["pl_dendrites"] = None
import torch
nets = [torch.export.load("best.pt2").module(), torch.load("best.pt", weights_only=False)]
torch.save([net(torch.load("x")).detach() for net in nets], "answers")
"""


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.body(x)
        return y * scale[:, None], {"mean": y.mean(1)}


def grow(model: nn.Module) -> nn.Module:
    network = attach(model)
    network.grow(network.targets)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ROUNDS", 2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a grown model of a class that stands in a file here, and its checkpoint."""
    Path("nets.py").write_text(NETS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "nets", raising=False)

    def make(name: str = "Net", **arguments: Any) -> Any:
        import nets  # type: ignore[import-not-found]

        model = grow(getattr(nets, name)(**arguments))
        torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": L.__version__}, "best.ckpt")
        return model

    yield make
    sys.modules.pop("nets", None)


@pytest.mark.long
def test_the_command_writes_what_answers_as_the_model_where_this_package_is_not(
    made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = made(), torch.randn(7, 4)
    for kind, ending in ENDINGS.items():
        main(["best.ckpt", "--model", "nets.Net", "--to", kind, "--input", "4"])
        assert f"{Path(f'best.{ending}').stat().st_size:,} bytes" in capsys.readouterr().out
    torch.save(x, "x")
    subprocess.run([sys.executable, "-c", READ], check=True)
    for answers in torch.load("answers"):
        torch.testing.assert_close(answers, model(x).detach())


def test_the_command_finds_examples_in_a_file_or_on_the_model(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = made("Shown").eval()
    torch.save(3 * torch.ones(5, 4), "x.pt")
    command = ["best.ckpt", "--model", "nets:Shown", "--to", "pickle", "--output", "new/out.pt"]
    for more, x in (([], torch.ones(2, 4)), (["--input", "x.pt"], 3 * torch.ones(5, 4))):
        main([*command, *more])
        assert f"largest answer {model(x).abs().max().item():.1e}" in capsys.readouterr().out
    assert Path("new/out.pt").is_file()


def test_the_command_gives_arguments_to_the_model(made: Any) -> None:
    model, x = made(hidden=9), torch.randn(2, 4)
    main(["best.ckpt", "--model", "nets.Net", "--to", "pickle", "--input", "4", "--arguments", '{"hidden": 9}'])
    torch.testing.assert_close(torch.load("best.pt", weights_only=False)(x), model(x))


BAD = {
    "no examples": ([], "no example_input_array"),
    "made-up examples for eight bits": (["--input", "4", "--int8"], "--input examples.pt"),
    "a file that is not there": (["--input", "nowhere.pt"], "nowhere.pt"),
    "a file of something else": (["--input", "nets.py"], "no file of tensors"),
    "no class": (["--model", "nets.torch"], "my_package.models.Net"),
    "a class that needs arguments": (["--model", "nets.Sized"], "--arguments"),
    "no module": (["--model", "nowhere.Net"], "nowhere"),
    "a bare name": (["--model", "Net"], "my_package.models.Net"),
    "no format": (["--to", "gguf"], "invalid choice"),
    "arguments that are a list": (["--arguments", "[1]"], "JSON object"),
    "no checkpoint": (["--output", "b.pt2", "other.ckpt"], "other.ckpt"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_command_says_what_is_wrong(name: str, made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    more, said = BAD[name]
    checkpoint = [] if name == "no checkpoint" else ["best.ckpt"]
    with pytest.raises(SystemExit):
        main([*checkpoint, "--model", "nets.Net", "--to", "pt2", *more])
    assert said in capsys.readouterr().err
    assert not list(Path().glob("*.pt2"))


def test_eight_bits_of_a_compact_file_are_of_the_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps its sparse values narrow is no substitute where there are few of these or none."""
    calls, plain = [], exporting.FORMATS["pickle"]

    def small(fused: nn.Module, *given: Any) -> None:
        calls.append("small")
        plain.write(fused, *given)

    form = replace(plain, write_small=small, compact_small=Few.NARROW)
    monkeypatch.setattr(exporting, "FORMATS", {"pickle": form})
    x, sparse = torch.randn(64, 400), Soma(400, 3)
    network = attach_shared(sparse)
    sparse(x)
    network.set_next(UnitSet(units=40, field=20))
    network.start_candidates()
    (sparse(x) - x[:, :3]).square().sum().backward()
    network.integrate()
    export_fused(sparse, "net.pt", x, to="pickle", int8=True, compact=True)
    assert not calls
    for model in (nn.Linear(400, 3), nn.Sequential(nn.Linear(400, 400), sparse)):
        export_fused(model, "net.pt", x, to="pickle", int8=True, compact=True)
    assert calls == ["small", "small"]


@pytest.mark.parametrize("kind", ENDINGS)
def test_several_arguments_and_answers(kind: str) -> None:
    model, inputs = grow(Two()), (torch.randn(1, 4), torch.randn(1))
    exported = export_fused(model, f"two.{kind}", inputs, to=kind)
    scaled, others = model(*inputs)
    assert exported.largest_answer == pytest.approx(max(scaled.abs().max().item(), others["mean"].abs().item()))
    assert exported.largest_difference < 1e-5
    assert exported.bytes == Path(f"two.{kind}").stat().st_size
    assert exported.microseconds > 0 < exported.model_microseconds


def test_the_model_stays_as_it_is() -> None:
    model = grow(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert export_fused(model, "net.pt", torch.randn(4, 4), to="pickle").largest_difference < 1e-5
    assert [part.training for part in model.modules()] == modes
    after, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    assert after == threads + 1
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_trainer_goes_on_with_a_fused_module() -> None:
    """It is a module of the same class: tested, used to predict, and trained on as a plain one."""
    dendrites, model = quick(), classifier()
    train(model, dendrites)
    fused, data = fuse(model), loaders()[1]
    trainer = L.Trainer(**QUIET)
    own, of_fused = (trainer.test(net, data, verbose=False)[0] for net in (model, fused))
    assert own == pytest.approx(of_fused, rel=1e-5)
    answers = [torch.cat(trainer.predict(net, DataLoader(data.dataset.tensors[0], 64))) for net in (model, fused)]
    torch.testing.assert_close(*answers)
    before = bits(fused)
    L.Trainer(max_epochs=1, **QUIET).fit(fused, *loaders())
    assert not same_bits(bits(fused), before)


@pytest.mark.parametrize("wrong", ["other", "none", "shape"])
def test_a_file_that_answers_otherwise_is_not_written(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: nn.Module, few: Few) -> nn.Module:
        last = {"other": nn.Linear(3, 3), "none": nn.Threshold(1e9, float("nan")), "shape": nn.Flatten(0)}[wrong]
        return nn.Sequential(model, last)

    Path("net.pt").write_text("former", encoding="utf-8")
    monkeypatch.setattr(exporting, "fuse_with", spoilt)
    with pytest.raises(ValueError, match="nothing is written"):
        export_fused(nn.Linear(4, 3), "net.pt", torch.randn(4, 4), to="pickle")
    assert Path("net.pt").read_text(encoding="utf-8") == "former"
    assert [path.name for path in Path().iterdir()] == ["net.pt"]


def test_compact_is_smaller() -> None:
    model, x = Soma(400, 3), torch.randn(64, 400)
    network = attach_shared(model)
    model(x)
    network.set_next(UnitSet(units=40, field=20))
    network.start_candidates()
    (model(x) - x[:, :3]).square().sum().backward()
    network.integrate()
    sizes = [export_fused(model, "net.pt", x, to="pickle", compact=compact).bytes for compact in (False, True)]
    assert sizes[1] < sizes[0] / 5


@pytest.mark.parametrize("kind", ENDINGS)
def test_eight_bits_are_refused_where_there_are_none(kind: str) -> None:
    with pytest.raises(ValueError, match=r"onnx or executorch.*quantize_"):
        export_fused(nn.Linear(4, 3), "net.pt", torch.randn(4, 4), to=kind, int8=True)


@pytest.mark.parametrize("kind", ["onnx", "executorch"])
def test_a_package_that_is_missing_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"onnx": "onnxscript", "executorch": "executorch"}[kind]
    seen = "pl_dendrites.exporting.form.find_spec"
    monkeypatch.setattr(seen, lambda given: None if given == name else find_spec("torch"))
    with pytest.raises(ModuleNotFoundError, match=f"pip install {name}$"):
        export_fused(nn.Linear(4, 3), "net.any", torch.randn(4, 4), to=kind)


@pytest.mark.parametrize(
    "inputs", [(), torch.tensor(1.0), torch.ones(0, 4), (torch.ones(2, 4), torch.ones(3)), {"x": torch.ones(2, 4)}]
)
def test_inputs_that_are_no_examples_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"`inputs` must be a tensor of examples"):
        export_fused(nn.Linear(4, 3), "net.pt", inputs, to="pickle")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="`to` must be one of"):
        export_fused(nn.Linear(4, 3), "net.pt", torch.randn(4, 4), to="gguf")


def test_a_table_says_all() -> None:
    table = str(Exported(Path("net.onnx"), "onnx", True, 12345, 1.5e-7, 2.0, 12.4, 345.6))
    for part in ("net.onnx", "eight bits", "12,345", "12 us", "346 us", "1.5e-07", "2.0e+00"):
        assert part in table
