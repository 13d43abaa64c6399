"""Names: of modules, and of the entries that dendrites have in a state_dict. No other file reads or writes them.

Each block of a layer's dendrites has the entries ``<layer>.dendrites.<block>.nodes.*``, ``.links``, ``.weights.0`` ...
``.weights.<k - 1>`` and ``.code``, and ``.neurons`` if only some neurons have its dendrites. A block of shared
dendrites has ``.field``, ``.weight``, ``.bias``, ``.out`` and ``.code``, and ``.feeds`` if each feeds some outputs; one
of placed dendrites has ``.nodes.weight``, ``.nodes.bias``, ``.weight`` and ``.out``.
What holds dendrites alone has one entry more, which counts all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = [
    "ENTRIES",
    "DendriteKey",
    "count_in",
    "entries_by_layer",
    "is_common_key",
    "is_dendrite_key",
    "is_placed",
    "is_shared",
    "parse",
    "plain_name",
]

ENTRIES = "pl_dendrites.entries"

_KEY = re.compile(
    r"(?:(?P<layer>.+)\.)?dendrites\.(?P<block>\d+)\."
    r"(?P<part>nodes\.(?:inputs|(?:layer\.)?(?:weight|bias)|\d+\..+)|links|code|neurons|weights\.\d+|field|weight|bias|out|feeds)",
    re.DOTALL,  # a name may have any character but a dot
)
_COMMON = ("code", "neurons", "nodes.inputs", "field", "feeds")


class DendriteKey(NamedTuple):
    """The name of an entry that belongs to dendrites, in its parts.

    Attributes:
        layer: name of the layer that they hang on; empty where that is the model itself.
        block: number of the block, as text.
        part: what of the block it is.
    """

    layer: str
    block: str
    part: str


def parse(key: str, prefix: str = "") -> DendriteKey | None:
    """The parts of a name; ``None`` for an entry of the user's own.

    Args:
        key: of a state_dict.
        prefix: what comes before the model's own names.

    Example:
        >>> parse("encoder.0.dendrites.1.nodes.weight")
        DendriteKey(layer='encoder.0', block='1', part='nodes.weight')
        >>> parse("encoder.0.weight")
    """
    found = _KEY.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
    return None if found is None else DendriteKey(found["layer"] or "", found["block"], found["part"])


def is_dendrite_key(key: str) -> bool:
    """Whether a state_dict entry belongs to dendrites.

    Example:
        >>> is_dendrite_key("encoder.0.dendrites.0.weights.1"), is_dendrite_key("encoder.0.weight")
        (True, False)
    """
    return parse(key) is not None


def is_common_key(key: str) -> bool:
    """Whether a state_dict entry belongs to dendrites and is the same in all processes, as integers are.

    Most never change in training; fields are moved by each process alike.

    Example:
        >>> is_common_key("encoder.0.dendrites.0.code"), is_common_key("encoder.0.dendrites.0.links")
        (True, False)
    """
    found = parse(key)
    return found is not None and found.part in _COMMON


def entries_by_layer(state_dict: Mapping[Any, Any], prefix: str = "") -> dict[str, dict[str, dict[str, Any]]]:
    """All entries that belong to dendrites, by the layer's name, the block's number and the part.

    Args:
        state_dict: weights.
        prefix: what comes before the model's own names.

    Raises:
        ValueError: if a key is not a text.

    Example:
        >>> entries_by_layer({"a.weight": 1, "a.dendrites.0.links": 2, "a.dendrites.0.code": 3})
        {'a': {'0': {'links': 2, 'code': 3}}}
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(f"the state_dict does not fit the model:\n  a key is a {type(key).__name__}, not a text")
        own = parse(key, prefix)
        if own is not None:
            found.setdefault(own.layer, {}).setdefault(own.block, {})[own.part] = value
    return found


def count_in(parts: Iterable[str]) -> int:
    """Dendrites per neuron of a block that has these parts.

    Example:
        >>> count_in(["nodes.weight", "weights.0", "weights.1", "links", "code"])
        2
    """
    return sum(part.startswith("weights.") for part in parts)


def is_shared(parts: Iterable[str]) -> bool:
    """Whether a block that has these parts is one of shared dendrites.

    Example:
        >>> is_shared(["field", "weight"]), is_shared(["nodes.weight"])
        (True, False)
    """
    return "field" in parts


def is_placed(parts: Iterable[str]) -> bool:
    """Whether a block that has these parts is one of placed dendrites.

    Example:
        >>> is_placed(["nodes.weight", "weight", "out"]), is_placed(["field", "weight", "out"])
        (True, False)
    """
    return "out" in parts and not is_shared(parts)


def plain_name(name: str) -> str:
    """A module's name as its author knows it, without the ``_orig_mod`` that ``torch.compile`` puts in.

    Example:
        >>> plain_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
