"""Does a tiny recursive network that grows do better than one with a wider block and as many parameters?

    python examples/companions/recursive.py --seeds 3

One block is applied four times to a state and the digits, and the loss is the mean over the answers after each time
(deep supervision). An average of the weights (EMA), a frozen copy inside the module, gives the answers that count. It
begins as a copy, so that it is found as a mirror, and gets every set of dendrites in the same moment as the network.
The control has a wider block, as many parameters, an average as well, and as many epochs.
"""

from __future__ import annotations

import copy

import lightning as L
import torch
from common import Classifier, Row, Settings, accuracy, fit, growing, main
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.controls import closest_width, parameters_left

STATE, HIDDEN = 8, 6


class Recursive(nn.Module):
    """One block, applied again and again; returns an answer for each time."""

    def __init__(self, hidden: int, times: int = 4) -> None:
        super().__init__()
        self.read, self.answer, self.times = nn.Linear(64, STATE), nn.Linear(STATE, 10), times
        self.block = nn.Sequential(nn.Linear(2 * STATE, hidden), nn.ReLU(), nn.Linear(hidden, STATE))

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = self.read(x)
        state, answers = torch.zeros_like(seen), []
        for _ in range(self.times):
            state = torch.tanh(state + self.block(torch.cat([seen, state], 1)))
            answers.append(self.answer(state))
        return answers


class Averaged(Classifier):
    """An ordinary LightningModule that averages its weights; it knows nothing of dendrites."""

    def __init__(self, net: nn.Module, decay: float = 0.98) -> None:
        super().__init__(net)
        self.average, self.decay = copy.deepcopy(net).requires_grad_(False), decay

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return torch.stack([F.cross_entropy(answer, batch[1]) for answer in self.net(batch[0])]).mean()

    @torch.no_grad()
    def on_train_batch_end(self, *_: object) -> None:
        for average, own in zip(self.average.parameters(), self.net.parameters(), strict=True):
            average.lerp_(own, 1 - self.decay)

    def predict(self, x: Tensor) -> Tensor:
        return self.average(x)[-1]


def averaged(hidden: int, seed: int) -> Averaged:
    L.seed_everything(seed, verbose=False)
    return Averaged(Recursive(hidden))


def compare(seed: int, settings: Settings) -> dict[str, Row]:
    grown = averaged(HIDDEN, seed)
    epochs = fit(grown, growing(settings))
    rows = {"recursive, grown": Row(parameters_left(grown.net), epochs, accuracy(grown))}

    wider = closest_width(lambda hidden: parameters_left(Recursive(hidden)), rows["recursive, grown"].size)
    for name, hidden in {"recursive, not grown": HIDDEN, "control: wider block, equal parameters": wider}.items():
        control = averaged(hidden, seed)
        epochs = fit(control, epochs=epochs)
        rows[name] = Row(parameters_left(control.net), epochs, accuracy(control))
    return rows


if __name__ == "__main__":
    main(compare, __doc__)
