"""What a comparison asks, in plain values: answers to another question are not its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from pl_dendrites.core.cost import parameter_count

__all__ = ["differences", "plain", "question"]

_TWO = 2  # a width that tells more of a network than the smallest does


def question(
    model: Callable[[], pl.LightningModule],
    data: Callable[[], pl.LightningDataModule],
    factories: Mapping[str, Callable[[int], pl.LightningModule]],
    **asked: Any,
) -> dict[str, Any]:
    """What is asked, as JSON has it.

    Of models and data that is their classes, saved hyperparameters and the shapes of parameters. Code is not read.

    Args:
        model: makes the model.
        data: makes its data.
        factories: by name what makes a model with a width.
        asked: all else that results depend on.
    """
    with isolate_rng():
        own = {
            "model": _of_model(model()),
            "data": _of_class(data()),
            **{name: _of_model(factory(_TWO)) for name, factory in factories.items()},
        }
    versions = {"torch": str(torch.__version__), "lightning": pl.__version__}
    found: dict[str, Any] = json.loads(json.dumps(own | plain(asked) | {"versions": versions}))
    return found


def plain(value: Any) -> Any:
    """A value as JSON can hold it; what it cannot is told by its text, without its place in memory.

    Example:
        >>> plain({"patience": 3, "optimizer": plain, "targets": ("0", "1"), "when": object()})
        {'patience': 3, 'optimizer': 'plain', 'targets': ['0', '1'], 'when': '<object object>'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    name = getattr(value, "__qualname__", None)
    return name or re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs between two questions, a line for each value.

    Example:
        >>> list(differences({"metric": "acc", "dendrites": {"fan_in": 3}}, {"metric": "acc", "dendrites": {}}))
        ['dendrites.fan_in: 3 there, nothing here']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            inner = f"{name}.{key}" if name else key
            yield from differences(there.get(key, _Nothing), here.get(key, _Nothing), inner)
    elif there != here:
        yield f"{name}: {_text(there)} there, {_text(here)} here"


class _Nothing:
    pass


def _text(value: Any) -> str:
    return "nothing" if value is _Nothing else repr(value)


def _of_model(model: pl.LightningModule) -> dict[str, Any]:
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    return {**_of_class(model), "parameters": parameter_count(model), "shapes": digest}


def _of_class(thing: Any) -> dict[str, Any]:
    return {"class": type(thing).__qualname__, "hyperparameters": plain(getattr(thing, "hparams", {}))}
