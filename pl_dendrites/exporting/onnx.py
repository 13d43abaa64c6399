"""ONNX, which onnxruntime, OpenVINO and others read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_dendrites.core.fusing.fetch import Few
from pl_dendrites.exporting.form import Format, Inputs, Run, program_of, rows

__all__ = ["ONNX"]

# Bytes of what may be computed when the file is written; what was made narrow would be wide again. onnxruntime computes
# the rest when it loads the file.
_SMALL = 512


def _write(fused: nn.Module, inputs: Inputs, path: Path) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize

    program = torch.onnx.export(program_of(fused, inputs), rows(inputs, 2), optimize=False, verbose=False)
    assert program is not None
    optimize(program.model, input_size_limit=_SMALL)
    ClearMetadataAndDocStringPass()(program.model)  # which line of Python made each node: as large as a small network
    program.save(str(path))


def _write_small(fused: nn.Module, inputs: Inputs, path: Path) -> None:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    whole, ready = path.with_suffix(".whole.onnx"), path.with_suffix(".ready.onnx")
    _write(fused, inputs, whole)
    quant_pre_process(whole, ready)
    quantize_static(ready, path, _Reader(_feeds(_session(ready), inputs)))


def _load(path: Path) -> Run:
    session = _session(path)

    def run(inputs: Inputs) -> list[torch.Tensor]:
        names = [entry.name for entry in session.get_inputs()]
        answers = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.from_numpy(answer) for answer in answers]

    return run


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, inputs: Inputs) -> Iterator[dict[str, Any]]:
    names = [entry.name for entry in session.get_inputs()]
    for parts in zip(*(value.split(16) for value in inputs), strict=True):
        yield {name: part.numpy() for name, part in zip(names, parts, strict=True)}


class _Reader:
    # onnxruntime asks for one batch after the other, and for None at the end.
    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


ONNX = Format(".onnx", _write, _load, ("onnx", "onnxscript", "onnxruntime"), _write_small, compact_small=Few.NARROW)
