"""Fields that move while shared dendrites learn: when gradients are looked at, and what is done by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.fields.gathered import Processes
from pl_dendrites.core.fields.rewire import Gains, forget
from pl_dendrites.core.growth.shared_block import SharedBlock

__all__ = ["Moves"]


class Moves:
    """Moves the fields of all live units by what the backward passes of all processes ask for.

    Args:
        blocks: returns the blocks that there are, each with the name of its module.
        processes: all of them.

    Attributes:
        deviation: of the inputs of each module, shape ``(n,)``, as the last samples had it; 0 where one does not vary.
    """

    def __init__(self, blocks: Callable[[], list[tuple[str, SharedBlock]]], processes: Processes) -> None:
        self._blocks, self._processes = blocks, processes
        self.deviation: dict[str, Tensor] = {}

    def look(self, looking: bool = True) -> None:
        """See :meth:`SharedNetwork.look <pl_dendrites.core.shared.SharedNetwork.look>`."""
        for name, block in self._blocks():
            form, field = block.form, block.field
            looks = looking and block.live and name in self.deviation
            sizes = (form.units, form.inputs, form.outputs)
            block.gains = Gains(*sizes, field.device, self._processes.count) if looks else None

    def rewire(self, share: float, optimizers: Iterable[Optimizer]) -> None:
        """See :meth:`SharedNetwork.rewire <pl_dendrites.core.shared.SharedNetwork.rewire>`."""
        self._add_up()
        optimizers, finite = list(optimizers), all(bool(part.isfinite().all()) for part in self._sums())
        for name, block in self._blocks():
            gains, block.gains = block.gains, None
            if gains is None or not finite:
                continue
            for parameter, moved in block.rewire(gains, share, self.deviation[name]).items():
                for optimizer in optimizers:
                    forget(optimizer, parameter, moved)

    def _sums(self) -> list[Tensor]:
        return [part for _, block in self._blocks() if block.gains is not None for part in block.gains.sums]

    def _add_up(self) -> None:
        for part in self._sums():
            self._processes.add_up(part)

    def state_dict(self, together: bool = True) -> dict[str, Any]:
        """What it knows, as plain tensors.

        Args:
            together: whether all processes call this. If not, what others looked at is left out.
        """
        if together:
            self._add_up()
            self._leave_to_first()
        return {
            "deviation": {name: value.clone() for name, value in self.deviation.items()},
            "gains": [part.clone() for part in self._sums()],
        }

    def _leave_to_first(self) -> None:
        for part in self._sums() if self._processes.rank else ():
            part.zero_()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: if it is of another network.
        """
        check_claims(state, "what moves fields", "its state")
        for name, value in state["deviation"].items():
            inputs = {block.form.inputs for own, block in self._blocks() if own == name}
            if inputs and inputs != {value.numel()}:
                raise ValueError(f"fields of '{name}' have {inputs} inputs, and what moves them knows {value.numel()}")
        there = {name: block.field.device for name, block in self._blocks()}
        self.deviation = {name: value.to(there.get(name, value.device)) for name, value in state["deviation"].items()}
        if state["gains"]:
            self.look()
            for own, saved in zip(self._sums(), state["gains"], strict=True):
                own.copy_(saved)
            self._leave_to_first()
