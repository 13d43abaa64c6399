"""All loggers of a Trainer as one: each gets what it can show, and none that fails ends a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_dendrites.reporting.logger_ways import HISTOGRAM, PAGE, PICTURE, TEXT, Way, find_way, method_of
from pl_dendrites.training.trainer import logs_default_result, write_hyperparameters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Loggers"]


class Loggers:
    """All loggers of a Trainer as one. Each gets what it can show.

    What fails to arrive ends no fit: there is one warning of each logger and method, and training goes on.

    Args:
        loggers: of the Trainer; those of any kind.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        self._loggers = list(loggers)
        self._failed: set[str] = set()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics, as Lightning itself does."""
        for logger in self._loggers:
            self._try(logger, "log_metrics", logger.log_metrics, dict(values), step=step)

    def picture(self, tag: str, draw: Callable[[], NDArray[np.uint8]], step: int) -> None:
        """Show a picture.

        Args:
            tag: its name.
            draw: returns its pixels ``(height, width, 3)``; called only where a logger can show them.
            step: of training.
        """
        self._show(PICTURE, tag, draw, step)

    def markdown(self, tag: str, text: str, step: int) -> None:
        """Show a text in Markdown."""
        self._show(TEXT, tag, lambda: text, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show how values are distributed."""
        self._show(HISTOGRAM, tag, lambda: values, step)

    def page(self, tag: str, write: Callable[[], str], step: int) -> None:
        """Show a page of HTML.

        Args:
            tag: its name.
            write: returns it; called only where a logger can show it.
            step: of training.
        """
        self._show(PAGE, tag, write, step)

    def layout(self, layout: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """Arrange scalars on TensorBoard's page of custom scalars."""
        for logger in self._loggers:
            name = "experiment.add_custom_scalars"
            arrange = method_of(logger, name)
            if arrange is not None:
                self._try(logger, name, arrange, layout)

    def hyperparameters(
        self, own: Mapping[str, Any], others: Mapping[str, Any], results: Iterable[str], *, last: bool = False
    ) -> None:
        """Record settings, and which scalars are a run's results: their last values are shown beside the settings.

        TensorBoard takes only the first record of a run. So it gets ours together with what Lightning is about to log;
        but where the user turned Lightning's off to write their own (``default_hp_metric=False``), ours comes last.

        Args:
            own: our settings.
            others: those that Lightning logs.
            results: names of scalars.
            last: this is the end of the fit, not its beginning.
        """
        for logger in self._loggers:
            if method_of(logger, "experiment.add_hparams") is None:
                if not last:
                    self._try(logger, "log_hyperparams", logger.log_hyperparams, dict(own))
            elif last is not logs_default_result(logger):
                shown = [*results] if last else [*results, "hp_metric"]
                self._try(logger, "experiment", write_hyperparameters, logger.experiment, {**others, **own}, shown)

    def _show(self, ways: Sequence[Way], tag: str, make: Callable[[], Any], step: int) -> None:
        once = cache(make)
        for logger in self._loggers:
            way = find_way(ways, logger)
            if way is not None:
                self._try(logger, way.method, way.show, logger, tag, once, step)

    def _try(self, logger: Any, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:  # a disk or a server, of any make: not worth the training behind it
            label = f"{type(logger).__name__} cannot show what DendriteCallback gave to its `{name}`"
            if label not in self._failed:
                self._failed.add(label)
                rank_zero_warn(f"{label}, and training goes on without: {error!r}")
