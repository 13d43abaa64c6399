"""What do dendrites cost in time and memory? Each step beside the plain network's, and beside the limit.

    python examples/benchmarks/speed.py [--networks mlp-512 ...] [--parts steps memory ...] [--repeats 7] [--out DIR]
                                        [--peer-python PYTHON] [--device cuda]

All variants of a network take turns, so that what else the machine does meets all of them; shown is the median of the
ratios to the plain step of the same turn. With forward, input gradient and weight gradient of a layer costing 1 each, a
plain step costs 3, and k dendrites with a pool of P at least

    base step (3 + k) / 3,   correlation step (2 + k + 2 P) / 3,   gradient learning 1 + k,   inference 1 + k

times as much. One thread, unless OMP_NUM_THREADS says otherwise. ``--peer-python`` is the Python of an environment that
has ``perforatedai``: its steps on the same networks come beside ours. ``--out`` gets speed.md, speed.json and pictures.
On a GPU the networks are larger and compute in bfloat16; growth and what happens once are timed on a CPU alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from costs import compiled, growth, memory, once, peer, steps, tables
from costs.networks import GPU_NETWORKS, NETWORKS

PARTS = ("steps", "memory", "compiled", "growth", "once")


def sections(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """Title, table and figures of every part, as each is done."""
    parts, repeats, device = options.parts, options.repeats, options.device
    known = NETWORKS if device == "cpu" else GPU_NETWORKS
    networks = options.networks or list(known)
    if "steps" in parts:
        rows = [row for name in networks for row in steps.measure(known, name, repeats, device)]
        if options.out is not None:
            tables.picture(rows, options.out / "steps.svg")
        yield "Steps", tables.steps(rows), [asdict(row) for row in rows]
        if options.peer_python is not None:
            peers = peer.measure(options.peer_python, rows, repeats)
            yield "The open peer", tables.peer(peers), [asdict(row) for row in peers]
    if "memory" in parts:
        peaks = [row for name in networks for row in memory.measure(known, name, device)]
        yield "Peak memory", tables.memory(peaks), [asdict(row) for row in peaks]
    if "compiled" in parts:
        gains = [row for name in networks for row in compiled.measure(known, name, repeats, device)]
        yield "Compiled", tables.compiled(gains), [asdict(row) for row in gains]
    if "growth" in parts:
        found, share = growth.series(repeats), growth.cascade_share(repeats)
        if options.out is not None:
            growth.picture(found, options.out / "growth.svg")
        said = f"Five dendrites see the earlier ones of their neuron in {share:.1%} of a base step, 512 neurons."
        yield (
            "Growth",
            f"{tables.growth(found)}\n\n{said}",
            {
                "series": [asdict(one) for one in found],
                "cascade_share": share,
            },
        )
    if "once" in parts:
        times = once.measure(min(repeats, 5))
        yield "Once", tables.once(times), times


PICTURES = {"Steps": "steps.svg", "Growth": "growth.svg"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=sorted({*NETWORKS, *GPU_NETWORKS}), help="all of a device's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-python", help="Python of an environment with perforatedai; goes with the steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    pages, figures = ["# What dendrites cost"], {}
    for title, text, values in sections(options):
        print(f"## {title}\n\n{text}\n", flush=True)
        shown = f"\n\n![{title}]({PICTURES[title]})" if title in PICTURES else ""
        pages.append(f"## {title}\n\n{text}{shown}")
        figures[title] = values
        if options.out is not None:  # as far as it came
            (options.out / "speed.md").write_text("\n\n".join(pages) + "\n")
            (options.out / "speed.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
