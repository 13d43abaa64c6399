"""Networks that could do as well with as many parameters: what a comparison and the benchmark have beside dendrites.

- ``masks`` says which weights of a network are left, where others are zero for good, and chooses them: the largest, or
  by chance.
- ``hold`` keeps them zero while a Trainer fits the network.
- ``pruning`` and ``rigl`` are controls: each says fit by fit how to train a network, and leaves it with as many
  parameters as it was told.
- ``sizes`` counts what is left, in parameters and in bytes, and finds a width by its parameters.

It may import the core and Lightning, and knows neither fits that grow nor what is shown.

Another control: a file here, whose function yields a ``Stage`` for each fit.
"""

from pl_dendrites.controls.hold import Hold, Stage, Stages
from pl_dendrites.controls.masks import keep_largest, keep_some, masks_of, weights_of
from pl_dendrites.controls.pruning import pruned
from pl_dendrites.controls.rigl import Rewire, sparse
from pl_dendrites.controls.sizes import closest_width, parameters_left, saved_bytes

__all__ = [
    "Hold",
    "Rewire",
    "Stage",
    "Stages",
    "closest_width",
    "keep_largest",
    "keep_some",
    "masks_of",
    "parameters_left",
    "pruned",
    "saved_bytes",
    "sparse",
    "weights_of",
]
