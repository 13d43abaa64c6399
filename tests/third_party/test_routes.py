"""Where a grown network can go, fused: other formats and eight bits, in a process that has not this package.

Run by ``make test-routes``, which installs the tools into an environment of their own. Each test is left out where its
tool is not there.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pl_dendrites import DendriteCallback, export_fused, fuse
from pl_dendrites.core import Soma, UnitSet, attach_shared
from tests.core.test_fuse_recurrent import grown_net, in_steps
from tests.core.test_tools import network, off
from tests.models import QUIET

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# What may be lost in eight bits: 0.3 points would be one and a half of 497 answers.
_LOST = 2 / 497

LOAD = """
import sys
sys.modules["pl_dendrites"] = None
import torch
torch.set_num_threads(1)
kind, path, x = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
"""
RUN = {
    "pickle": "out = torch.load(path, weights_only=False)(x)",
    "pt2": "out = torch.export.load(path).module()(x)",
    "aoti": "out = torch._inductor.aoti_load_package(path)(x)",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
""",
    "openvino": """
import openvino
exactly = {"INFERENCE_PRECISION_HINT": "f32"}  # else in 16 bits where a machine has them
out = torch.from_numpy(openvino.compile_model(openvino.convert_model(path), "CPU", exactly)([x.numpy()])[0])
""",
    "executorch": """
from executorch.runtime import Runtime
method = Runtime.get().load_program(path).load_method("forward")
out = torch.cat([method.execute([one])[0].clone() for one in x.split(1)])
""",
}


def elsewhere(kind: str, path: Path, x: Tensor) -> Tensor:
    """What a file answers in a process that cannot import this package."""
    torch.save(x, path.with_suffix(".x"))
    code = f"{LOAD}{RUN[kind]}\ntorch.save(out.detach(), path + '.out')"
    command = [sys.executable, "-c", code, kind, str(path), str(path.with_suffix(".x"))]
    subprocess.run(command, check=True, cwd=path.parent)
    return torch.load(f"{path}.out")


class Digits(L.LightningModule):
    """A classifier of handwritten digits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> STEP_OUTPUT:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def parts() -> list[tuple[Tensor, Tensor]]:
    """To learn from, to decide by, and to test with."""
    images, labels = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return list(zip(*(v[order].split([1000, 300, 497]) for v in (images.float() / 16, labels)), strict=True))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)),
    )


GROWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "shared": (lambda: Soma(64, 10), {"max_parameters": 1500, "base_epochs": 40}),
    "private": (convolutions, {"max_dendrites": 2, "patience": 4, "max_correlation_epochs": 6}),
}


@pytest.fixture(scope="module", params=GROWN)
def grown(request: pytest.FixtureRequest) -> nn.Module:
    make, settings = GROWN[request.param]
    L.seed_everything(0, verbose=False)
    model = Digits(make())
    data = [TensorDataset(*part) for part in parts()]
    trainer = L.Trainer(callbacks=[DendriteCallback("val_loss", verbose=False, **settings)], max_epochs=-1, **QUIET)
    trainer.fit(model, DataLoader(data[0], 64, shuffle=True), DataLoader(data[1], 300))
    assert trainer.callbacks[0].history[-1]["parameters"] > sum(p.numel() for p in make().parameters())
    return model.net.eval()


def right(answers: Tensor) -> float:
    return (answers.argmax(1) == parts()[2][1]).float().mean().item()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", RUN)
def test_it_answers_the_same_where_this_package_is_not(
    kind: str, compact: bool, grown: nn.Module, tmp_path: Path
) -> None:
    path, x = tmp_path / f"grown.{'pt2' if kind == 'aoti' else kind}", parts()[2][0]
    if kind == "aoti":
        batch, fused = torch.export.Dim("batch"), fuse(grown, compact=compact)
        program = torch.export.export(fused, (x[:4],), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        pytest.importorskip({"onnx": "onnxruntime", "pt2": "torch", "pickle": "torch"}.get(kind, kind))
        export_fused(grown, path, parts()[0][0], to="onnx" if kind == "openvino" else kind, compact=compact)
    torch.testing.assert_close(elsewhere(kind, path, x), grown(x).detach(), rtol=1e-4, atol=1e-4)


def test_lightnings_own_export_to_onnx(grown: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x, expected = parts()[2][0][:2], grown(parts()[2][0][:2]).detach().numpy()
    whole = Digits(grown).eval()
    for module in (whole, fuse(whole)):
        module.to_onnx(tmp_path / "net.onnx", x)
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_core_ml_takes_it_and_has_one_product_for_a_layer_with_its_dendrites(grown: nn.Module) -> None:
    """Nothing but a Mac runs what comes out."""
    coremltools = pytest.importorskip("coremltools")
    program = torch.export.export(fuse(grown), (parts()[0][0][:1],)).run_decompositions({})
    converted = coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17)
    called = [made.op_type for made in converted._mil_program.functions["main"].operations]
    products = sum(name in {"linear", "conv", "matmul"} for name in called)
    assert products == (2 if isinstance(grown, Soma) else 3)


def test_executorch_has_one_delegate_and_no_operator_outside_it(grown: nn.Module) -> None:
    exir = pytest.importorskip("executorch.exir")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    program = torch.export.export(fuse(grown), (parts()[0][0][:1],))
    edge = exir.to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    called = [node for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    assert len(called) == 2  # the delegate, and what it returns


def test_eight_bits_that_onnxruntime_finds_as_it_runs(grown: nn.Module, tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, ready, small = (tmp_path / f"{name}.onnx" for name in ("grown", "ready", "small"))
    export_fused(grown, path, parts()[0][0], to="onnx")
    quant_pre_process(path, ready)
    quantization.quantize_dynamic(ready, small)
    x = parts()[2][0]
    assert right(elsewhere("onnx", small, x)) >= right(grown(x)) - _LOST


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_eight_bits_in_torchao(name: str, grown: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    fused, x = fuse(grown), parts()[2][0]
    torchao.quantize_(fused, getattr(torchao, name)())
    kinds = {type(part.weight).__name__ for part in fused.modules() if isinstance(part, nn.Linear)}
    assert kinds == {"Int8Tensor"}  # products of a layer with all its dendrites
    assert right(fused(x)) >= right(grown(x)) - _LOST


def test_torchao_on_a_grown_network_reaches_its_plain_layers_alone() -> None:
    """So it needs `fuse`, as the guide says: its QAT leaves no dendrites, without a word."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    small, x = network()
    torchao.quantize_(small, torchao.Int8WeightOnlyConfig())
    reached = {name for name, part in small.named_parameters() if type(part).__name__ == "Int8Tensor"}
    assert reached == {"4.weight", "6.weight"}  # of its two Linears

    qat = QATConfig(torchao.Int8DynamicActivationIntxWeightConfig(weight_granularity=PerGroup(8)), step="prepare")
    model, _ = network()
    kept, fused = copy.deepcopy(model), fuse(model)
    torchao.quantize_(kept, qat)
    assert not any("dendrites" in name for name, _ in [*kept[4].named_modules(), *kept[6].named_modules()])
    torchao.quantize_(fused, qat)
    assert off(fused(x), model(x)) < 0.1 < off(kept(x), model(x))


