"""Sparse dendrites of layers that do not learn, where the error asks for them: on which neurons, with which inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pl_dendrites.core.checks import check_at_least
from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.fields.gathered import Processes
from pl_dendrites.core.growth.block import Form
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.growth.slope_watch import SlopeWatch
from pl_dendrites.core.kinds import LinearConv, narrowed
from pl_dendrites.core.rule.worth import Offer, choose_neurons
from pl_dendrites.core.targets import Predicate, Targets
from pl_dendrites.core.watching import WatchingNetwork

__all__ = ["PlacedNetwork"]

_FAN_IN = 4
_BATCHES = 16  # that neurons are chosen by, and again their inputs
_MORE = 1.5  # as many neurons are looked at as could have dendrites, times this


class PlacedNetwork(WatchingNetwork[SlopeWatch]):
    r"""A model and the dendrites that it has where its error asks for them, within a budget.

    Each is a few synapses, further weights of its neuron from other inputs of the layer or the same, which learn by
    gradient with all that is trainable. It begins with weights of zero, so that the network's output does not change,
    and where the loss falls most steeply: while the network stands still, the gradients of all weights are added up in
    two looks (see :class:`~pl_dendrites.core.growth.slope_watch.SlopeWatch`), first of all neurons, then of all inputs
    of some. Of each neuron those ``fan_in`` inputs count whose gradients are largest, and the neurons where the sum of
    these is largest for its parameters get the dendrites, of whichever layer they are. Where optimizers make steps of
    one size for every parameter, as Adam does, that sum is how fast the loss begins to fall.

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
        >>> network.set_next(fan_in=2, max_parameters=20)
        >>> network.start_candidates()
        >>> x, y = torch.randn(64, 50), torch.randint(3, (64,))
        >>> while not network.settled:
        ...     network.listen(True)
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     network.listen(False)
        >>> slopes = network.integrate()
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        20
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
        reason = "its neurons cannot have dendrites that see a few inputs each, and others are not placed"
        if len(wrong) == len(self.targets):
            raise ValueError(f"no layer can have placed dendrites, of {wrong}: {reason}")
        self.leave_alone(wrong, reason)
        self._fan_in: int | None = None
        self._max_parameters = 1
        self._listening = self._whole = False
        self._batches = self._of_epoch = 0  # in this look, and in this epoch

    def set_next(self, *, fan_in: int | None = None, max_parameters: int = 10_000) -> None:  # type: ignore[override]
        """Say what dendrites to come are like.

        Args:
            fan_in: inputs of each, at most as many as its layer has; ``None``: four, or so many times twice as many as
                it takes to use the budget up with one dendrite on each neuron.
            max_parameters: most parameters of the model that are trainable, those that are so already included.

        Raises:
            ValueError: if one of them is below 1.
        """
        check_at_least("max_parameters", max_parameters, 1)
        check_at_least("fan_in", _FAN_IN if fan_in is None else fan_in, 1)
        self._fan_in, self._max_parameters = fan_in, max_parameters
        self._see(fan_in or _FAN_IN)

    def _see(self, fan_in: int) -> None:
        for name in self.targets:
            dendrites = self.layers[name]
            assert dendrites.kind.inputs is not None
            dendrites.next = Form(1, "linear", live=True, fan_in=min(fan_in, dendrites.kind.inputs))

    def _see_enough(self) -> None:
        most = max(self.layers[name].kind.inputs or 1 for name in self.targets)
        fan_in = _FAN_IN
        while fan_in < most and sum(map(self._of_all, self.targets)) < self._budget:
            fan_in *= 2
            self._see(fan_in)

    def _of_all(self, name: str) -> int:
        # Synapses of dendrites on all neurons.
        dendrites, layer = self.layers[name], self._hosts[name]
        entries = narrowed(dendrites.kind, layer, dendrites.next.fan_in, None).template(layer, 1).values()
        return sum(entry.numel() for entry in entries if entry.is_floating_point() and entry.ndim > 1)

    def looks_for(self, pool: int) -> str:
        """See :meth:`pl_dendrites.DendriticNetwork.looks_for`."""
        return "it is looked where the loss falls most steeply"

    def has(self) -> str:
        """See :meth:`pl_dendrites.DendriticNetwork.has`."""
        there = {name: sum(len(part) for part in parts) for name, d in self.layers.items() if (parts := _neurons(d))}
        return f"{sum(there.values()):,} dendrites on {len(there)} of {len(self.targets)} layers"

    # -- two looks ----------------------------------------------------------------------------------------------------

    def _check_state(self, state: Mapping[str, Mapping[str, Tensor]], pool: int) -> None:
        if set(state) != set(self.targets):
            raise ValueError(f"the saved slopes are of {sorted(state)}, and there are {sorted(self.targets)}")
        check_claims(state, "the saved slopes", "their state")

    def _start(self, name: str, pool: int, generator: torch.Generator | None) -> None:
        dendrites, seed = self.layers[name], 0 if generator is None else generator.initial_seed()
        assert isinstance(dendrites.kind, LinearConv)
        dendrites.set_watch(SlopeWatch(self._hosts[name], dendrites.kind, seed % 2**63))
        self._batches, self._of_epoch, self._whole = 0, 0, False

    def listen(self, listening: bool, frozen: bool | None = None) -> None:
        """See :meth:`pl_dendrites.DendriticNetwork.listen`. After enough batches some neurons are looked at closely."""
        super().listen(listening, frozen)
        over = self._listening and not listening
        self._batches, self._of_epoch, self._listening = self._batches + over, self._of_epoch + over, listening
        if not listening and self._batches >= _BATCHES and not self._is_closer:
            self._look_closer()

    @property
    def _is_closer(self) -> bool:
        return any(watch.neurons is not None for watch in self._watches.values())

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
        if self._fan_in is None:
            self._see_enough()
        offers = {name: self._offer(name, self._slopes(name).square().mean(1).sqrt()) for name in self._watches}
        chosen = choose_neurons(offers, _MORE * max(self._budget, 1))
        for name, watch in self._watches.items():
            watch.look_at(self._hosts[name], chosen.get(name, torch.zeros(0, dtype=torch.long)))
        self._batches = 0

    def _slopes(self, name: str) -> Tensor:
        # Of neurons and directions or inputs, what all processes saw; those of a kernel count as one.
        sums = self._watches[name].sums.clone()
        self._processes.add_up(sums)
        slopes: Tensor = sums.unsqueeze(-1).flatten(2).norm(dim=2)
        return slopes

    @property
    def _budget(self) -> int:
        trainable = set(self.trainable)
        return self._max_parameters - sum(p.numel() for name, p in self.model.named_parameters() if name in trainable)

    def _offer(self, name: str, worth: Tensor) -> Offer:  # type: ignore[override]
        return Offer(worth, self._of_all(name) / (self.layers[name].kind.neurons or 1), together=False)

    # -- what they showed ---------------------------------------------------------------------------------------------

    def integrate(self) -> dict[str, Tensor]:
        """Put dendrites in their places; flags and buffers return.

        Returns:
            For each layer that got any, of each of its dendrites how fast the loss begins to fall by it: the sum of the
            absolute gradients of its weights.

        Raises:
            RuntimeError: if nothing was looked at, or not for long enough.
        """
        if not self._is_closer:
            raise RuntimeError("nothing shows where dendrites are to be: the network is to see more batches")
        steepest = {name: self._slopes(name).topk(self._inputs_of_one(name), 1) for name in self._watches}
        offers = {name: self._offer(name, best.values.sum(1)) for name, best in steepest.items()}
        chosen = self._affordable(offers)
        watches = self._watches
        self._release()
        found = {}
        for name, places in chosen.items():
            looked_at, here = watches[name].neurons, places.to(self._device)
            assert looked_at is not None
            self._add(name, looked_at[here], steepest[name].indices[here])
            found[name] = offers[name].worth[here]
        self._see(self._fan_in or _FAN_IN)
        self._mirrored.follow()
        self.discard()
        return found

    def _affordable(self, offers: Mapping[str, Offer]) -> dict[str, Tensor]:
        if self._budget >= min(offer.parameters for offer in offers.values()):
            return choose_neurons(offers, self._budget)
        self.skipped |= dict.fromkeys(offers, "the budget has no room for another dendrite")
        return {}

    def _inputs_of_one(self, name: str) -> int:
        fan_in = self.layers[name].next.fan_in
        assert fan_in is not None
        return fan_in

    def _add(self, name: str, neurons: Tensor, inputs: Tensor) -> None:
        layer, dendrites = self._hosts[name], self.layers[name]
        block = dendrites.add(layer, replace(dendrites.next, neurons=len(neurons)))
        block.place(neurons, inputs.sort(1).values)

    def candidate_state(self, together: bool = False) -> dict[str, dict[str, Tensor]]:
        """What was seen so far, as a dict of plain tensors.

        Args:
            together: whether all processes call this, and get what all saw; if not, it is what this one did.
        """
        states = {name: watch.state_dict() for name, watch in self._watches.items()}
        for state in states.values():
            if together:
                self._processes.add_up(state["sums"])
            state["batches"] = torch.tensor([self._batches, self._of_epoch])
        return states

    def load_candidate_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what :meth:`candidate_state` returned.

        Raises:
            ValueError: if it is of other layers.
        """
        self._check_state(state, 1)
        for name, watch in self._watches.items():
            watch.load_state_dict(self._hosts[name], state[name])
            if self._processes.rank:  # else all of them would add up what one is enough to bring
                watch.sums.zero_()
            self._batches, self._of_epoch = state[name]["batches"].tolist()
        if self._is_closer and self._fan_in is None:
            self._see_enough()


def _neurons(dendrites: Dendrites) -> list[Tensor]:
    return [block.neurons for block in dendrites.private if block.neurons is not None]
