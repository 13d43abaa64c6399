"""How long does one call take? A grown network beside plain ones, as it is and on every route out of training.

    python examples/benchmarks/latency.py [--width 512] [--dendrites 3] [--batches 1 32] [--rounds 200] [--out FILE]

An MLP of two layers of that width is measured plain, plain with as many parameters as the grown one (a wider hidden
layer), grown with frozen dendrites, and fused: in eager mode, compiled, exported, and in onnxruntime where that is
installed. All take turns, so that what else the machine does meets all of them; one thread. Every cell is median
(minimum) in microseconds. Below stand the first compiled call in seconds, and times plain of the same route, the median
of the ratios turn by turn and the ratio of the minima, and in brackets both over the ratio of the multiplications.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from pl_dendrites import fuse
from pl_dendrites.core import attach

Call = Callable[[], object]
Key = tuple[str, str]  # a network and its route
ROUTES = ("eager", "compiled", "exported", "onnxruntime")


def mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).eval()


def networks(width: int, dendrites: int) -> dict[str, nn.Module]:
    grown = mlp(width, width)
    network = attach(grown)
    grown(torch.randn(2, width))
    for _ in range(dendrites):
        network.grow(network.can_grow())
    for weight, _ in network.trained_parameters():
        nn.init.normal_(weight, std=0.1)  # as if a base phase had trained it
    count = sum(parameter.numel() for parameter in grown.parameters())
    wide = mlp(width, (count - width) // (2 * width + 1))
    return {"plain": mlp(width, width), "as many parameters": wide, "grown": grown, "fused": fuse(grown)}


def multiplications(name: str, width: int, dendrites: int) -> int:
    """Of one example, in a network of two layers: products, and what each dendrite and link adds to them."""
    if name == "plain":
        return 2 * width * width
    return 2 * (width * width * (1 + dendrites) + width * (dendrites + dendrites * (dendrites - 1) // 2))


def calls(model: nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Call, float]]:
    """Each route: its name, a call, and the seconds that its first call took."""
    yield "eager", lambda: model(x), 0.0
    compiled, start = torch.compile(copy.deepcopy(model)), time.perf_counter()
    compiled(x)
    yield "compiled", lambda: compiled(x), time.perf_counter() - start
    program = torch.export.export(model, (x,))
    exported = program.module()
    yield "exported", lambda: exported(x), 0.0
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        yield "onnxruntime", onnx_call(program, x, folder / "network.onnx"), 0.0


def onnx_call(program: torch.export.ExportedProgram, x: Tensor, path: Path) -> Call:
    import onnxruntime

    written = torch.onnx.export(program, verbose=False)
    assert written is not None
    written.save(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def turns(every: dict[Key, Call], rounds: int, times: int = 5) -> dict[Key, list[float]]:
    """Microseconds of a call, one figure a round."""
    found: dict[Key, list[float]] = {key: [] for key in every}
    for round_ in range(-10, rounds):  # the first warm up
        for key, call in every.items():
            start = time.perf_counter()
            for _ in range(times):
                call()
            if round_ >= 0:
                found[key].append((time.perf_counter() - start) / times * 1e6)
    return found


def measure(width: int, dendrites: int, batch: int, rounds: int) -> str:
    """A table in Markdown."""
    x, every, first = torch.randn(batch, width), {}, {}
    models = networks(width, dendrites)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            torch.compiler.reset()
            for route, call, seconds in calls(model, x, Path(folder)):
                every[name, route], first[name, route] = call, seconds
        found = turns(every, rounds)
    routes = [route for route in ROUTES if ("plain", route) in every]
    own = {name: multiplications(name, width, dendrites) for name in models}
    lines = [
        f"Batch {batch}, {width} wide, {dendrites} dendrites:",
        "",
        f"| microseconds, median (minimum) | {' | '.join(routes)} | first compiled call, s |",
        f"|---|{'---|' * (len(routes) + 1)}",
    ]
    for name in models:
        cells = [f"{statistics.median(found[name, route]):.1f} ({min(found[name, route]):.1f})" for route in routes]
        lines.append(f"| {name} | {' | '.join(cells)} | {first[name, 'compiled']:.1f} |")
    lines += [
        "",
        f"| times plain (over the arithmetic's ratio) | {' | '.join(routes)} |",
        f"|---|{'---|' * len(routes)}",
    ]
    for name in list(models)[1:]:
        cells = []
        for route in routes:
            pairs = zip(found[name, route], found["plain", route], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
            least = min(found[name, route]) / min(found["plain", route])
            more = own[name] / own["plain"]
            cells.append(f"{ratio:.2f}, {least:.2f} ({ratio / more:.2f}, {least / more:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dendrites", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tables = []
    with torch.no_grad():
        for batch in options.batches:
            tables.append(measure(options.width, options.dendrites, batch, options.rounds))
            print(f"{tables[-1]}\n", flush=True)
    if options.out is not None:
        options.out.write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
