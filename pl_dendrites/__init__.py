"""Artificial dendrites for any network that PyTorch Lightning trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pl_dendrites.core import (
    DendriticNetwork,
    attach,
    dendrites_state_dict,
    detach,
    fuse,
    grow_on_load,
    growing,
    load_dendrites,
    restore_structure,
    select_targets,
)

if TYPE_CHECKING:
    from pl_dendrites.callback import DendriteCallback
    from pl_dendrites.comparison import compare
    from pl_dendrites.exporting.fused import export_fused
    from pl_dendrites.saved.loading import load_from_checkpoint

__version__ = "0.2.0.dev0"

__all__ = [
    "DendriteCallback",
    "DendriticNetwork",
    "attach",
    "compare",
    "dendrites_state_dict",
    "detach",
    "export_fused",
    "fuse",
    "grow_on_load",
    "growing",
    "load_dendrites",
    "load_from_checkpoint",
    "restore_structure",
    "select_targets",
]


def __getattr__(name: str) -> Any:
    # Late, so that the core can be used where Lightning is not installed.
    if name == "DendriteCallback":
        from pl_dendrites.callback import DendriteCallback

        return DendriteCallback
    if name == "load_from_checkpoint":
        from pl_dendrites.saved.loading import load_from_checkpoint

        return load_from_checkpoint
    if name == "compare":
        from pl_dendrites.comparison import compare

        return compare
    if name == "export_fused":
        from pl_dendrites.exporting.fused import export_fused

        return export_fused
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
