"""Dendrites of layers that do not learn, placed where the network errs: on which layers, and what they see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pl_dendrites.core.checks import check_at_least
from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.fields.gathered import Processes, of_first
from pl_dendrites.core.growth.direction_watch import DirectionWatch, Found
from pl_dendrites.core.growth.placed_block import PlacedBlock, PlacedForm
from pl_dendrites.core.kinds import LinearConv, weight_of
from pl_dendrites.core.targets import Predicate, Targets
from pl_dendrites.core.watching import WatchingNetwork

__all__ = ["PlacedNetwork"]

_DIRECTIONS = 32  # of a layer's inputs, that its dendrites see
_MORE = 8  # so many more are looked along, which finds those better
_BATCHES = 16  # of each look


class PlacedNetwork(WatchingNetwork[DirectionWatch]):
    r"""A model and the dendrites that its layers have where its error asks for them, within a budget.

    All neurons of a layer share them. They see the layer's inputs along a few directions: the principal ones of the
    inputs, each weighted by the error of what the layer makes of it (see
    :class:`~pl_dendrites.core.growth.direction_watch.DirectionWatch`). These are found in two looks, while the network
    stands still, and do not change any more. A dendrite has a weight for each direction and an output weight for each
    neuron, which learn by gradient with all that is trainable. Output weights begin at zero, so that the network's
    output does not change.

    All layers have one dendrite before any has a second. Those where the loss falls most steeply for each parameter
    come first.

    Several processes, each with its part of every batch, find the same. All must call :meth:`listen` and
    :meth:`integrate` then.

    Args:
        model: the model. Dendrites that it has already are taken over.
        targets: the layers that may get dendrites, see :func:`~pl_dendrites.select_targets`.
        exclude: taken out of ``targets``.
        mirrors: see :class:`~pl_dendrites.DendriticNetwork`.
        processes: all of them; ``None``: this one is alone.

    Raises:
        ValueError: if no layer can have such dendrites.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 3)).requires_grad_(False)
        >>> network = PlacedNetwork(model, "frozen")
        >>> network.set_next(max_parameters=100)
        >>> network.start_candidates()
        >>> x, y = torch.randn(64, 50), torch.randint(3, (64,))
        >>> while not network.settled:
        ...     network.listen(True)
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     network.listen(False)
        >>> slopes = network.integrate()
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        95
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets | None = None,
        exclude: Sequence[str] | Predicate = (),
        mirrors: Mapping[str, str] | None = None,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(model, targets, exclude, mirrors, processes)
        layers = self.layers
        wrong = [name for name in self.targets if not layers[name].kind.choosable]
        reason = "it is no Linear and no convolution without groups, and dendrites are not placed on others"
        if len(wrong) == len(self.targets):
            raise ValueError(f"no layer can have placed dendrites, of {wrong}: {reason}")
        self.leave_alone(wrong, reason)
        self._max_parameters = 1
        self._listening = self._whole = False
        self._batches = self._of_epoch = 0  # in this look, and in this epoch

    def set_next(self, *, max_parameters: int = 10_000) -> None:  # type: ignore[override]
        """Say how many dendrites are to come.

        Args:
            max_parameters: most parameters of the model that are trainable, those that are so already included.

        Raises:
            ValueError: if it is below 1.
        """
        check_at_least("max_parameters", max_parameters, 1)
        self._max_parameters = max_parameters

    @property
    def num_dendrites(self) -> int:
        """Sets of them, of the layers that have most."""
        return max(len(dendrites.placed) for dendrites in self.layers.values())

    @property
    def units(self) -> int:
        """See :meth:`pl_dendrites.DendriticNetwork.units`."""
        return sum(self._there().values())

    def looks_for(self, pool: int) -> str:
        """See :meth:`pl_dendrites.DendriticNetwork.looks_for`."""
        return "it is looked along which directions inputs vary where the network errs"

    def has(self) -> str:
        """See :meth:`pl_dendrites.DendriticNetwork.has`."""
        there = [units for units in self._there().values() if units]
        return f"{sum(there):,} dendrites on {len(there)} of {len(self.targets)} layers"

    def _there(self) -> dict[str, int]:
        return {name: sum(block.form.units for block in d.placed) for name, d in self.layers.items()}

    # -- two looks ----------------------------------------------------------------------------------------------------

    def _check_state(self, state: Mapping[str, Mapping[str, Tensor]], pool: int) -> None:
        if set(state) != set(self.targets):
            raise ValueError(f"what was seen is of {sorted(state)}, and there are {sorted(self.targets)}")
        check_claims(state, "what was seen", "its state")

    def _start(self, name: str, pool: int, generator: torch.Generator | None) -> None:
        dendrites, seed = self.layers[name], 0 if generator is None else generator.initial_seed()
        assert isinstance(dendrites.kind, LinearConv)
        dendrites.set_watch(DirectionWatch(self._hosts[name], dendrites.kind, _DIRECTIONS + _MORE, seed % 2**63))
        self._batches, self._of_epoch, self._whole = 0, 0, False

    def listen(self, listening: bool, frozen: bool | None = None) -> None:
        """See :meth:`pl_dendrites.DendriticNetwork.listen`. After enough batches it is looked closer."""
        super().listen(listening, frozen)
        over = self._listening and not listening
        self._batches, self._of_epoch, self._listening = self._batches + over, self._of_epoch + over, listening
        if not listening and self._batches >= _BATCHES and not self._is_closer:
            self._look_closer()

    @property
    def _is_closer(self) -> bool:
        return any(watch.closer for watch in self._watches.values())

    @property
    def settled(self) -> bool:
        """Whether enough was seen to choose by: some batches in each look, or an epoch, which is all that there is."""
        return self._is_closer and (self._whole or self._batches >= _BATCHES)

    def reset_correlations(self) -> None:
        """An epoch begins."""
        self._of_epoch = 0

    def correlation_rose(self, min_delta: float) -> bool:
        """Whether more is to be seen; asked when an epoch is over. Several processes must call this together."""
        self._whole = self._is_closer and self._batches >= self._of_epoch
        if not self._is_closer:
            self._look_closer()
        return not self.settled

    def _look_closer(self) -> None:
        for watch in self._watches.values():
            self._gather(watch.sums)
            watch.look_closer()
        self._batches = 0

    def _gather(self, sums: Mapping[str, Tensor]) -> None:
        for _, value in sorted(sums.items()):
            self._processes.add_up(value)

    # -- what they showed ---------------------------------------------------------------------------------------------

    def integrate(self) -> dict[str, Tensor]:
        """Put dendrites in their places; flags and buffers return.

        Returns:
            For each layer that got any, how fast the loss would fall along what they see, shape ``()``: the squared
            gradient of all weights between that and the layer's neurons.

        Raises:
            RuntimeError: if nothing was looked at, or not for long enough.
        """
        if not self._is_closer:
            raise RuntimeError("nothing shows where dendrites are to be: the network is to see more batches")
        found = {name: self._found(watch) for name, watch in self._watches.items()}
        forms = self._affordable(found)
        self._release()
        for name, form in forms.items():
            layer = self._hosts[name]
            block = self.layers[name].add(layer, form)
            assert isinstance(block, PlacedBlock)
            # Hardware that is not alike may find others.
            block.place(of_first(found[name].directions, self._processes))
        self._mirrored.follow()
        self.discard()
        return {name: torch.tensor(found[name].slope) for name in forms}

    def _found(self, watch: DirectionWatch) -> Found:
        self._gather(watch.sums)
        return watch.found(_DIRECTIONS)

    def _affordable(self, found: Mapping[str, Found]) -> dict[str, PlacedForm]:
        """The forms of all that the budget has room for."""
        one = {name: self.one_more(name) for name in found}
        steepest = sorted(one, key=lambda name: -found[name].slope / one[name].parameters)
        order = [name for name in steepest if found[name].slope > 0] * _DIRECTIONS
        left, units = self._budget, Counter[str]()
        for name in order:
            if one[name].parameters <= left and units[name] < one[name].directions:
                left, units[name] = left - one[name].parameters, units[name] + 1
        if order and not units:
            self.skipped |= dict.fromkeys(found, "the budget has no room for another dendrite")
        return {name: replace(one[name], units=count) for name, count in units.items()}

    def one_more(self, name: str) -> PlacedForm:
        """What one more dendrite looks like, and costs.

        Args:
            name: of a target layer.
        """
        neurons = self.layers[name].kind.neurons
        assert neurons is not None
        return PlacedForm(1, min(_DIRECTIONS, weight_of(self._hosts[name]).numel() // neurons), neurons)

    @property
    def _budget(self) -> int:
        trainable = set(self.trainable)
        return self._max_parameters - sum(p.numel() for name, p in self.model.named_parameters() if name in trainable)

    def candidate_state(self, together: bool = False) -> dict[str, dict[str, Tensor]]:
        """What was seen so far, as a dict of plain tensors.

        Args:
            together: whether all processes call this, and get what all saw; if not, it is what this one did.
        """
        states = {name: watch.state_dict() for name, watch in self._watches.items()}
        for name, state in states.items():
            if together:
                self._gather({key: state[key] for key in self._watches[name].sums})
            state["batches"] = torch.tensor([self._batches, self._of_epoch])
        return states

    def load_candidate_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what :meth:`candidate_state` returned.

        Raises:
            ValueError: if it is of other layers.
        """
        self._check_state(state, 1)
        for name, watch in self._watches.items():
            watch.load_state_dict(state[name])
            if self._processes.rank:  # else all of them would add up what one is enough to bring
                for value in watch.sums.values():
                    value.zero_()
            self._batches, self._of_epoch = state[name]["batches"].tolist()
