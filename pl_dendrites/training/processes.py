"""The processes of a fit: what they add up, and what they must agree on.

Every method is a collective: all processes must call it, and equally often.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """All processes of a fit; with one alone nothing is communicated.

    Args:
        trainer: the Trainer, with its strategy set up.

    Attributes:
        count: how many there are.
        rank: which of them this one is, from 0 on.

    Example:
        >>> alone = Processes(pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False))
        >>> alone.count, alone.mean(0.5), alone.mean(None), alone.any(True)
        (1, 0.5, None, True)
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.count, self.rank = trainer.world_size, trainer.global_rank
        self._strategy = trainer.strategy

    def add_up(self, tensor: Tensor) -> None:
        """Put the sum over all processes into a tensor, in place: the same bits in each of them."""
        if self.count > 1:
            # Not the strategy's own `reduce`, which waits at a barrier each time.
            torch.distributed.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, which are of one shape, stacked: the same bits in each of them."""
        if self.count == 1:
            return tensor[None]
        parts = tensor.new_empty(self.count * len(tensor), *tensor.shape[1:])
        torch.distributed.all_gather_into_tensor(parts, tensor)
        return parts.view(self.count, *tensor.shape)

    def mean(self, value: float | None) -> float | None:
        """The mean over the processes that have a value; ``None`` if none has."""
        if self.count == 1:
            return value
        pair = [0.0, 0.0] if value is None else [value, 1.0]
        known = torch.tensor(pair, dtype=torch.float64, device=self._strategy.root_device)
        self.add_up(known)
        total, there = known.tolist()
        return total / there if there else None

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return self.mean(float(flag)) != 0

    def union(self, names: Iterable[str], there: Container[str]) -> list[str]:
        """Those of some names, the same and in the same order everywhere, that are there in any process."""
        return [name for name in names if self.any(name in there)]

    def refuse_uneven_epochs(self, trainer: pl.Trainer) -> None:
        """Raise in all processes where some have more batches in an epoch than others: these would wait for them.

        Args:
            trainer: the Trainer, about to train.

        Raises:
            MisconfigurationException: says how many there are, and what to do.
        """
        own, mean = float(trainer.num_training_batches), self.mean(float(trainer.num_training_batches))
        if self.any(own != mean):
            raise MisconfigurationException(
                f"processes have different numbers of training batches: {own:.0f} in this one, {mean} in the mean. One"
                " that is done would leave the others waiting. Use `DistributedSampler`, or `limit_train_batches`."
            )

    def first(self, value: T) -> T:
        """What the first process has."""
        return self._strategy.broadcast(value)
