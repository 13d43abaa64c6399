"""A network of the benchmark of quality with the dendrites of ``perforatedai`` 3.2.9, by its documented loop.

Runs in an environment that has that package; ``quality.py --peer-python`` starts it. The argument is JSON with the
settings of the network; ``data.pt`` in the working directory has the data. The last line of the output is the result,
as JSON.

The loss on validation data decides, as everywhere, and ``patience`` is the peer's epochs before it adds a set. The rest
is as the peer has it: it searches learning rates after each set, and tries a set that did not help a second time.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from networks import LOSSES, NETWORKS, Batches, scores
from perforatedai import globals_perforatedai as GPA
from perforatedai import utils_perforatedai as UPA

MOST_EPOCHS = 5000


def configure(settings: dict[str, Any]) -> None:
    chosen = {
        "testing_dendrite_capacity": False,
        "configuration_confirmed": True,  # else it asks
        "unwrapped_modules_confirmed": True,  # else it stops in a debugger
        "silent": True,
        "max_dendrites": settings["arguments"]["max_dendrites"],
        "n_epochs_to_switch": settings["arguments"]["patience"],
        **settings["peer"],
    }
    for name, value in chosen.items():
        getattr(GPA.pc, f"set_{name}")(value)


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    data = torch.load("data.pt", weights_only=True)
    torch.manual_seed(settings["seed"])
    configure(settings)
    net = NETWORKS[settings["network"]](settings["width"])
    net = UPA.perforate_model(net, making_graphs=False, maximizing_score=False, save_name="peer")
    tracker = GPA.pai_tracker
    tracker.set_optimizer(torch.optim.Adam)
    tracker.set_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau)

    def make_optimizer() -> torch.optim.Optimizer:
        parameters = {"params": net.parameters(), "lr": settings["rate"]}
        schedule = {"mode": "min", "factor": 0.5, "patience": settings["decay"]}
        return tracker.setup_optimizer(net, parameters, schedule)[0]

    optimizer, epochs, restarts = make_optimizer(), 0, 0
    metric = settings["metric"]
    loss_of = LOSSES[metric]
    batches = Batches(*data[0], settings["batch"], shuffle=True, most=settings["most"])
    start = time.perf_counter()
    while epochs < MOST_EPOCHS:
        net.train()
        for x, y in batches:
            optimizer.zero_grad()
            loss_of(net(x), y).backward()
            optimizer.step()
        epochs += 1
        net, restructured, complete = tracker.add_validation_score(scores(net, *data[1], metric)["loss"], net)
        if complete:
            break
        if restructured:
            optimizer, restarts = make_optimizer(), restarts + 1
    seconds = time.perf_counter() - start
    found = {
        "epochs": epochs,
        "seconds": seconds,
        "score": scores(net, *data[1], metric)["loss"],
        "result": scores(net, *data[2], metric)[metric],
        "parameters": UPA.count_params(net),
        "dendrites": tracker.member_vars["num_dendrites_added"],
        "restarts": restarts,
    }
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
