"""What is shown while a fit runs: scalars for any logger."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from torch import Tensor, nn

from pl_dendrites.host import logging_step

__all__ = ["correlation_figures", "log_scalars", "parameter_count"]

_PREFIX = "dendrites"


def parameter_count(module: nn.Module) -> int:
    """Parameters of a model, frozen ones and dendrites included; candidates are no part of it."""
    return sum(parameter.numel() for parameter in module.parameters())


def correlation_figures(correlations: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Mean and maximum over a layer's neurons of the absolute correlation of the best candidate.

    Args:
        correlations: ``(P, C)`` by layer name, as :meth:`~pl_dendrites.core.DendriticNetwork.correlations` gives them.

    Returns:
        ``{"mean": ..., "max": ...}`` by layer name.

    Example:
        >>> import torch
        >>> correlation_figures({"fc": torch.tensor([[0.25, -0.5], [-0.75, 0.0]])})
        {'fc': {'mean': 0.625, 'max': 0.75}}
    """
    best = {name: value.abs().amax(0) for name, value in correlations.items()}
    return {name: {"mean": value.mean().item(), "max": value.max().item()} for name, value in best.items()}


def log_scalars(
    trainer: pl.Trainer,
    *,
    phase: str,
    dendrites: int,
    parameters: int,
    best_score: float | None,
    correlations: Mapping[str, Mapping[str, float]],
) -> None:
    """Send the state of growth to every logger of a Trainer, at the step that Lightning's own metrics have.

    Args:
        trainer: the Trainer.
        phase: ``"base"`` is logged as 0, ``"correlation"`` as 1.
        dendrites: per neuron.
        parameters: of the model.
        best_score: of the network that is kept; not logged while there is none.
        correlations: from :func:`correlation_figures`.
    """
    scalars: dict[str, float] = {
        f"{_PREFIX}/phase": float(phase == "correlation"),
        f"{_PREFIX}/count": dendrites,
        f"{_PREFIX}/parameters": parameters,
    }
    if best_score is not None:
        scalars[f"{_PREFIX}/best_score"] = best_score
    for name, figures in correlations.items():
        for kind, value in figures.items():
            scalars[f"{_PREFIX}/correlation_{kind}/{name or 'model'}"] = value
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=logging_step(trainer))
