"""Does a pruned network that grows do better than one that is pruned alone, with as many weights left?

    python examples/companions/pruning.py --seeds 3

A network on digits is trained, cut four times to a few weights, and then grows sparse dendrites while a callback keeps
what was cut at zero. The control is the same network, cut to as many weights as the grown one has with its dendrites,
and trained for as many epochs. A third row shows what the cut network has before it grows.
"""

from __future__ import annotations

import lightning as L
from common import Classifier, Row, Settings, accuracy, fit, growing, main, mlp

from pl_dendrites.controls import Hold, parameters_left, pruned

HIDDEN, LEFT = 32, 250


def prune(parameters: int, epochs: int, seed: int) -> tuple[Classifier, Row]:
    """A network that is trained, cut and trained on until so many parameters are left."""
    L.seed_everything(seed, verbose=False)
    model = Classifier(mlp(HIDDEN))
    done = sum(
        fit(model, epochs=stage.epochs, callbacks=stage.callbacks) for stage in pruned(model, parameters, epochs)
    )
    return model, Row(parameters_left(model), done, accuracy(model))


def grow(model: Classifier, settings: Settings) -> int:
    """Let what is left of a network grow; `Hold` keeps its masks, which lie beside the weights of its layers."""
    return fit(model, growing(settings, fan_in=6), callbacks=[Hold()])


def compare(seed: int, settings: Settings) -> dict[str, Row]:
    model, cut = prune(LEFT, settings.epochs * 3, seed)
    epochs = cut.epochs + grow(model, settings)
    grown = Row(parameters_left(model), epochs, accuracy(model))
    _, control = prune(grown.size, epochs, seed)
    return {"pruned": cut, "pruned, then grown": grown, "control: pruned alone, as many left": control}


if __name__ == "__main__":
    main(compare, __doc__, "parameters left")
