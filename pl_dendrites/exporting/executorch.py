"""ExecuTorch, for phones and smaller machines: a program for one example at a time, computed by XNNPACK."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pl_dendrites.core.fusing.fetch import Few
from pl_dendrites.exporting.form import Format, Inputs, Run, rows

__all__ = ["EXECUTORCH"]


def _write(fused: nn.Module, inputs: Inputs, path: Path) -> None:
    _lower(_program(fused, inputs), path)


def _write_small(fused: nn.Module, inputs: Inputs, path: Path) -> None:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    one = rows(inputs, 1)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(_program(fused, inputs).module(), quantizer)
    for example in _each(inputs):
        prepared(*example)
    _lower(torch.export.export(convert_pt2e(prepared), one, strict=False), path)


def _program(fused: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    # Places are kept in few bits, and to widen them at every call takes longer than all else.
    program: torch.export.ExportedProgram = constant_prop_pass(
        torch.export.export(fused, rows(inputs, 1), strict=False)
    )
    return program


def _lower(program: torch.export.ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _load(path: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(inputs: Inputs) -> list[torch.Tensor]:
        # The next call writes its answers where these are.
        answers = [[part.clone() for part in method.execute(list(one))] for one in _each(inputs)]
        return [torch.cat(parts) for parts in zip(*answers, strict=True)]

    return run


def _each(inputs: Inputs) -> list[Inputs]:
    return list(zip(*(value.split(1) for value in inputs), strict=True))


EXECUTORCH = Format(".pte", _write, _load, ("executorch", "torchao"), _write_small, compact=Few.FETCHED)
