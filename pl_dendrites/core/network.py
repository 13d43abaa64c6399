"""The dendrites of a whole model: how they grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.candidate_state import check_candidates
from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.cost import set_parameters
from pl_dendrites.core.growth.block import Form, check_form, inputs_kept
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.growth.freeze import Freeze
from pl_dendrites.core.growth.hooks import dendrites_of, hang, hosts, know_neurons, take_off
from pl_dendrites.core.growth.sharded import is_sharded
from pl_dendrites.core.growth.used_layers import UsedLayers
from pl_dendrites.core.inventory import inventory_table
from pl_dendrites.core.kinds import inputs_of
from pl_dendrites.core.markup import in_notebook
from pl_dendrites.core.mirrored import MirroredLayers
from pl_dendrites.core.mirrors import find_mirrors, named_mirrors, parts_of_mirrors
from pl_dendrites.core.rule.candidates import Candidates
from pl_dendrites.core.rule.worth import Offer, choose_share, worth_of
from pl_dendrites.core.structure import grow_on_load
from pl_dendrites.core.targets import Predicate, Targets, select_targets

__all__ = ["DendriticNetwork"]


class DendriticNetwork:
    """A model and the dendrites of all its target layers.

    Made by :func:`~pl_dendrites.attach`. The model keeps its type, its attributes and its state_dict keys; each
    target layer gets a submodule ``dendrites`` and a forward hook that adds their signal. Printed, or shown by a
    notebook, it is a table of the layers.

    Args:
        model: the model. Dendrites that it has already are taken over.
        targets: the layers that grow, see :func:`~pl_dendrites.select_targets`.
        exclude: taken out of ``targets``.
        mirrors: name of each module that mirrors another, and of that; ``None``: those that
            ``find_mirrors`` finds.

    Attributes:
        model: the model.
        mirrors: name of each module that mirrors one with target layers, and of that: its layers grow as theirs do.
        targets: names of the layers that grow.
        skipped: name and reason of the layers left alone.
        left_alone: those of them that :meth:`leave_alone` named.
        share: see :meth:`set_next`.

    Raises:
        ValueError: if no layer can have dendrites, or a module that ``mirrors`` names does not fit.

    Example:
        >>> from pl_dendrites.core import attach
        >>> _ = torch.manual_seed(0)
        >>> network = attach(nn.Linear(2, 1))
        >>> network.start_candidates(pool=2)
        >>> x = torch.randn(64, 2)
        >>> optimizer = torch.optim.Adam(network.candidate_parameters(), lr=0.01)
        >>> for _ in range(3):
        ...     network.reset_correlations()
        ...     loss = (network.model(x) - x.prod(1, keepdim=True)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> network.correlations()[""].shape
        torch.Size([2, 1])
        >>> _ = network.integrate()
        >>> network.num_dendrites
        1
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets | None = None,
        exclude: Sequence[str] | Predicate = (),
        mirrors: Mapping[str, str] | None = None,
    ) -> None:
        chosen, self.skipped = select_targets(model, targets, exclude)
        self.mirrors = find_mirrors(model, chosen) if mirrors is None else named_mirrors(model, mirrors)
        inside = parts_of_mirrors(self.mirrors, [*chosen, *hosts(model)])
        self.skipped |= {name: reason for name, reason in inside.items() if name in chosen}
        self.model, self.left_alone = model, set[str]()
        self.targets = [name for name in chosen if name not in inside]
        if not self.targets:
            raise ValueError(f"no layer can have dendrites: {self.skipped}")
        for name in self.targets:
            if "dendrites" not in chosen[name]._modules:
                hang(chosen[name])
        self._hosts = {name: layer for name, layer in hosts(model).items() if name not in inside}
        self._begin()
        for name in self._mirrored.names:
            self.skipped.pop(name, None)
        self.share = 1.0

    def _begin(self) -> None:
        self._mirrored = MirroredLayers(self.model, self.mirrors, self._hosts)
        self._freeze: Freeze | None = None
        grow_on_load(self.model)

    def follow_mirrored(self) -> None:
        """Let mirrors have what they mirror has, after a load: see ``MirroredLayers.follow``."""
        self._mirrored.follow()

    def set_next(
        self, activation: str = "tanh", *, live: bool = False, fan_in: int | float | None = None, share: float = 1.0
    ) -> None:
        """Say what dendrites to come are like. Those that are there stay as they are.

        Args:
            activation: a name in ``ACTIVATIONS``.
            live: whether they go on learning with the network, by gradient, once they are part of it.
            fan_in: inputs that each keeps: a number, or a share of those of its layer; ``None``: all. Layers that have
                no more inputs, and those whose dendrites cannot be sparse, get dense ones.
            share: below 1, :meth:`integrate` grows only the neurons to which a dendrite is worth most for its
                parameters, of all layers, and takes so much of the parameters that dendrites on all would have. See
                ``choose_share``.

        Raises:
            ValueError: if one of them is not possible.
        """
        check_form(activation, fan_in)
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {share!r}")
        self.share = share
        for name in self.targets:
            dendrites = dendrites_of(self._hosts[name])
            dendrites.next = Form(1, activation, live, inputs_kept(dendrites.kind.inputs, fan_in))

    def __str__(self) -> str:
        """A row for every layer that grows."""
        return str(inventory_table(self.model, self.layers, self.units is not None))

    def _repr_html_(self) -> str:
        return in_notebook(inventory_table(self.model, self.layers, self.units is not None))

    @property
    def layers(self) -> dict[str, Dendrites]:
        """The dendrites of each layer by the layer's name."""
        return {name: dendrites_of(layer) for name, layer in self._hosts.items()}

    @property
    def num_dendrites(self) -> int:
        """Dendrites per neuron, of the layers that have most."""
        return max(dendrites.count for dendrites in self.layers.values())

    @property
    def units(self) -> int | None:
        """Dendrites that neurons share; ``None`` where each has its own."""
        return None

    def looks_for(self, pool: int) -> str:
        """What it stands still for in a correlation phase, in words."""
        return f"candidates per neuron {pool}"

    def has(self) -> str:
        """What has grown, in words."""
        return f"dendrites per neuron {self.num_dendrites}"

    @property
    def candidates(self) -> dict[str, Candidates]:
        """The pools in training by the layer's name; empty outside a correlation phase."""
        return {name: d.candidates for name, d in self.layers.items() if d.candidates is not None}

    def leave_alone(self, names: Iterable[str], reason: str) -> None:
        """Let some of the target layers get no more dendrites.

        Args:
            names: of target layers; at least one must be left.
            reason: why.
        """
        for name in names:
            self.targets.remove(name)
            self.skipped[name] = reason
            self.left_alone.add(name)
            if not dendrites_of(self._hosts[name]).count:
                self._mirrored.leave_alone(self._hosts[name])
                take_off(self._hosts.pop(name))

    def watch_use(self) -> UsedLayers:
        """From now on note which of the target layers training uses."""
        return UsedLayers({name: self._hosts[name] for name in self.targets})

    def can_grow(self) -> list[str]:
        """Names of the target layers whose neurons are known: of a user's own module not before a forward pass.

        A layer whose neurons that pass could not tell is a target no longer, but left alone with the reason.
        """
        kinds = {name: dendrites_of(self._hosts[name]).kind for name in self.targets}
        unknown = {name: kind.unknown for name, kind in kinds.items() if kind.unknown is not None}
        self.skipped |= unknown
        self.targets = [name for name in self.targets if name not in unknown]
        return [name for name in self.targets if kinds[name].neurons is not None]

    def start_candidates(
        self,
        pool: int = 4,
        generator: torch.Generator | None = None,
        trainable: Sequence[str] | None = None,
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Give every target layer a pool and freeze the model, remembering every ``requires_grad`` flag.

        Args:
            pool: candidates per neuron.
            generator: a generator on the CPU for the initial weights; ``None``: PyTorch's default one.
            trainable: names of the parameters whose flag returns; ``None``: those that are trainable now.
            state: from :meth:`candidate_state`, to go on from.
            values: of the model by its names, where somebody keeps them: parameters that the model moves by itself are
                put back by :meth:`hold_still` too then.

        Raises:
            RuntimeError: if there are candidates already, or no forward pass has yet told any layer's neurons.
            ValueError: if ``pool`` is not a positive integer, or the state belongs to other layers or candidates.
        """
        if self._freeze is not None:
            raise RuntimeError("there are candidates already: integrate or discard them first")
        if pool < 1:
            raise ValueError(f"`pool` must be at least 1, got {pool}")
        if state is not None:
            self._check_state(state, pool)
        names = self.can_grow()
        if not names and not self.targets:
            raise RuntimeError(f"no layer can have dendrites: {self.skipped}")
        if not names:
            raise RuntimeError(f"the neurons of {self.targets} are not known before their first forward pass")
        for name in names:
            self._start(name, pool, generator)
        self._freeze = Freeze(self.model, trainable, values)
        if state is not None:
            try:
                self.load_candidate_state(state)
            except BaseException:
                self.discard()
                raise

    def _check_state(self, state: Mapping[str, Mapping[str, Tensor]], pool: int) -> None:
        told = {name: self._hosts[name] for name in self.targets if name in state or name in self.can_grow()}
        for name, neurons in check_candidates(told, pool, state).items():
            know_neurons(self._hosts[name], neurons)

    def _start(self, name: str, pool: int, generator: torch.Generator | None) -> None:
        layer = self._hosts[name]
        dendrites_of(layer).start(layer, pool, generator)

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that are trainable again when the candidates are gone."""
        return [] if self._freeze is None else self._freeze.trainable

    def trained_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """What a base phase trains of the dendrites, each with the weight of its layer.

        These are the output weights ``a``; of live dendrites ``V``, ``v`` and ``u`` too.
        """
        for name, dendrites in self.layers.items():
            own = self._own(name)
            for parameter in dendrites.trained_parameters():
                # By dimensions, not by name: a parametrized layer has its weight in parts, none of them called so.
                yield parameter, max(own, key=Tensor.dim, default=parameter)

    def own_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Of each target layer by name what is not its dendrites'."""
        return {name: self._own(name) for name in self.targets}

    def _own(self, name: str) -> list[nn.Parameter]:
        return [p for key, p in self._hosts[name].named_parameters() if not key.startswith("dendrites.")]

    def mirrored_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """The like of mirrors whose layers are trainable: an optimizer that holds such a layer is to hold them."""
        return self._mirrored.trained_parameters()

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """What dendrites have learned for good: ``V``, ``v`` and ``u`` of those that are not live."""
        for dendrites in self.layers.values():
            trained = {id(parameter) for parameter in dendrites.trained_parameters()}
            yield from (parameter for parameter in dendrites.parameters() if id(parameter) not in trained)

    def candidate_parameters(self) -> list[nn.Parameter]:
        """The parameters that a correlation phase trains, for an optimizer."""
        return [parameter for pool in self.candidates.values() for parameter in pool.parameters()]

    def keep_strongest(self) -> list[str]:
        """From now on let candidates see as many of their inputs as dendrites are to keep, the strongest ones.

        These have the largest weight times standard deviation. The candidates' parameters are others afterwards, and
        their statistics begin anew.

        Returns:
            Names of the layers whose candidates are sparse now; the others go on as they were.
        """
        names = []
        for name, pool in self.candidates.items():
            fan_in = self.layers[name].next.fan_in
            if fan_in is not None and pool.fan_in is None:
                pool.keep_strongest(self._hosts[name], fan_in)
                names.append(name)
        return names

    def correlations(self) -> dict[str, Tensor]:
        """Pearson correlation of every candidate with its neuron's error since the last reset.

        Returns:
            A tensor ``(P, C)`` for each layer name.
        """
        return {name: pool.correlation() for name, pool in self.candidates.items()}

    def reset_correlations(self) -> None:
        """Start a new epoch of correlations."""
        for pool in self.candidates.values():
            pool.reset()

    def correlation_rose(self, min_delta: float) -> bool:
        """Whether any neuron's best correlation rose by that share of what it was when it last did so."""
        return any([pool.rose(min_delta) for pool in self.candidates.values()])

    def scale_loss(self, scale: Tensor | None) -> None:
        """Say what the loss of the next backward pass is multiplied by; ``None``: by nothing.

        Statistics are those of the loss itself; gradients of candidates are as scaled as all others.
        """
        for pool in self.candidates.values():
            pool.loss_scale = scale

    def watch(self, parameters: Iterable[nn.Parameter] | None) -> None:
        """Let candidates see the error of the next backward pass only where that pass would train their layer.

        Where losses take turns, as in a GAN, a loss reaches layers that it does not train.

        Args:
            parameters: what the pass would train; ``None``: everything.
        """
        trained = None if parameters is None else {id(parameter) for parameter in parameters}
        for name, pool in self.candidates.items():
            pool.watching = trained is None or any(id(p) in trained for p in self._hosts[name].parameters())

    def missed_error(self) -> bool:
        """Whether any error since this was last asked was not finite: a loss scale is too large."""
        return any([pool.missed_error() for pool in self.candidates.values()])

    def layers_with_error(self) -> list[str]:
        """Names of the layers with candidates that had an error since the last reset; others are not used."""
        return [name for name, pool in self.candidates.items() if pool.saw_error()]

    def hold_still(self, compare: bool = False) -> None:
        """Put back what the model moved by itself since the candidates started: its buffers above all.

        Args:
            compare: look for changes that PyTorch does not count as well, which waits for the device.
        """
        if self._freeze is not None:
            self._freeze.hold(compare)

    def held(self) -> dict[str, Tensor]:
        """By name what :meth:`hold_still` would put back, where the values are wanted amid a batch."""
        return {} if self._freeze is None else self._freeze.held()

    def adopt(self) -> None:
        """Keep what the model changed since :meth:`hold_still`, and put that back from now on."""
        if self._freeze is not None:
            self._freeze.adopt()

    def listen(self, listening: bool, frozen: bool | None = None) -> None:
        """Say whether candidates learn from what the model does now. They do so from the start.

        Between a batch of training and the next they need not: a validation may take gradients, and flags of
        ``requires_grad`` are the user's then, to be read and changed.

        Args:
            listening: whether they learn.
            frozen: whether all parameters are frozen meanwhile; ``None``: while they learn.
        """
        for pool in self.candidates.values():
            pool.listening = listening
        if self._freeze is not None and (listening if frozen is None else frozen):
            self._freeze.freeze()
        elif self._freeze is not None:
            self._freeze.thaw()

    def thawed(self) -> AbstractContextManager[None]:
        """Within the block flags are the user's, for a model may save what it trains; not those of a sharded one."""
        return nullcontext() if self._freeze is None or is_sharded(self.model) else self._freeze.thawed()

    def integrate(self) -> dict[str, Tensor]:
        """The best candidate of each neuron becomes a dendrite; flags and buffers return.

        A layer that never had an error since the last reset (it is not used) gets none.

        Returns:
            For each layer that grew, the correlation ``(C,)`` of its neurons' best candidates.

        Raises:
            RuntimeError: if there are no candidates.
        """
        if self._freeze is None:
            raise RuntimeError("there are no candidates to integrate: call start_candidates first")
        self._release()
        taken = {}
        used = self.layers_with_error()
        for name in self.targets:
            if name not in used:
                why = "nothing of it reaches the loss" if self.layers[name].reached else "training does not call it"
                self.skipped[name] = f"it never had an error: {why}"
        some = self.share < 1
        chosen = choose_share({name: self._offer(name) for name in used}, self.share) if some else dict.fromkeys(used)
        for name, neurons in chosen.items():
            layer = self._hosts[name]
            taken[name] = dendrites_of(layer).integrate(layer, neurons)
        self._mirrored.follow()
        self.discard()
        return taken

    def _offer(self, name: str) -> Offer:
        dendrites, pool = self.layers[name], self.candidates[name]
        parameters = set_parameters(pool.kind, self._hosts[name], dendrites.count) / pool.links.shape[-1]
        worth, seen = (worth_of(pool.moments, inputs) for inputs in (round(parameters) - 1, 0))
        return Offer(worth, parameters, not pool.kind.choosable, seen)

    def grow(self, names: Iterable[str], generator: torch.Generator | None = None) -> None:
        """Give each neuron of some layers one more dendrite without any candidates, to learn with the network.

        Args:
            names: of target layers whose neurons are known.
            generator: a generator on the CPU for the initial weights; ``None``: PyTorch's default one.

        Example:
            >>> from pl_dendrites.core import attach
            >>> network = attach(nn.Linear(3, 2), live=True)
            >>> network.grow(network.can_grow())
            >>> network.model(torch.randn(8, 3)).square().mean().backward()
            >>> [name for name, p in network.model.named_parameters() if p.grad is not None]
            ['weight', 'bias', 'dendrites.0.weights.0', 'dendrites.0.nodes.weight', 'dendrites.0.nodes.bias']
        """
        for name in names:
            layer = self._hosts[name]
            dendrites_of(layer).grow(layer, generator)
        self._mirrored.follow()

    def discard(self) -> None:
        """The candidates go; flags and buffers return. Does nothing where there are none."""
        for dendrites in self.layers.values():
            dendrites.set_candidates(None)
        self._release()

    def _release(self) -> None:
        if self._freeze is not None:
            self._freeze.release()
            self._freeze = None

    def candidate_state(self, together: bool = False) -> dict[str, dict[str, Tensor]]:
        """Values and statistics of all candidates, copied, as a dict of plain tensors.

        Args:
            together: whether all processes call this; here they all have the same.
        """
        return {
            name: {key: value.detach().clone() for key, value in pool.state_dict().items()}
            for name, pool in self.candidates.items()
        }

    def load_candidate_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what :meth:`candidate_state` returned, into candidates that were started with the same pool.

        Args:
            state: from :meth:`candidate_state`.

        Raises:
            ValueError: if the layers differ, sparse candidates see inputs that there are not, or tensors claim more
                than they hold.
            RuntimeError: if shapes differ.
        """
        pools = self.candidates
        if set(pools) != set(state):
            raise ValueError(
                f"the saved candidates belong to other layers: saved {sorted(state)}, there are {sorted(pools)}"
            )
        check_claims(state, "they", "the state of the candidates")
        for name, pool in pools.items():
            inputs = state[name].get("nodes.inputs")
            if inputs is not None:
                self._take_inputs(name, pool, inputs)
            pool.load_state_dict(dict(state[name]))

    def _take_inputs(self, name: str, pool: Candidates, inputs: Tensor) -> None:
        layer = self._hosts[name]
        there = inputs_of(layer)
        if inputs.is_floating_point() or (inputs.numel() and (int(inputs.min()) < 0 or int(inputs.max()) >= there)):
            raise ValueError(f"the saved candidates of '{name}' see others than its {there} inputs")
        if pool.fan_in is None:
            pool.keep_strongest(layer, inputs.shape[-1] if inputs.ndim else 0)
