"""Telling, once of each, which layers get no dendrites and why, and which frozen ones do and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.placed import PlacedNetwork
from pl_dendrites.reporting.frozen_layers import frozen_table
from pl_dendrites.reporting.records import by_reason
from pl_dendrites.training.processes import Processes

__all__ = ["LeftAlone"]

_UNREACHED = (
    "no gradient passes through it in training, and no dendrite would learn there. It runs in validation alone, under"
    " `torch.no_grad()`, or in a reentrant activation checkpoint with nothing but frozen layers before it. Checkpoints"
    " with `use_reentrant=False` let gradients through; so does an input that requires one, as after"
    " `enable_input_require_grads()` of Hugging Face's models"
)


class LeftAlone:
    """The layers of a network that get no dendrites, as far as a user knows of them.

    Args:
        say: says something on the console.
        processes: all processes of the fit.
    """

    def __init__(self, say: Callable[[str], None], processes: Processes) -> None:
        self._say, self._processes = say, processes
        self._told: set[str] = set()
        self._looked = False

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
        if table and isinstance(network, PlacedNetwork):
            self._say(f"of these frozen layers some get dendrites, one more for all neurons of a layer taking\n{table}")
        elif table and network.units is None:
            self._say(f"of the frozen layers these grow, one more dendrite on each neuron taking\n{table}")
        elif table:
            self._say(f"around these frozen modules shared dendrites grow, the next set taking at most\n{table}")

    def tell_unreached(self, network: DendriticNetwork) -> None:
        """Warn of layers that training runs without gradients, after its first epoch.

        Args:
            network: the network.
        """
        if self._looked:
            return
        self._looked, layers = True, network.layers
        names = self._processes.union(sorted(layers), {name for name, own in layers.items() if own.called})
        reached = self._processes.union(names, {name for name in names if layers[name].reached})
        unreached = sorted({*names} - {*reached} - self._told)
        self._told |= {*unreached}
        if unreached:
            rank_zero_warn(f"no dendrites for {', '.join(map(repr, unreached))}: {_UNREACHED}.")

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
        ran = self._processes.union(unused, {name for name in unused if network.layers[name].reached})
        own = network.own_parameters()
        frozen = {name for name in unused if not any(parameter.requires_grad for parameter in own[name])} - {*ran}
        self._warn_of(ran, "nothing of what comes out of {them} reaches the loss")
        # Without gradients of a weight nobody can tell whether the model uses it.
        self._warn_of(frozen, "training does not call {them}, be it that the model uses the weights alone")
        self._warn_of({*unused} - {*ran} - frozen, "{they are} not used in training")

    @staticmethod
    def _warn_of(names: Collection[str], reason: str) -> None:
        if not names:
            return
        one = len(names) == 1
        why = reason.format_map(
            {"them": "it", "they are": "it is"} if one else {"them": "them", "they are": "they are"}
        )
        those = ", ".join(map(repr, sorted(names)))
        rank_zero_warn(f"{those} never had an error and {'gets' if one else 'get'} no dendrites: {why}.")
