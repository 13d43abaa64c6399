"""Telling, once of each, which layers get no dendrites and why, and which frozen ones do and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.reporting.frozen_layers import frozen_table
from pl_dendrites.reporting.records import by_reason
from pl_dendrites.training.processes import Processes

__all__ = ["LeftAlone"]


class LeftAlone:
    """The layers of a network that get no dendrites, as far as a user knows of them.

    Args:
        say: says something on the console.
        processes: all processes of the fit.
    """

    def __init__(self, say: Callable[[str], None], processes: Processes) -> None:
        self._say, self._processes = say, processes
        self._told: set[str] = set()

    def tell(self, network: DendriticNetwork, names: Iterable[str] | None = None) -> None:
        """Say which layers are left alone that nobody was told of yet.

        Args:
            network: the network.
            names: some of its layers; ``None``: all.
        """
        skipped = network.skipped
        news = {n: skipped[n] for n in (skipped if names is None else sorted(names)) if n not in self._told}
        self._told |= news.keys()
        for reason, those in by_reason(news).items():
            self._say(f"no dendrites for {', '.join(map(repr, those))}: {reason}")

    def tell_frozen(self, network: DendriticNetwork) -> None:
        """Say which frozen layers grow, and what that costs; nothing where there are none.

        Args:
            network: the network.
        """
        table = frozen_table(network)
        if table:
            self._say(f"of the frozen layers these grow, one more dendrite on each neuron taking\n{table}")

    def tell_unused(self, network: DendriticNetwork, names: set[str], bypassed: Container[str]) -> None:
        """Say of target layers that they got no part of a set.

        Args:
            network: the network.
            names: of these layers.
            bypassed: layers whose weights were seen to be used without a call of them, in this process.
        """
        past = names & set(self._processes.union(sorted(names), bypassed))
        reason = "the model uses its weights without calling it, and dendrites see what a layer is called with"
        network.skipped |= dict.fromkeys(past, reason)
        self.tell(network, past)
        unused = sorted(names - past - self._told)
        self._told |= names
        if unused:
            gets, is_not = ("gets", "it is") if len(unused) == 1 else ("get", "they are")
            rank_zero_warn(
                f"{', '.join(map(repr, unused))} never had an error and {gets} no dendrites:"
                f" {is_not} not used in training."
            )
