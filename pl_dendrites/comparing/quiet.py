"""Lightning's banners, once for each of many fits, are left out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_module

__all__ = ["quiet"]

_OURS = ("compare: ", "DendriteCallback: ")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, what a Trainer says of devices and of its end is not shown; warnings are.

    Example:
        >>> from lightning.pytorch.utilities.rank_zero import rank_zero_info
        >>> with quiet():
        ...     rank_zero_info("GPU available: False, used: False")
    """
    log: logging.Logger = rank_zero_module.log
    log.addFilter(_is_wanted)
    try:
        yield
    finally:
        log.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or record.getMessage().startswith(_OURS)
