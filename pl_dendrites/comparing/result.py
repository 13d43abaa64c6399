"""What a comparison found: to be printed, drawn, saved and put into a sentence."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_dendrites.comparing.figure import draw
from pl_dendrites.comparing.folder import read_json, write_json
from pl_dendrites.comparing.runs import Run, run_of
from pl_dendrites.comparing.verdict import Mode, verdict
from pl_dendrites.core.markup import in_notebook
from pl_dendrites.reporting.notebook import comparison_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison:
    """What :func:`pl_dendrites.compare` found; printed, or shown by a notebook, it is a table.

    Attributes:
        metric: name of the metric on test data.
        runs: one for every network and seed.
        mode: whether a good result is small or large; ``None`` where that is not known.

    Example:
        >>> import tempfile
        >>> run = Run("plain", 0, 0.25, 0.3, 610, 49, 17.0, 0, 0, 2440, "plain")
        >>> comparison = Comparison("test_loss", (run,), "min")
        >>> path = tempfile.mkdtemp() + "/comparison.json"
        >>> comparison.save(path)
        >>> Comparison.load(path) == comparison
        True
    """

    metric: str
    runs: tuple[Run, ...]
    mode: Mode | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Every run as a dict of plain values, as for JSON."""
        return [asdict(run) for run in self.runs]

    def _repr_html_(self) -> str:
        return in_notebook(comparison_table(self.metric, self.rows()))

    @property
    def verdict(self) -> str:
        """A sentence for each network with dendrites, its error beside others', and whether the seeds allow a verdict.

        The others are the plain network that was trained as long, and the best of those that are as large. Errors, the
        result or one less the result, are compared seed by seed; a difference counts if the 95 % interval of their
        ratio, by Student's t, leaves one out.
        """
        return verdict(self.metric, self.mode, self.runs)

    def plot(self) -> Figure:
        """Draw results over parameters: means, standard deviations, and how far plain networks come at each size.

        Returns:
            A figure of matplotlib; ``figure.savefig("comparison.png")`` writes it.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return draw(self.metric, self.mode, self.runs)

    def save(self, path: str | Path) -> None:
        """Write everything into a JSON file, which is there whole or not at all."""
        write_json(Path(path), {"metric": self.metric, "mode": self.mode, "runs": self.rows()})

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if it is no such file.
        """
        found = read_json(Path(path))
        if not isinstance(found, dict) or found.keys() != {"metric", "mode", "runs"}:
            raise ValueError(f"'{path}' is no comparison: `Comparison.save` did not write it")
        return cls(found["metric"], tuple(map(run_of, found["runs"])), found["mode"])

    def __str__(self) -> str:
        """A row for every network: mean and standard deviation over the seeds."""
        names = list(dict.fromkeys(run.name for run in self.runs))
        width = max(map(len, names))
        lines = [f"{'':{width}}  {self.metric:>18}  parameters       bytes  epochs  seconds"]
        for name in names:
            runs = [run for run in self.runs if run.name == name]
            results = [run.result for run in runs]
            spread = f" ± {statistics.stdev(results):.2g}" if len(runs) > 1 else ""
            result = f"{statistics.mean(results):.4g}{spread}"
            keys = ("parameters", "bytes", "epochs", "seconds")
            size, saved, epochs, seconds = (statistics.mean(getattr(run, key) for run in runs) for key in keys)
            lines.append(f"{name:{width}}  {result:>18}  {size:10,.0f}  {saved:10,.0f}  {epochs:6.0f}  {seconds:7.1f}")
        return "\n".join(lines)
