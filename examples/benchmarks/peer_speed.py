"""Steps of the open peer, ``perforatedai`` 3.2.9, beside the plain network's: for an environment that has it.

    PYTHON_WITH_IT examples/benchmarks/peer_speed.py [--networks mlp-512 ...] [--repeats 7] [--drawing]

It learns by gradient; its correlation rule is sold separately. ``speed.py --peer-python PYTHON_WITH_IT`` starts this
and reads the one line of JSON that it writes. A switch is its call that adds a set and, as is its way, writes the
network to disk; without ``--drawing`` it makes no pictures, which it does by default and which take most of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

WIDTHS = {"mlp-letters": (16, 16, 26), "mlp-512": (512,) * 4, "mlp-2048": (2048,) * 4}
BATCH, SETS = 256, 3


def plain(name):
    pairs = pairwise(WIDTHS[name])
    return nn.Sequential(*[module for pair in pairs for module in (nn.Linear(*pair), nn.ReLU())][:-1])


def stepping(model, x):
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad])

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step, optimizer


def ratio(step, reference, repeats):
    """The median of a step's time over the reference's, as they take turns."""
    for warm in (step, reference):
        warm()
    start = time.perf_counter()
    reference()
    count = max(1, round(0.05 / (time.perf_counter() - start)))
    ratios = []
    for _ in range(repeats):
        seconds = []
        for timed in (step, reference):
            start = time.perf_counter()
            for _ in range(count):
                timed()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def configure(settings):
    # Unattended: nothing is asked, and a set is added at every second score, whatever the score.
    settings.set_configuration_confirmed(True)
    settings.set_unwrapped_modules_confirmed(True)
    settings.set_weight_decay_accepted(True)
    settings.set_dashboard_events_enabled(False)
    settings.set_testing_dendrite_capacity(False)
    settings.set_silent(True)
    settings.set_device(torch.device("cpu"))
    settings.set_use_cuda(False)
    settings.set_switch_mode(settings.DOING_FIXED_SWITCH)
    settings.set_fixed_switch_num(2)
    settings.set_first_fixed_switch_num(2)
    settings.set_retain_all_dendrites(True)
    settings.set_max_dendrites(SETS)


def measure(name, repeats, drawing):
    # Each network has a run folder of its own: the peer reads back what it finds there.
    from perforatedai import globals_perforatedai as settings
    from perforatedai import utils_perforatedai as utils

    configure(settings.pc)
    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTHS[name][0])
    reference, _ = stepping(plain(name), x)
    model = utils.perforate_model(plain(name), save_name=name, making_graphs=drawing)
    tracker = settings.pai_tracker
    rows, score = [], 0.0
    for dendrites in range(1, SETS + 1):
        step, optimizer = stepping(model, x)
        tracker.set_optimizer_instance(optimizer)
        restructured = False
        while not restructured:
            step()
            start = time.perf_counter()
            model, restructured, done = tracker.add_validation_score(score, model)
            seconds = time.perf_counter() - start
            score += 1.0  # better every time: what it added last is kept
            if done:
                raise RuntimeError(f"it stopped before it had {dendrites} dendrites")
        own = ratio(stepping(model, x)[0], reference, repeats)
        rows.append({"network": name, "dendrites": dendrites, "ratio": own, "switch_seconds": seconds})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--drawing", action="store_true", help="let it make pictures, as it does by default")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # It prints, and writes into the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.chdir(folder)
        rows = [row for name in options.networks for row in measure(name, options.repeats, options.drawing)]
        os.chdir(Path(folder).parent)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
