"""A program of ``torch.export``: needs PyTorch, and nothing of the model's code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pl_dendrites.exporting.form import Format, Inputs, Run, program_of, tensors_in

__all__ = ["PT2"]


def _write(fused: nn.Module, inputs: Inputs, path: Path) -> None:
    torch.export.save(program_of(fused, inputs), path)


def _load(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: tensors_in(module(*inputs))


PT2 = Format(".pt2", _write, _load)
