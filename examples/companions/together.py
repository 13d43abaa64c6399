"""Are pruning, distillation, an averaged recursive block, three bits and growth together smaller than each alone?

    python examples/companions/together.py --seeds 3

Each companion is shown with growth alone, in bytes and accuracy. Then all of them shape one network: a recursive block
with an average of its weights learns from a frozen teacher, is cut, grows sparse dendrites, is fused, and learns on in
three bits, while what was cut stays zero. The control goes the same way without growth: it is cut to as many weights as
the grown network has, and trained for as many epochs.
"""

from __future__ import annotations

import distillation
import lightning as L
import pruning
import quantised
from common import Row, Settings, accuracy, fit, growing, main
from distillation import distilled
from recursive import Averaged, Recursive, averaged
from torch import Tensor, nn

from pl_dendrites import fuse
from pl_dendrites.controls import Hold, keep_largest, parameters_left, pruned, saved_bytes, weights_of

HIDDEN, LEFT = 48, 500


class All(Averaged):
    """An ordinary LightningModule: every answer of the recursive block learns from a teacher; weights are averaged."""

    def __init__(self, net: nn.Module, teacher: nn.Module, rate: float = 0.01) -> None:
        super().__init__(net)
        self.teacher, self.rate = teacher.requires_grad_(False), rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        goal, answers = self.teacher(batch[0]), self.net(batch[0])
        return sum(distilled(answer, goal, batch[1]) for answer in answers) / len(answers)


def cut(teacher: nn.Module, parameters: int, epochs: int, seed: int) -> tuple[nn.Module, int]:
    """The average of a distilled, recursive network that is cut to so many parameters, and its epochs."""
    L.seed_everything(seed, verbose=False)
    net, done = Recursive(HIDDEN), 0
    for stage in pruned(net, parameters, epochs):
        model = All(net, teacher)
        done += fit(model, epochs=stage.epochs, callbacks=stage.callbacks)
        net.load_state_dict(model.average.state_dict())
    return net, done


def grow(net: nn.Module, teacher: nn.Module, settings: Settings) -> tuple[nn.Module, int]:
    """The average of a network that grew, and the epochs of that."""
    model = All(net, teacher)
    epochs = fit(model, growing(settings, fan_in=6, max_dendrites=1), callbacks=[Hold()])
    return model.average, epochs


def in_bits(net: nn.Module, teacher: nn.Module, epochs: int) -> All:
    """A network in plain layers that learns on with three bits, where what is zero stays so."""
    fused = fuse(net).requires_grad_(True)
    weights = {name: int(value.count_nonzero()) for name, value in weights_of(fused).items() if "factors" not in name}
    quantised.prepare(fused)
    for name, left in weights.items():
        path, _, own = name.rpartition(".")
        keep_largest(fused, [f"{path}.parametrizations.{own}.original"], left)
    model = All(fused, teacher, rate=0.003)
    fit(model, epochs=epochs, callbacks=[Hold()])
    return model


def alone(teacher: nn.Module, seed: int, settings: Settings) -> dict[str, Row]:
    """Each companion with growth, and no other."""
    cut, row = pruning.prune(pruning.LEFT, settings.epochs * 3, seed)
    grown = {"pruned": (cut, row.epochs + pruning.grow(cut, settings))}
    models = {"distilled": distillation.student(teacher, distillation.HIDDEN, seed), "recursive": averaged(6, seed)}
    grown |= {name: (model, fit(model, growing(settings))) for name, model in models.items()}
    rows = {f"{n}, grown": Row(saved_bytes(m.net), epochs, accuracy(m)) for n, (m, epochs) in grown.items()}
    rounded, epochs = quantised.trained(seed, settings, before=True, after=True)
    return rows | {"three bits, grown": Row(quantised.stored_bytes(rounded.net), epochs, accuracy(rounded))}


def compare(seed: int, settings: Settings) -> dict[str, Row]:
    teacher, _ = distillation.teach(seed, settings)
    rows = alone(teacher, seed, settings)

    net, epochs = cut(teacher, LEFT, settings.epochs * 3, seed)
    net, more = grow(net, teacher, settings)
    left, epochs = parameters_left(net), epochs + more
    control, _ = cut(teacher, left, epochs, seed)
    for name, own in {"all together, grown": net, "control: all together, not grown": control}.items():
        model = in_bits(own, teacher, settings.epochs)
        size = quantised.stored_bytes(model.average)
        rows[name] = Row(size, epochs + settings.epochs, accuracy(model))
    return rows


if __name__ == "__main__":
    main(compare, __doc__, "bytes", epochs=15)
