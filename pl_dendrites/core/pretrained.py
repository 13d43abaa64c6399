"""Loading as Hugging Face's transformers do: entry by entry from files, without ``load_state_dict``.

``from_pretrained`` makes a model, without memory, and hands it with the names of the files to a method of the model's
class. Here that method is given a model which has the files' dendrites. Of the library this uses that method's name,
those of four of its arguments, and what renames old entries; nothing of it is imported.
"""

from __future__ import annotations

import copy
import inspect
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_dendrites.core.keys import is_dendrite_key, parse
from pl_dendrites.core.structure import apply_structure, grow_on_load

__all__ = ["LOADER", "grow_and_load_files", "warn_of_unknown"]

LOADER = "_load_pretrained_model"
KNOWN = ("model", "state_dict", "checkpoint_files")
INSTEAD = (
    "Make the model from its configuration, read the weights (safetensors.torch.load_file), and within"
    " `pl_dendrites.growing()` call the model's `load_state_dict`."
)


def grow_and_load_files(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for the method of a model's class that loads files: the model grows first.

    Args:
        load: that method, a function.
        *args: for it, a model among them.
        **kwargs: for it.

    Raises:
        RuntimeError: if its arguments are not those that are known here, and there are dendrites among them.
        ValueError: if the dendrites do not fit the model.
    """
    given = inspect.signature(load).bind(*args, **kwargs).arguments
    if not set(KNOWN) <= set(given):
        _refuse_dendrites(load, given)
        return load(*args, **kwargs)
    model, state_dict, files = (given[name] for name in KNOWN)
    entries = _read(files or ()) if state_dict is None else _of_dendrites(state_dict)
    renamings = getattr(given.get("load_config"), "weight_mapping", None) or ()
    apply_structure(model, _named_as_in(model, entries, renamings), whole=False)
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters() if is_dendrite_key(name)}
    result = load(*args, **kwargs)
    for name, flag in learns.items():
        model.get_parameter(name).requires_grad_(flag)  # each came as a new parameter, and those learn
    if learns:
        grow_on_load(model)
    return result


def warn_of_unknown(kind: type) -> None:
    """Say that a version of transformers has no such method, so that its models do not grow in ``from_pretrained``.

    Args:
        kind: a class of models without the method; those of other libraries load by ``load_state_dict``.
    """
    owners = [each.__module__ for each in kind.__mro__ if "from_pretrained" in vars(each)]
    if any(owner.split(".")[0] == "transformers" for owner in owners):
        text = f"{owners[0]} loads weights in a way that pl_dendrites does not know: from_pretrained drops their"
        warnings.warn(f"{text} dendrites. {INSTEAD}", stacklevel=2)


def _refuse_dendrites(load: Callable[..., Any], given: Mapping[str, Any]) -> None:
    # Another library's method of this name, or that of a version to come: a plain model loads as ever.
    values = [item for value in given.values() for item in (value if isinstance(value, list | tuple) else [value])]
    files = [value for value in values if isinstance(value, str | Path) and Path(value).is_file()]
    states = [_of_dendrites(value) for value in values if isinstance(value, Mapping)]
    if any(states) or _read(file for file in files if Path(file).suffix in {".safetensors", ".bin"}):
        raise RuntimeError(
            f"{load.__module__}.{load.__qualname__} loads weights in a way that pl_dendrites does not know, and would"
            f" drop their dendrites. {INSTEAD}"
        )


def _of_dendrites(state_dict: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if isinstance(key, str) and is_dendrite_key(key)}


def _read(files: Iterable[str | Path]) -> dict[str, Any]:
    # The entries of dendrites, in all files together.
    entries: dict[str, Any] = {}
    for file in map(str, files):
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt", device="cpu") as opened:
                entries |= {key: opened.get_tensor(key) for key in opened.keys() if is_dendrite_key(key)}  # noqa: SIM118
        else:
            mapped = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            entries |= _of_dendrites(mapped)
    return entries


def _named_as_in(model: nn.Module, entries: Mapping[str, Any], renamings: Iterable[Any]) -> dict[str, Any]:
    # As `from_pretrained` does: old names are replaced, a part loads from a whole, whose other layers it lacks, and a
    # whole from a part.
    modules, prefix = dict(model.named_modules(remove_duplicate=False)), f"{getattr(model, 'base_model_prefix', '')}."
    renamings = copy.deepcopy(list(renamings))  # they count how often they were used

    def fits(key: str) -> bool:
        found = parse(key)
        return found is not None and found.layer in modules

    def name(key: str) -> str | None:
        new = key
        for renaming in renamings:
            new, _ = renaming.rename_source_key(new)
        names = [new, new.removeprefix(prefix), prefix + new, key, key.removeprefix(prefix), prefix + key]
        return next((each for each in names if fits(each)), None)

    return {new: value for key, value in entries.items() if (new := name(key)) is not None}
