"""Does a distilled student that grows do better than a wider distilled student with as many parameters?

    python examples/companions/distillation.py --seeds 3

A wide teacher is trained on digits and frozen inside the student's module. The student learns from the labels and from
the teacher's answers while it grows. A frozen layer gets no dendrites, so that the teacher stays what it was. The
control is a student without dendrites that has as many parameters, the same teacher and as many epochs.
"""

from __future__ import annotations

import lightning as L
from common import Classifier, Row, Settings, accuracy, fit, growing, main, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from pl_dendrites.controls import closest_width, parameters_left

HIDDEN, TEACHER = 6, 128


class Student(Classifier):
    """An ordinary LightningModule with a frozen teacher in it; it knows nothing of dendrites."""

    def __init__(self, net: nn.Module, teacher: nn.Module, temperature: float = 2.0) -> None:
        super().__init__(net)
        self.teacher, self.temperature = teacher.requires_grad_(False), temperature

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return distilled(self.net(batch[0]), self.teacher(batch[0]), batch[1], self.temperature)


def distilled(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """The loss of Hinton et al., arXiv:1503.02531, labels and teacher weighing the same."""
    soft, goal = (F.log_softmax(values / temperature, 1) for values in (logits, teacher))
    apart = F.kl_div(soft, goal, reduction="batchmean", log_target=True)
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * temperature**2 * apart


def teach(seed: int, settings: Settings) -> tuple[nn.Module, Row]:
    L.seed_everything(seed, verbose=False)
    teacher = Classifier(mlp(TEACHER))
    epochs = fit(teacher, epochs=settings.epochs)
    return teacher.net, Row(parameters_left(teacher), epochs, accuracy(teacher))


def student(teacher: nn.Module, hidden: int, seed: int) -> Student:
    L.seed_everything(seed, verbose=False)
    return Student(mlp(hidden), teacher)


def compare(seed: int, settings: Settings) -> dict[str, Row]:
    teacher, of_teacher = teach(seed, settings)
    grown = student(teacher, HIDDEN, seed)
    epochs = fit(grown, growing(settings))
    rows = {"teacher": of_teacher, "student, grown": Row(parameters_left(grown.net), epochs, accuracy(grown))}

    wider = closest_width(lambda hidden: 75 * hidden + 10, rows["student, grown"].size)
    controls = {"student, not grown": HIDDEN, "control: wider student, equal parameters": wider}
    for name, hidden in controls.items():
        control = student(teacher, hidden, seed)
        epochs = fit(control, epochs=epochs)
        rows[name] = Row(parameters_left(control.net), epochs, accuracy(control))
    return rows


if __name__ == "__main__":
    main(compare, __doc__)
