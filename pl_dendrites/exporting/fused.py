"""One file of a grown network: written whole, asked what it answers, measured."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor, nn

from pl_dendrites.core.checks import check, check_one_of
from pl_dendrites.core.fuse import fuse_with
from pl_dendrites.core.fusing.fetch import Few
from pl_dendrites.exporting.executorch import EXECUTORCH
from pl_dendrites.exporting.form import Format, Inputs, Run, Write, rows, tensors_in
from pl_dendrites.exporting.onnx import ONNX
from pl_dendrites.exporting.pickled import PICKLE
from pl_dendrites.exporting.pt2 import PT2

__all__ = ["FORMATS", "Exported", "export_fused"]

FORMATS = {"onnx": ONNX, "pt2": PT2, "executorch": EXECUTORCH, "pickle": PICKLE}

# How far a file that computes as the model does may be from it, of the model's largest answer.
_TOLERANCE = 1e-3
_ROUNDS, _SECONDS = 200, 2.0


@dataclass(frozen=True)
class Exported:
    """What :func:`pl_dendrites.export_fused` wrote.

    Attributes:
        path: the file.
        to: its format.
        int8: whether it computes in eight bits.
        bytes: its size.
        largest_difference: between its answers and the model's, over all inputs that were given.
        largest_answer: the model's, without its sign, to compare that with.
        microseconds: for one example: the median of calls in turn with the model's, on the CPU, in one thread where
            the format can be asked for that.
        model_microseconds: those of the model with its dendrites as it was given, in PyTorch.
    """

    path: Path
    to: str
    int8: bool
    bytes: int
    largest_difference: float
    largest_answer: float
    microseconds: float
    model_microseconds: float

    def __str__(self) -> str:
        """A short table."""
        return "\n".join(
            (
                f"{self.path} ({self.to}{', eight bits' if self.int8 else ''})",
                f"  size                {self.bytes:,} bytes",
                f"  one example         {self.microseconds:,.0f} us; the model {self.model_microseconds:,.0f} us",
                f"  largest difference  {self.largest_difference:.1e}; largest answer {self.largest_answer:.1e}",
            )
        )


@torch.no_grad()
def export_fused(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor | Sequence[Tensor],
    *,
    to: str,
    int8: bool = False,
    compact: bool = False,
) -> Exported:
    """Fuse a grown model, write it for use elsewhere, and compare what the file answers with what the model does.

    The file takes any number of examples, that of ExecuTorch one at a time. It is written whole or not at all.

    Args:
        model: any module, which stays as it is; of a LightningModule ``forward`` is what is written.
        path: the file. A former one is replaced.
        inputs: real examples, as ``model(inputs)`` takes them; for several arguments, a sequence of a tensor each. The
            first dimension counts examples. Their answers are compared, and eight bits are fitted to them: give a
            hundred or more, of those that the model learned from.
        to: ``"onnx"``; ``"pt2"`` for ``torch.export``; ``"executorch"``; or ``"pickle"`` for ``torch.save`` of the
            module, which needs the model's own classes to load, but not this package.
        int8: whether to compute in eight bits, with onnxruntime's static quantisation or ExecuTorch's.
        compact: as of :func:`~pl_dendrites.fuse`: smaller files of networks with shared dendrites, which ExecuTorch
            takes a little longer for. With ``int8``, where most of the network is what shared dendrites see by, ONNX
            keeps that in eight bits, and computes in 32.

    Returns:
        What was written, its size, its time and the difference; ``print`` shows it as a table. What eight bits may
        differ by is for you to judge.

    Raises:
        ModuleNotFoundError: if a package that the format needs is not installed; says which to install.
        ValueError: if the model cannot be fused, an argument is not as described, or the file does not answer as the
            model does: by 0.001 of its largest answer, or at all with numbers.

    Example:
        >>> from pl_dendrites.core import attach
        >>> model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> attach(model).grow(["0", "2"])
        >>> with TemporaryDirectory() as folder:
        ...     exported = export_fused(model, f"{folder}/grown.pt2", torch.randn(8, 5), to="pt2")
        >>> exported.largest_difference < 1e-5
        True
    """
    inputs = _checked(inputs)
    form = _form(to, int8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = copy.deepcopy(model).cpu().eval()

    def run_plain(given: Inputs) -> list[Tensor]:
        return tensors_in(plain(*given))

    expected = run_plain(inputs)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder, _one_thread():
        part = Path(folder) / f"part{form.ending}"
        fused, write = _fused(plain, form, int8, compact)
        write(fused, inputs, part)
        run = form.load(part)
        difference, largest = _compare(run(inputs), expected, float("inf") if int8 else _TOLERANCE)
        times = _microseconds((run, run_plain), rows(inputs, 1))
        part.replace(path)
    return Exported(path, to, int8, path.stat().st_size, difference, largest, *times)


def _checked(inputs: Tensor | Sequence[Tensor]) -> Inputs:
    given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    fits = all(isinstance(value, Tensor) and value.ndim for value in given)
    fits = fits and len({len(value) for value in given}) == 1 and len(given[0]) > 0
    shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in given]
    check("inputs", fits, "a tensor of examples, or a sequence of tensors with as many each", shapes)
    return tuple(value.detach().cpu() for value in given)


def _form(to: str, int8: bool) -> Format:
    check_one_of("to", to, FORMATS)
    form = FORMATS[to]
    if int8 and form.write_small is None:
        small = " or ".join(name for name, other in FORMATS.items() if other.write_small)
        raise ValueError(
            f"int8 is for {small}, not for {to}; for it, torchao's quantize_ takes what `fuse(model)` returns"
        )
    if form.missing():
        raise ModuleNotFoundError(
            f"{to} needs what is not installed: pip install {' '.join(form.missing())}", name=form.missing()[0]
        )
    return form


def _fused(model: nn.Module, form: Format, int8: bool, compact: bool) -> tuple[nn.Module, Write]:
    if int8 and compact and form.compact_small is not None:
        narrow = fuse_with(model, form.compact_small)
        if _is_mostly_narrow(narrow):
            return narrow, form.write
    write = form.write_small if int8 and form.write_small is not None else form.write
    return fuse_with(model, form.compact if compact else Few.ZEROS), write


def _is_mostly_narrow(fused: nn.Module) -> bool:
    # Else eight bits would be of a few values, and all others would stay as they are.
    values = fused.state_dict().values()
    narrow: int = sum(value.numel() for value in values if value.dtype == torch.int8)
    wide: int = sum(value.numel() for value in values if value.is_floating_point())
    return narrow > wide


def _compare(answers: list[Tensor], expected: list[Tensor], tolerance: float) -> tuple[float, float]:
    shapes, wanted = ([tuple(value.shape) for value in values] for values in (answers, expected))
    if not wanted or shapes != wanted:
        raise ValueError(
            f"the file answers with tensors of shapes {shapes}, the model with {wanted}; nothing is written"
        )
    pairs = zip(answers, expected, strict=True)
    difference = max((answer.double() - value.double()).abs().max().item() for answer, value in pairs)
    largest = max(value.double().abs().max().item() for value in expected)
    if not difference <= tolerance * max(largest, torch.finfo(torch.float).tiny):  # nor what is no number
        raise ValueError(
            f"the file's answers differ from the model's by {difference:.1e}, of {largest:.1e}; nothing is written"
        )
    return difference, largest


def _microseconds(runs: Sequence[Run], one: Inputs) -> list[float]:
    # In turn, so that what else the machine does slows all of them.
    times: list[list[float]] = [[] for _ in runs]
    begin = perf_counter()
    while len(times[0]) < _ROUNDS and (not times[0] or perf_counter() - begin < _SECONDS):
        for run, seen in zip(runs, times, strict=True):
            start = perf_counter()
            run(one)
            seen.append(perf_counter() - start)
    return [1e6 * median(seen) for seen in times]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
