"""How large is a network of many inputs in a file, and how long does a call of that take? Beside a plain one as good.

    python examples/benchmarks/files.py [--inputs 784] [--outputs 10] [--plain 256] [--units 141] [--rounds 100]

Shared dendrites and a plain network with a hidden layer, as ``wide.py`` found them equally good on MNIST: 141 units,
6,073 parameters, and 256 hidden neurons, 203,530 parameters. Both are fused and written by ``export_fused`` into every
format whose packages are installed, whole and compact, in 32 bits and in eight. Bytes are all of the file. One example
a call, one thread; all files of a format take turns. Microseconds are median (minimum); behind each figure is the
multiple of the plain network's.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from latency import turns
from torch import Tensor, nn

from pl_dendrites import export_fused
from pl_dendrites.core import Soma, UnitSet, attach_shared
from pl_dendrites.exporting.fused import FORMATS

FIELD, SETS = 32, 7  # the last of three sets has four sevenths of the units


class Cell(NamedTuple):
    """A file: of which network, in eight bits or not, compact or not."""

    name: str
    int8: bool
    compact: bool


def grown(x: Tensor, outputs: int, units: int) -> nn.Module:
    """A network of shared dendrites; what they have learned is not asked for here."""
    model = Soma(x.shape[1], outputs)
    network = attach_shared(model)
    model(x)
    for size in (units // SETS, 2 * units // SETS, units - units // SETS - 2 * units // SETS):
        network.set_next(UnitSet(units=size, field=FIELD))
        network.start_candidates()
        (model(x) - x[:, :outputs]).square().sum().backward()
        network.integrate()
    return model.eval()


def table(to: str, models: dict[str, nn.Module], x: Tensor, rounds: int) -> list[str]:
    """Rows of one format."""
    form, every, sizes = FORMATS[to], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(
            Cell(name, int8, compact)
            for int8 in ((False, True) if form.write_small else (False,))
            for name, compact in (("plain", False), ("shared dendrites", False), ("shared dendrites", True))
        ):
            path = Path(folder) / f"{number}{form.ending}"
            model = models[cell.name]
            sizes[cell] = export_fused(model, path, x, to=to, int8=cell.int8, compact=cell.compact).bytes
            run = form.load(path)
            every[cell] = lambda run=run: run((x[:1],))
        found = turns(every, rounds)
    rows = []
    for cell, times in found.items():
        plain = Cell("plain", cell.int8, False)
        ratio = statistics.median(own / other for own, other in zip(times, found[plain], strict=True))
        what = f"{to}{', eight bits' * cell.int8}: {cell.name}{', compact' * cell.compact}"
        size = f"{sizes[cell]:,} ({sizes[cell] / sizes[plain]:.3f})"
        least = min(times) / min(found[plain])
        rows.append(
            f"| {what} | {size} | {statistics.median(times):.1f} ({min(times):.1f}) | {ratio:.2f} ({least:.2f}) |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("inputs", 784), ("outputs", 10), ("plain", 256), ("units", 141), ("rounds", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.rand(200, options.inputs)
    hidden = nn.Sequential(
        nn.Linear(options.inputs, options.plain), nn.ReLU(), nn.Linear(options.plain, options.outputs)
    )
    models = {"plain": hidden.eval(), "shared dendrites": grown(x, options.outputs, options.units)}
    print({name: sum(value.numel() for value in model.parameters()) for name, model in models.items()})
    print("| file | bytes (of the plain network's) | microseconds | times plain |\n|---|---|---|---|")
    for to, form in FORMATS.items():
        if not form.missing():
            print("\n".join(table(to, models, x, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
