"""How each make of logger takes a picture, a text or a page: tables, to which a make is added as a line.

A make is known by the methods that a logger and its ``experiment`` have, not by a class: ``lightning.pytorch``,
``pytorch_lightning`` and users have their own, and no package need be there that the user does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

__all__ = ["HISTOGRAM", "PAGE", "PICTURE", "TEXT", "Way", "find_way", "method_of"]


class Way(NamedTuple):
    """How one make takes things of one kind.

    Attributes:
        method: that is called, as a dotted name that begins at the logger.
        call: calls it, with the method, the logger, a tag, what is to be shown, and the step.
        beside: dotted names of what else the logger has, where other makes have that method too.
    """

    method: str
    call: Callable[[Callable[..., Any], Any, str, Any, int], Any]
    beside: tuple[str, ...] = ()

    def fits(self, logger: Any) -> bool:
        """Whether a logger has what this way needs."""
        return method_of(logger, self.method) is not None and all(
            _find(logger, name) is not None for name in self.beside
        )

    def show(self, logger: Any, tag: str, make: Callable[[], Any], step: int) -> None:
        """Give a logger what ``make`` returns; errors of either come through."""
        self.call(attrgetter(self.method)(logger), logger, tag, make(), step)


def _log_wandb_page(log: Callable[..., Any], _: Any, tag: str, html: str, step: int) -> None:
    import wandb

    log({tag: wandb.Html(html, inject=False)}, step)


_COMET, _MLFLOW, _WANDB = ("experiment.log_html",), ("run_id",), ("log_table", "use_artifact")

PICTURE = (
    # TensorBoard
    Way("experiment.add_image", lambda add, _, tag, pixels, step: add(tag, pixels, step, dataformats="HWC")),
    Way("experiment.log_image", lambda log, _, tag, pixels, step: log(pixels, tag, step=step), _COMET),
    Way(
        "experiment.log_image",
        lambda log, logger, tag, pixels, step: log(logger.run_id, pixels, key=tag, step=step),
        _MLFLOW,
    ),
    # Weights & Biases, and whatever else has Lightning's method
    Way("log_image", lambda log, _, tag, pixels, step: log(tag, [pixels], step=step)),
)

TEXT = (
    # TensorBoard
    Way("experiment.add_text", lambda add, _, tag, text, step: add(tag, text, step)),
    Way("experiment.log_text", lambda log, _, tag, text, step: log(text, step=step, metadata={"tag": tag}), _COMET),
    # One file, written anew: each text says all that the earlier ones said.
    Way("experiment.log_text", lambda log, logger, tag, text, _: log(logger.run_id, text, f"{tag}.md"), _MLFLOW),
    # Weights & Biases, whose texts are tables
    Way("log_text", lambda log, _, tag, text, step: log(tag, columns=[tag], data=[[text]], step=step)),
)

HISTOGRAM = (
    # TensorBoard
    Way("experiment.add_histogram", lambda add, _, tag, values, step: add(tag, values, step)),
)

PAGE = (
    Way("experiment.log_html", lambda log, _, tag, html, step: log(html)),
    Way("experiment.log_text", lambda log, logger, tag, html, _: log(logger.run_id, html, f"{tag}.html"), _MLFLOW),
    Way("log_metrics", _log_wandb_page, _WANDB),
)


def find_way(ways: Sequence[Way], logger: Any) -> Way | None:
    """The first way that a logger has.

    Args:
        ways: of a kind of thing.
        logger: of any make.

    Returns:
        A way; ``None`` if the logger shows no such things.

    Example:
        >>> class Writer:
        ...     def add_text(self, tag, text, step):
        ...         print(f"{tag} at {step}: {text}")
        >>> class Logger:
        ...     experiment = Writer()
        >>> find_way(TEXT, Logger()).show(Logger(), "growth", lambda: "one set", 12)
        growth at 12: one set
        >>> find_way(PICTURE, Logger()) is None
        True
    """
    return next((way for way in ways if way.fits(logger)), None)


def method_of(logger: Any, name: str) -> Callable[..., Any] | None:
    """A method by its dotted name, if there is one."""
    found = _find(logger, name)
    return found if callable(found) else None


def _find(logger: Any, name: str) -> Any:
    try:
        return attrgetter(name)(logger)
    except Exception:  # a logger may answer for names in its own way, or reach for a server that is away
        return None
