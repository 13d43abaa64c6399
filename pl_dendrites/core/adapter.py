"""Only what grew: dendrites, with what was trained beside them, as tensors that any file can hold, and back.

There is nothing beside tensors: those of the dendrites tell their structure. Each has memory of its own, as safetensors
asks for, and integers take as few bytes as they fit in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.attach import network_of
from pl_dendrites.core.claims import shape_of
from pl_dendrites.core.growth.hooks import attached_layers, dendrites_of
from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.keys import ENTRIES, entries_by_layer, is_dendrite_key
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.structure import LayerStructure, read_structure, reshape_layers
from pl_dendrites.core.tensors import INTEGERS, alike

__all__ = ["dendrites_state_dict", "load_dendrites"]


def dendrites_state_dict(
    model: nn.Module, *, also: Collection[str] = (), with_trainable: bool = False
) -> dict[str, Tensor]:
    """What grew on a model: all that its dendrites are, and what the task trained beside them.

    Args:
        model: any module; candidates are no part of it.
        also: names or glob patterns of parameters, buffers or modules (``["head", "*.norm*"]``): of a module all that a
            state_dict holds of it. A pretrained model's new head, say, without which its dendrites are worth nothing.
        with_trainable: take along every parameter that is trainable, and the buffers of its module: of a frozen
            network, all that was trained beside the dendrites, where flags are as they were in the fit.

    Returns:
        Copies by the names that ``model.state_dict()`` has for them, on their devices, contiguous, none sharing memory;
        a layer that has several names has its dendrites under the first. One more entry, ``pl_dendrites.entries``,
        counts them, so that no part is taken for the whole. Integers are narrowed to 8, 16 or 32 bits.
        ``safetensors.torch.save_file`` and ``torch.save`` take it as it is, and :func:`load_dendrites` what
        they give back.

    Raises:
        ValueError: if ``also`` is a text or one of it matches nothing, the model is sharded, or copies of a user's own
            module have an entry that is no tensor.

    Example:
        >>> from pl_dendrites.core import attach
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> attach(model).grow(["0"])
        >>> for name, value in dendrites_state_dict(model, also=["2"]).items():
        ...     print(name, tuple(value.shape))
        0.dendrites.0.links (0, 4)
        0.dendrites.0.code (2,)
        0.dendrites.0.weights.0 (4,)
        0.dendrites.0.nodes.weight (4, 3)
        0.dendrites.0.nodes.bias (4,)
        2.weight (2, 4)
        2.bias (2,)
        pl_dendrites.entries ()
    """
    if isinstance(also, str):
        raise ValueError(f"`also` must be a list of names or patterns, got {also!r}")
    _refuse_sharded(model)
    found: dict[str, Any] = {}
    for name, layer in attached_layers(model):
        found |= dendrites_of(layer).state_dict(prefix=f"{name}.dendrites." if name else "dendrites.")
    others = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"copies of a module have entries that are no tensors, and cannot be stored as such: {others}")
    own = _beside(model)
    for pattern in also:
        chosen = {key: value for key, value in own.items() if _means(pattern, key)}
        if not chosen:
            raise ValueError(f"`also`: no parameter, buffer or module is named {pattern!r}. There are {list(own)}")
        found |= chosen
    found |= _trainable(own) if with_trainable else {}
    plain = {key: _narrow(value) if is_dendrite_key(key) else _copy(value) for key, value in found.items()}
    return {**plain, ENTRIES: torch.tensor(len(plain), dtype=torch.int32)}


def load_dendrites(
    model: nn.Module, state_dict: Mapping[str, Tensor], mirrors: Mapping[str, str] | None = None
) -> DendriticNetwork | None:
    """Give a model what :func:`dendrites_state_dict` returned: it grows or shrinks to fit, and takes the values.

    Whatever dendrites the model has are replaced: layers that the state_dict has none for are without any then. Of all
    else only what the state_dict names changes.

    Args:
        model: a plain or an attached model, of the kind that the state_dict was taken from.
        state_dict: all of it, perhaps from a file.
        mirrors: as of :func:`~pl_dendrites.attach`.

    Returns:
        The network, as :func:`~pl_dendrites.restore_structure` returns it.

    Raises:
        ValueError: if the state_dict is a part alone, or does not fit the model; names what differs. Or if the model is
            sharded. It is then left as it was.
        RuntimeError: if new dendrites are being looked for: the model would stay frozen.

    Example:
        >>> from pl_dendrites.core import attach
        >>> model, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> attach(model).grow([""])
        >>> load_dendrites(fresh, dendrites_state_dict(model)).num_dendrites
        1
        >>> torch.equal(fresh.dendrites[0].nodes.weight, model.dendrites[0].nodes.weight)
        True
    """
    _refuse_sharded(model)
    dendrites = [dendrites_of(layer) for _, layer in attached_layers(model)]
    if any(own.candidates is not None or own.watch is not None for own in dendrites):
        raise RuntimeError("new dendrites are being looked for: integrate or discard them first")
    blocks = entries_by_layer(state_dict)
    _check_whole(state_dict)
    grown = {key: value for key, value in state_dict.items() if is_dendrite_key(key)}
    beside = {key: value for key, value in state_dict.items() if key not in grown and key != ENTRIES}
    own = _beside(model)
    wrong = [line for key, value in beside.items() for line in _misfits(key, own.get(key), value)]
    if wrong:
        raise ValueError("the state_dict does not fit the model:\n" + "\n".join(wrong))
    structure = read_structure(model, grown)
    told = {model.get_submodule(name) for name in structure}
    gone = {name: LayerStructure(()) for name, layer in attached_layers(model) if layer not in told}
    reshape_layers(model, {**structure, **gone})
    for name, numbered in blocks.items():
        entries = {f"{number}.{part}": value for number, parts in numbered.items() for part, value in parts.items()}
        dendrites_of(model.get_submodule(name)).load_state_dict(entries)
    with torch.no_grad():
        for key, value in beside.items():
            own[key].copy_(value)
    return network_of(model, mirrors)


def _refuse_sharded(model: nn.Module) -> None:
    if is_sharded(model):
        raise ValueError("the model is sharded: load its checkpoint in one process, and take its dendrites from there")


def _beside(model: nn.Module) -> dict[str, Tensor]:
    # All that a state_dict holds but dendrites, as the model has it, not as a hook of the user's hands it out.
    saved = model.state_dict()
    own = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: value for name, value in own if name in saved and not is_dendrite_key(name)}


def _trainable(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    modules = {key.rpartition(".")[0] for key, value in own.items() if value.requires_grad}
    buffers = {key for key, value in own.items() if not isinstance(value, nn.Parameter)}
    beside = {key for key in buffers if key.rpartition(".")[0] in modules}
    return {key: value for key, value in own.items() if value.requires_grad or key in beside}


def _means(pattern: str, key: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in _with_parents(key))


def _with_parents(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _narrow(value: Tensor) -> Tensor:
    # Of dendrites: places of inputs, neurons and outputs, codes, counts.
    if value.dtype in INTEGERS and value.numel():
        least, most = int(value.min()), int(value.max())
        ranges = {dtype: torch.iinfo(dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)}
        value = value.to(next(dtype for dtype, fits in ranges.items() if fits.min <= least and most <= fits.max))
    return _copy(value)


def _check_whole(state_dict: Mapping[str, Any]) -> None:
    count: Any = state_dict.get(ENTRIES)
    if shape_of(count) != () or not alike(count.dtype, torch.int64):
        raise ValueError(f"the state_dict is a part alone, or of another kind: its entry '{ENTRIES}' is {count}")
    if int(count) != len(state_dict) - 1:
        raise ValueError(f"the state_dict is not whole: it has {len(state_dict) - 1} entries, and had {int(count)}")


def _misfits(key: str, own: Tensor | None, given: Any) -> Iterator[str]:
    wanted, shape = shape_of(own), shape_of(given)
    if own is None:
        yield f"  '{key}': the model has no such parameter or buffer"
    elif wanted != shape or isinstance(shape, str):
        yield f"  '{key}': it must have the shape {wanted}, got {shape}"
    elif not alike(own.dtype, given.dtype):
        yield f"  '{key}': it must be of the type {own.dtype}, got {given.dtype}"