def test_a_fused_lstm_in_onnxruntime_goes_on_with_a_sequence(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, batch = grown_net(), torch.randn(3, 6, 3), torch.export.Dim("batch")
    fused, path = fuse(model, streaming=["rnn"]), str(tmp_path / "step.onnx")
    two = (x[:2, :1], fused(x[:2, :1])[1])
    program = torch.export.export(fused, two, dynamic_shapes=({0: batch}, ({1: batch}, {1: batch})), strict=False)
    torch.onnx.export(program, two, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]

    def step(entry: Tensor, state: Any) -> tuple[Tensor, Any]:
        given = dict(zip(names, (part.numpy() for part in (entry, *state)), strict=True))
        out, *state = map(torch.from_numpy, session.run(None, given))
        return out, state

    start = [torch.zeros(len(part), 3, part.shape[2]) for part in two[1]]
    torch.testing.assert_close(in_steps(step, x, 1, start)[0], model(x)[0].detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", ["onnx", "executorch"])
def test_what_export_fused_writes(kind: str, int8: bool, grown: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "executorch": "executorch.exir"}[kind])
    path, x = tmp_path / f"grown.{kind}", parts()[2][0]
    exported = export_fused(grown, path, parts()[0][0][:200], to=kind, int8=int8)
    answers, expected = elsewhere(kind, path, x), grown(x).detach()
    assert right(answers) >= right(expected) - _LOST
    # What it says of examples that it saw holds for others too, about.
    assert (answers - expected).abs().max() < 10 * exported.largest_difference
    assert (exported.largest_difference < 1e-4 * exported.largest_answer) is not int8
    assert exported.bytes == path.stat().st_size
    assert not list(tmp_path.glob(".grown*"))


@pytest.mark.parametrize("kind", ["onnx", "executorch"])
def test_files_of_few_inputs_are_small_in_eight_bits_too(kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "executorch": "executorch.exir"}[kind])
    x, plain, grown = (
        torch.rand(64, 784),
        nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
        Soma(784, 10),
    )
    network = attach_shared(grown)
    grown(x)
    network.set_next(UnitSet(units=141, field=32))
    network.start_candidates()
    (grown(x) - x[:, :10]).square().sum().backward()
    network.integrate()

    def size(model: nn.Module, **how: bool) -> int:
        return export_fused(model.eval(), tmp_path / "net", x, to=kind, **how).bytes

    assert size(plain, int8=True) < 0.27 * size(plain)
    assert size(grown, compact=True) < 0.1 * size(plain)
    assert size(grown, compact=True, int8=True) < 0.2 * size(plain, int8=True)
