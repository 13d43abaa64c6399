"""What a format must have, and what several share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pl_dendrites.core.fusing.fetch import Few

__all__ = ["Format", "Inputs", "Run", "Write", "program_of", "rows", "tensors_in"]

# What a model is called with: each of one or more arguments has a row for each example.
Inputs: TypeAlias = tuple[Tensor, ...]
Write: TypeAlias = Callable[[nn.Module, Inputs, Path], None]
Run: TypeAlias = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Attributes:
        ending: of its names.
        write: writes a fused module. The inputs are examples.
        load: gives what answers to inputs, in the order in which the model returns its tensors. In one thread, where it
            can be asked for.
        packages: names under which PyPI has, and Python imports, what this needs.
        write_small: the same in eight bits, or none. The inputs say what range each value has.
        compact: how it has the fewest bytes.
        compact_small: the same in eight bits, which need not be computed in; ``None``: as ``compact``, by
            ``write_small``.
    """

    ending: str
    write: Write
    load: Callable[[Path], Run]
    packages: tuple[str, ...] = ()
    write_small: Write | None = None
    compact: Few = Few.SPREAD
    compact_small: Few | None = None

    def missing(self) -> list[str]:
        """Which of the packages are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


def rows(inputs: Inputs, number: int) -> Inputs:
    """The first examples, from the beginning again where there are fewer.

    Example:
        >>> rows((torch.tensor([5, 6, 7]),), 4)
        (tensor([5, 6, 7, 5]),)
    """
    return tuple(value[torch.arange(number) % len(value)] for value in inputs)


def tensors_in(answers: Any) -> list[Tensor]:
    """All tensors that a model returned, in order.

    Example:
        >>> tensors_in((torch.tensor(1), {"mean": torch.tensor(2)}))
        [tensor(1), tensor(2)]
    """
    if isinstance(answers, Tensor):
        return [answers]
    if isinstance(answers, dict):
        answers = tuple(answers.values())
    if isinstance(answers, (tuple, list)):
        return [tensor for part in answers for tensor in tensors_in(part)]
    return []


def program_of(fused: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """One program for any number of examples."""
    batch = torch.export.Dim("batch")
    two = rows(inputs, 2)  # of one, it would be a program for one
    return torch.export.export(fused, two, dynamic_shapes=tuple({0: batch} for _ in two), strict=False)
