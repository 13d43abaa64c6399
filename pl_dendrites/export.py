"""The command that writes a grown network for use elsewhere.

It takes a checkpoint of a Trainer::

    pl-dendrites-export best.ckpt --model my_package.models.Classifier --to onnx --input examples.pt --int8

``python -m pl_dendrites.export`` is the same. In Python, :func:`pl_dendrites.export_fused` does it to a model at hand.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from pl_dendrites.exporting.fused import FORMATS, export_fused
from pl_dendrites.saved.loading import load_from_checkpoint

__all__ = ["main"]

_SHAPE = re.compile(r"\d+(,\d+)*")
_EXAMPLES = 16  # made up, where a shape alone is given


def main(arguments: Sequence[str] | None = None) -> None:
    """The command ``pl-dendrites-export``.

    Args:
        arguments: instead of those of the process.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    path = given.output or Path(Path(given.checkpoint).stem + FORMATS[given.to].ending)
    try:
        if given.int8 and (given.input is None or _SHAPE.fullmatch(given.input)):
            raise ValueError("--int8 is fitted to real examples: give a file of them, --input examples.pt")
        model = _load(_class(given.model), given.checkpoint, given.arguments)
        inputs = _inputs(given.input, model)
        exported = export_fused(model, path, inputs, to=given.to, int8=given.int8, compact=given.compact)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{exported}\n")


def _parser() -> ArgumentParser:
    parser = ArgumentParser("pl-dendrites-export", description="Write a grown network for use elsewhere.")
    parser.add_argument("checkpoint", help="of a Trainer that grew dendrites, or the callback's best.ckpt")
    parser.add_argument(
        "--model", required=True, metavar="PACKAGE.MODULE.CLASS", help="the LightningModule that the checkpoint is of"
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument(
        "--input",
        metavar="FILE|SHAPE",
        help="examples by which the file is compared with the model: a tensor, or a list of one for each argument,"
        " that torch.save wrote, examples first; or the shape of one example, 1,28,28, for random numbers. Unless"
        " given, the model's example_input_array",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="unless given, named as the checkpoint, and here")
    parser.add_argument("--int8", action="store_true", help="compute in eight bits; for onnx and executorch")
    parser.add_argument("--compact", action="store_true", help="smaller files of shared dendrites")
    parser.add_argument(
        "--arguments",
        type=_arguments,
        default={},
        metavar="JSON",
        help='of the model, beside those saved: {"hidden": 32}',
    )
    return parser


def _arguments(text: str) -> dict[str, Any]:
    made = json.loads(text)
    if not isinstance(made, dict):
        raise ArgumentTypeError('a JSON object is needed, as {"hidden": 32}')
    return made


def _class(name: str) -> type[pl.LightningModule]:
    module, _, called = name.replace(":", ".").rpartition(".")
    here = str(Path.cwd())  # as `python -m` has it, and a command has not
    if here not in sys.path:
        sys.path.insert(0, here)
    found = getattr(import_module(module), called, None) if module else None
    if not (isinstance(found, type) and callable(getattr(found, "load_from_checkpoint", None))):
        raise ValueError(f"--model: a LightningModule's full name is needed, as my_package.models.Net; got {name!r}")
    return found


def _load(model_class: type[pl.LightningModule], path: str, arguments: dict[str, Any]) -> pl.LightningModule:
    try:
        return load_from_checkpoint(model_class, path, **{"map_location": "cpu", **arguments})
    except TypeError as error:
        raise ValueError(f"{error}; --arguments gives the model what the checkpoint has not") from error


def _inputs(given: str | None, model: pl.LightningModule) -> Tensor | Sequence[Tensor]:
    if given is None:
        found: Any = model.example_input_array
        if found is None:
            raise ValueError("--input is needed, for the model has no example_input_array: a file, or a shape")
        return found  # type: ignore[no-any-return]
    if _SHAPE.fullmatch(given):
        shape = (_EXAMPLES, *map(int, given.split(",")))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        read: Tensor | Sequence[Tensor] = torch.load(given, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(f"--input: '{given}' is no file of tensors that torch.save wrote: {error}") from error
    return read


if __name__ == "__main__":
    main()
