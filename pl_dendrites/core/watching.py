"""Networks that look at inputs and errors while they stand still, and have no candidates that learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from pl_dendrites.core.fields.gathered import Alone, Processes
from pl_dendrites.core.growth.watch import Watch
from pl_dendrites.core.kinds import weight_of
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.targets import Predicate, Targets

__all__ = ["WatchingNetwork"]

WatchT = TypeVar("WatchT", bound=Watch)


class WatchingNetwork(DendriticNetwork, Generic[WatchT]):
    """A network whose next set is found in what watches on its layers saw.

    Args:
        model: see :class:`~pl_dendrites.DendriticNetwork`.
        targets: see there.
        exclude: see there.
        mirrors: see there.
        processes: all of them; ``None``: this one is alone.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets | None = None,
        exclude: Sequence[str] | Predicate = (),
        mirrors: Mapping[str, str] | None = None,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(model, targets, exclude, mirrors)
        self._join(processes)

    def _join(self, processes: Processes | None) -> None:
        self._processes: Processes = Alone() if processes is None else processes

    @property
    def _watches(self) -> dict[str, WatchT]:
        return {name: cast(WatchT, d.watch) for name, d in self.layers.items() if d.watch is not None}

    @property
    def _device(self) -> torch.device:
        return weight_of(next(iter(self._hosts.values()))).device

    def scale_loss(self, scale: Tensor | None) -> None:
        """See :meth:`pl_dendrites.DendriticNetwork.scale_loss`."""
        for watch in self._watches.values():
            watch.loss_scale = scale

    def watch(self, parameters: Iterable[nn.Parameter] | None) -> None:
        """See :meth:`pl_dendrites.DendriticNetwork.watch`."""
        trained = None if parameters is None else {id(parameter) for parameter in parameters}
        for name, watch in self._watches.items():
            watch.watching = trained is None or any(id(p) in trained for p in self._hosts[name].parameters())

    def listen(self, listening: bool, frozen: bool | None = None) -> None:
        """See :meth:`pl_dendrites.DendriticNetwork.listen`."""
        for watch in self._watches.values():
            watch.listening = listening
        super().listen(listening, frozen)

    def layers_with_error(self) -> list[str]:
        """Names of the layers that an error was seen of, in any process. All must call this."""
        watches, names = self._watches, list(self._hosts)
        seen = [watches[name].seen if name in watches else 0 for name in names]
        total = torch.tensor(seen, device=self._device)
        self._processes.add_up(total)
        return [name for name, count in zip(names, total.tolist(), strict=True) if count]

    def discard(self) -> None:
        """What was seen goes; flags and buffers return. Does nothing where nothing is looked at."""
        for dendrites in self.layers.values():
            dendrites.set_watch(None)
        super().discard()
