"""A network that is trained whole, and then cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

from torch import nn

from pl_dendrites.controls.hold import Hold, Stage
from pl_dendrites.controls.masks import keep_largest, left_for, weights_of

__all__ = ["pruned"]

# The whole network and what is left after the last cut are trained twice as long as the networks between.
_LENGTHS = (2, 1, 1, 1, 2)


def pruned(model: nn.Module, parameters: int, epochs: int, names: Iterable[str] | None = None) -> Iterator[Stage]:
    """Train a network, take the smallest of all its weights from it, and train it on: four cuts, between five fits.

    Each cut leaves the same share of what was there. Of few epochs a fit may have none, and is left out.

    Args:
        model: the dense network, not trained yet.
        parameters: that it has after the last cut, all in all.
        epochs: of all fits together, at least one of them after the last cut.
        names: of the weights that are cut; ``None``: all that can be.

    Yields:
        Each fit, to be done before the next is asked for. A fit should leave the model with its best weights.

    Raises:
        ValueError: if the model cannot have so many parameters.

    Example:
        >>> from pl_dendrites.controls import parameters_left
        >>> model = nn.Linear(200, 5)
        >>> [(stage.epochs, parameters_left(model)) for stage in pruned(model, 105, epochs=14)]
        [(4, 1005), (2, 567), (2, 321), (2, 183), (4, 105)]
    """
    weights = weights_of(model, names)
    left = left_for(model, parameters, weights.values())
    whole = sum(weight.numel() for weight in weights.values())
    ends = [epochs * length // sum(_LENGTHS) for length in accumulate(_LENGTHS)]
    for cut, (start, end) in enumerate(pairwise([0, *ends])):
        if cut:
            keep_largest(model, list(weights), round(whole * (left / whole) ** (cut / (len(_LENGTHS) - 1))))
        if end > start:
            yield Stage(end - start, (Hold(),))
