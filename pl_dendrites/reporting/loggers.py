"""What a logger can show: scalars every one, and text, pictures and histograms those that have a method for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_dendrites.training.trainer import logs_default_result, write_hyperparameters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Loggers"]


class Loggers:
    """All loggers of a Trainer as one. Each gets what it can show.

    TensorBoard is known by the methods of its writer, not by a class: ``lightning.pytorch``, ``pytorch_lightning`` and
    users have their own. A picture that fails to arrive ends no fit: there is one warning, and training goes on.

    Args:
        loggers: of the Trainer; those of any kind.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        self._loggers = list(loggers)
        self._failed: set[str] = set()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics, as Lightning itself does; an error is not caught."""
        for logger in self._loggers:
            logger.log_metrics(dict(values), step=step)

    def results(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics when a fit is over, perhaps because a logger failed."""
        for logger in self._loggers:
            self._try(logger, logger.log_metrics, dict(values), step=step)

    def picture(self, tag: str, draw: Callable[[], NDArray[np.uint8]], step: int) -> None:
        """Show a picture.

        Args:
            tag: its name.
            draw: returns its pixels ``(height, width, 3)``; called only where a logger can show them.
            step: of training.
        """
        for logger in self._loggers:
            writer = _experiment(logger)
            if _method(writer, "add_image"):
                self._try(logger, add_image, writer, tag, draw, step)
            elif _method(logger, "log_image"):
                self._try(logger, log_image, logger, tag, draw, step)

    def markdown(self, tag: str, text: str, step: int) -> None:
        """Show a text in Markdown."""
        for logger in self._loggers:
            self._try(logger, _method(_experiment(logger), "add_text"), tag, text, step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show how values are distributed."""
        for logger in self._loggers:
            self._try(logger, _method(_experiment(logger), "add_histogram"), tag, values, step)

    def layout(self, layout: Mapping[str, Mapping[str, list[Any]]]) -> None:
        """Arrange scalars on TensorBoard's page of custom scalars."""
        for logger in self._loggers:
            self._try(logger, _method(_experiment(logger), "add_custom_scalars"), layout)

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
            writer = _experiment(logger)
            if _method(writer, "add_hparams") is None:
                self._try(logger, None if last else _method(logger, "log_hyperparams"), dict(own))
            elif last is not logs_default_result(logger):
                shown = [*results] if last else [*results, "hp_metric"]
                self._try(logger, write_hyperparameters, writer, {**others, **own}, shown)

    def _try(self, logger: Any, method: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> None:
        if method is None:
            return
        try:
            method(*args, **kwargs)
        except Exception as error:  # a disk or a server, of any make: not worth the training behind it
            name = getattr(method, "__name__", "a method")
            label = f"{type(logger).__name__} cannot show what DendriteCallback gave to its `{name}`"
            if label not in self._failed:
                self._failed.add(label)
                rank_zero_warn(f"{label}, and training goes on without: {error!r}")


def _experiment(logger: Any) -> Any:
    return _attribute(logger, "experiment")


def _method(thing: Any, name: str) -> Callable[..., Any] | None:
    found = _attribute(thing, name)
    return found if callable(found) else None


def _attribute(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # a logger may answer for names in its own way, or reach for a server that is away
        return None


def add_image(writer: Any, tag: str, draw: Callable[[], NDArray[np.uint8]], step: int) -> None:
    """As TensorBoard takes it."""
    writer.add_image(tag, draw(), step, dataformats="HWC")


def log_image(logger: Any, tag: str, draw: Callable[[], NDArray[np.uint8]], step: int) -> None:
    """As Lightning's loggers take it, if they take any."""
    logger.log_image(tag, [draw()], step=step)
