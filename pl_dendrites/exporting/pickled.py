"""``torch.save`` of the module itself: needs PyTorch, and the classes of the model around its layers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pl_dendrites.exporting.form import Format, Inputs, Run, tensors_in

__all__ = ["PICKLE"]


def _write(fused: nn.Module, inputs: Inputs, path: Path) -> None:
    torch.save(fused, path)


def _load(path: Path) -> Run:
    module = torch.load(path, weights_only=False)  # written a moment ago
    return lambda inputs: tensors_in(module(*inputs))


PICKLE = Format(".pt", _write, _load)
