"""What is shown while a fit runs, in loggers and on the progress bar, and when."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl

from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.reporting import figures
from pl_dendrites.reporting.loggers import Loggers
from pl_dendrites.reporting.page import to_html
from pl_dendrites.reporting.records import correlation_figures
from pl_dendrites.reporting.report import TITLE, report_blocks
from pl_dendrites.reporting.tables import decisions_markdown
from pl_dendrites.training.trainer import ProgressBar, logged_hyperparameters, logging_step, logs_hyperparameters

__all__ = ["Display"]

_PREFIX = "dendrites"
_RESULTS = [f"{_PREFIX}/{name}" for name in ("best_score", "count", "parameters")]
_NO_FIGURES = "\n\nNo figures: matplotlib is not installed (`pip install matplotlib`)."


class Display:
    """Shows one fit: scalars after each epoch, a figure and a text page after each phase.

    Nothing is read from the device within an epoch. Where a Trainer has several processes, the first one shows.

    Args:
        trainer: the Trainer, about to fit.
        score_name: the metric that decides.
        mode: whether a good score is small or large.
        settings: of the callback, plain values, for the page of hyperparameters.
        progress: show the state of growth on the progress bar.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        score_name: str,
        mode: Literal["min", "max"],
        settings: Mapping[str, Any],
        progress: bool,
    ) -> None:
        self._score_name, self._mode = score_name, mode
        shows = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._loggers = Loggers(trainer.loggers if shows else [])
        self._bar = ProgressBar(trainer) if progress else None
        self._epoch_began = self._phase_began = time.monotonic()
        self._settings = {_PREFIX: dict(settings)} if logs_hyperparameters(trainer) else None
        if self._settings is not None:
            self._loggers.hyperparameters(self._settings, logged_hyperparameters(trainer), _RESULTS)
        self._loggers.layout(_layout(score_name))

    def begin_training(self, machine: PhaseMachine) -> None:
        """The first epoch, or that of a resumed fit, begins."""
        self._epoch_began = self._phase_began = time.monotonic()
        self._show_progress(machine, {})

    def begin_phase(self, machine: PhaseMachine) -> None:
        """A phase begins. The epoch has begun before: changing over is part of its time."""
        self._phase_began = self._epoch_began
        self._show_progress(machine, {})

    def end_epoch(
        self, trainer: pl.Trainer, machine: PhaseMachine, network: DendriticNetwork, learning_rate: float | None
    ) -> None:
        """Log the state of growth, at the step that Lightning's own metrics of the epoch have.

        Args:
            trainer: the Trainer.
            machine: after it has counted the epoch.
            network: the network.
            learning_rate: of the candidates; ``None`` where there are none.
        """
        now, step = time.monotonic(), logging_step(trainer)
        scalars: dict[str, float | None] = {
            "phase": float(machine.phase == "correlation"),
            "cycle": machine.cycle,
            "count": network.num_dendrites,
            "parameters": parameter_count(network.model),
            "best_score": machine.best,
            "candidates_lr": learning_rate,
            "seconds_epoch": now - self._epoch_began,
            "seconds_phase": now - self._phase_began,
        }
        self._epoch_began = now
        correlations = network.correlations()
        by_layer = correlation_figures(correlations)
        for name, figures_of_layer in by_layer.items():
            for kind, value in figures_of_layer.items():
                scalars[f"correlation_{kind}/{name or 'model'}"] = value
        self._loggers.scalars({f"{_PREFIX}/{k}": v for k, v in scalars.items() if v is not None}, step)
        for name, values in correlations.items():
            self._loggers.histogram(f"{_PREFIX}/correlation/{name or 'model'}", values.abs().amax(0), step)
        self._show_progress(machine, by_layer)

    def end_phase(self, trainer: pl.Trainer, history: Sequence[Mapping[str, Any]]) -> None:
        """Draw how growth went so far, and say why.

        Args:
            trainer: the Trainer.
            history: records of finished phases, the one that ends last.
        """
        step, draws = max(0, logging_step(trainer)), figures.can_draw()
        best, skipped = history[-1]["best_score"], history[-1]["skipped"]
        text = "" if best is None else f"#### Best {self._score_name} so far: {best:.4g}\n\n"
        text += decisions_markdown(history)
        if skipped:
            text += "\n\n#### Layers without dendrites\n\n"
            text += "\n".join(f"* `{name}`: {reason}" for name, reason in skipped.items())
        self._loggers.markdown(f"{_PREFIX}/decisions", text if draws else text + _NO_FIGURES, step)
        if draws:
            self._loggers.picture(
                f"{_PREFIX}/growth",
                lambda: figures.pixels(figures.draw_growth(history, self._score_name, self._mode)),
                step,
            )

    def end_fit(
        self,
        trainer: pl.Trainer,
        machine: PhaseMachine,
        network: DendriticNetwork,
        history: Sequence[Mapping[str, Any]],
    ) -> None:
        """Log what the fit leaves, which a rejected set is no part of, and the report; give the bar back.

        Args:
            trainer: the Trainer.
            machine: as the fit leaves it.
            network: the network, likewise.
            history: records of all phases.
        """
        scalars = {
            "best_score": machine.best,
            "count": network.num_dendrites,
            "parameters": parameter_count(network.model),
        }
        results = {f"{_PREFIX}/{name}": value for name, value in scalars.items() if value is not None}
        step = max(0, logging_step(trainer) + 1)
        self._loggers.scalars(results, step)
        if figures.can_draw():
            self._loggers.page(f"{_PREFIX}/report", lambda: to_html(TITLE, report_blocks(history)), step)
        if self._settings is not None:
            parameters = logged_hyperparameters(trainer)
            self._loggers.hyperparameters(self._settings, parameters, _RESULTS, last=True)
        if self._bar is not None:
            self._bar.release()

    def _show_progress(self, machine: PhaseMachine, correlations: Mapping[str, Mapping[str, float]]) -> None:
        if self._bar is None:
            return
        self._bar.items = {"phase": machine.phase, "dendrites": str(machine.dendrites)}
        if correlations:
            self._bar.items["correlation"] = f"{max(figures['max'] for figures in correlations.values()):.3f}"


def _layout(score_name: str) -> dict[str, dict[str, list[Any]]]:
    # Three charts stand in a row. Tags are regular expressions, matched from the start: a logger may put a prefix in
    # front, and Lightning adds `_epoch` to a metric that is logged for steps and epochs.
    charts = {
        "score, and the best so far": [rf"{re.escape(score_name)}(_epoch)?", f"{_PREFIX}/best_score"],
        "correlation, mean of a layer": [f"{_PREFIX}/correlation_mean/.*"],
        "phase: 0 base, 1 correlation": [f"{_PREFIX}/phase"],
        "dendrites per neuron": [f"{_PREFIX}/count"],
        "correlation, largest of a layer": [f"{_PREFIX}/correlation_max/.*"],
        "seconds per epoch": [f"{_PREFIX}/seconds_epoch"],
    }
    return {
        _PREFIX: {title: ["Multiline", [f"(.+-)?{tag}$" for tag in tags]] for title, tags in charts.items()},
    }
