"""The sizes that a fit passed: of each the best network, to be taken when the fit is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.phases import PhaseMachine
from pl_dendrites.core.tensors import local
from pl_dendrites.saved.best import BestModel
from pl_dendrites.saved.copies import address
from pl_dendrites.saved.place import Place, has_values, put_weights

__all__ = ["Frontier"]

# Bytes that smaller networks take, all together, where nobody asked for them.
_UNASKED = 2**24
_PLACE = ("weights", "path", "file")


@dataclass(frozen=True)
class _Size:
    record: dict[str, Any]
    place: Place


class Frontier:
    """The best network of each size that a fit passed, the smallest first, each better than those before.

    A fit only ever grows, so what is best is the last of them: when a larger network becomes the best, the one before
    stays, and the copy of the new one shares with it all that has the same bits.

    Args:
        best: the best network.
        keep: whether smaller networks are kept; ``None``: in memory, as long as they take up to 16 MiB together beside
            the best one. Beyond that the smallest go. None are kept of a sharded model.
        mode: whether a good score is small or large.

    """

    def __init__(self, best: BestModel, keep: bool | None, mode: Literal["min", "max"]) -> None:
        self._best, self._wanted, self._sign = best, keep, 1.0 if mode == "max" else -1.0
        self._most = _UNASKED if keep is None else float("inf")
        self._record: dict[str, Any] | None = None  # of the best network
        self._smaller: list[_Size] = []
        # Memory by where it begins: of smaller networks, with its size; and of the best, which may be the same.
        self._sizes: dict[int, int] = {}
        self._common: set[int] = set()
        self._taken = 0

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of each size, the smallest first, its ``parameters``, ``score``, ``cycle``, ``dendrites`` and ``units``."""
        return [dict(size.record) for size in self._all]

    @property
    def paths(self) -> set[str]:
        """Files that smaller networks are in."""
        return {size.place.path for size in self._smaller if size.place.file}

    # -- while it grows -----------------------------------------------------------------------------------------------

    def keep(
        self, trainer: pl.Trainer, module: pl.LightningModule, machine: PhaseMachine, network: DendriticNetwork
    ) -> None:
        """Make the present network the best; the one before stays if it is smaller.

        Args:
            trainer: the Trainer.
            module: the model.
            machine: with the network's score as the best.
            network: its dendrites.
        """
        before, self._record = self._record, _describe(machine, network)
        place = self._best.place
        wanted = place.held is not None if self._wanted is None else self._wanted
        if before is not None and wanted and not is_sharded(module):
            self._smaller.append(_Size(before, place))
        self._smaller = [size for size in self._smaller if size.record["parameters"] < self._record["parameters"]]
        self._settle()
        self._best.keep(trainer, module, self)
        self._settle()

    def forget(self) -> None:
        """The scores so far were of another kind than those to come: the networks cannot be compared."""
        self._record, self._smaller = None, []
        self._count()

    def holds(self, begin: int) -> bool:
        """Whether memory is that of a smaller network.

        Args:
            begin: where it begins.
        """
        return begin in self._sizes

    def part(self, begin: int) -> None:
        """What is in this memory the best network is about to have otherwise. Smaller ones that take too much then go.

        Args:
            begin: where it begins.
        """
        if begin in self._common:
            self._common.remove(begin)
            self._taken += self._sizes[begin]
            self._shrink()

    def _settle(self) -> None:
        self._common = {address(value) for value in _tensors(self._best.place)}
        self._count()
        self._shrink()

    def _shrink(self) -> None:
        while self._taken > self._most:
            del self._smaller[0]
            self._count()

    def _count(self) -> None:
        values = [value for size in self._smaller for value in _tensors(size.place)]
        self._sizes = {address(value): local(value).untyped_storage().nbytes() for value in values}
        self._taken = sum(size for begin, size in self._sizes.items() if begin not in self._common)

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def take(self, module: nn.Module, parameters: int | None, score: float | None) -> dict[str, Any]:
        """Put one of the networks into a model, which grows or shrinks to fit.

        Args:
            module: the model.
            parameters: most that the network may have; ``None``: any number.
            score: which it must reach; the smallest that does is taken. ``None``: any, and the best is taken.

        Returns:
            Its record.

        Raises:
            ValueError: if there is none, or it is in a file that is not there; the model is then what it was.
        """
        fitting = [
            size
            for size in self._all
            if (parameters is None or size.record["parameters"] <= parameters)
            and (score is None or self._sign * (size.record["score"] - score) >= 0)
        ]
        if not fitting:
            there = [f"  {size.record['parameters']:,} parameters: {size.record['score']:.6g}" for size in self._all]
            raise ValueError(
                "\n".join([f"no network that is kept has parameters={parameters}, score={score}; there are:", *there])
            )
        size = fitting[-1 if score is None else 0]
        weights = self._best.read(size.place)
        if weights is None:
            raise ValueError(
                f"the network of {size.record['parameters']:,} parameters is in the file"
                f" '{Path(size.place.path).name}', which is neither in `dirpath` nor beside the checkpoint"
            )
        put_weights(module, weights)
        return dict(size.record)

    @property
    def _all(self) -> list[_Size]:
        best = [] if self._record is None else [_Size(self._record, self._best.place)]
        return [*self._smaller, *best]

    # -- what a checkpoint holds --------------------------------------------------------------------------------------

    def state_dict(self, best: Mapping[str, Any] | None) -> dict[str, Any]:
        """For the callback's state.

        Args:
            best: the weights of the best network there. What smaller ones have in common with it are the same tensors.
        """
        return {
            "best": self._record,
            "smaller": [size.record | size.place.state_dict(best or {}) for size in self._smaller],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; the best network has gone on before.

        Args:
            state: what is there.
        """
        self._record = state["best"]
        self._smaller = [
            _Size({key: value for key, value in size.items() if key not in _PLACE}, Place.of(size))
            for size in state["smaller"]
        ]
        self._common = {address(value) for value in _tensors(self._best.place)}
        self._count()

    def complete(self) -> None:
        """Take what a checkpoint left out from the best network, which has it again."""
        self._smaller = [replace(size, place=size.place.completed(self._best.place)) for size in self._smaller]
        self._settle()


def _describe(machine: PhaseMachine, network: DendriticNetwork) -> dict[str, Any]:
    return {
        "parameters": parameter_count(network.model),
        "score": machine.best,
        "cycle": machine.cycle,
        "dendrites": network.num_dendrites,
        **({} if network.units is None else {"units": network.units}),
    }


def _tensors(place: Place) -> list[Tensor]:
    return [value for value in (place.held or {}).values() if has_values(value)]
