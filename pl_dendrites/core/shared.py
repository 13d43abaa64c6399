"""Shared dendrites around modules of a network: how they grow, and how their fields move while they learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.checks import check, check_at_least
from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.fields.choose import choose_units
from pl_dendrites.core.fields.draw import along_errors, clustered, drawn_weights
from pl_dendrites.core.fields.product import field_product
from pl_dendrites.core.fields.rewire import Gains, forget
from pl_dendrites.core.fields.sample import ErrorSample
from pl_dendrites.core.growth.block import check_form
from pl_dendrites.core.growth.error_watch import ErrorWatch
from pl_dendrites.core.growth.hooks import hang, know_neurons
from pl_dendrites.core.growth.shared_block import SharedBlock, SharedForm
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.kinds import weight_of
from pl_dendrites.core.mirrors import find_mirrors, named_mirrors
from pl_dendrites.core.network import DendriticNetwork, hosts
from pl_dendrites.core.targets import why_not_around

__all__ = ["SharedNetwork", "UnitSet", "attach_shared"]

_FIRST_UNITS = 16
# A choice keeps the outputs of all candidates, and looks at each as often as it takes one.
_MOST_CANDIDATES = 4096
_AT_ONCE = 256


@dataclass(frozen=True)
class UnitSet:
    """What a set of shared dendrites to come is like.

    Attributes:
        units: how many; ``None``: what :meth:`SharedNetwork.set_next` says of parameters.
        field: inputs that each sees, a number or a share; all, where there are no more.
        clustered: share of the candidates whose field is an input and those that vary with it; that of the others are
            the inputs that correlate most with a direction of the error.
        feeds: outputs that each feeds; ``None``: all.
        activation: a name in :data:`~pl_dendrites.core.activations.ACTIVATIONS`.
        live: whether they go on learning with the network, by gradient; if not, their output weights alone do.

    Raises:
        ValueError: if one of them is not possible.
    """

    units: int | None = None
    field: int | float = 32
    clustered: float = 1.0
    feeds: int | None = None
    activation: str = "sharp_gelu"
    live: bool = True

    def __post_init__(self) -> None:
        check_form(self.activation, self.field)
        for name in ("units", "feeds"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        number = isinstance(self.clustered, int | float) and not isinstance(self.clustered, bool)
        check("clustered", number and 0 <= self.clustered <= 1, "a share from 0 to 1", self.clustered)


def attach_shared(model: nn.Module, around: Sequence[str] = ("",)) -> SharedNetwork:
    """Prepare a model for shared dendrites. Its outputs, type and state_dict keys do not change.

    Args:
        model: any module. Shared dendrites that it has already are taken over.
        around: names of the modules that they hang around; an empty name is the model itself. Each maps ``(..., n)`` to
            ``(..., C)``, or examples of any shape to a vector each.

    Returns:
        The object that grows them.

    Raises:
        ValueError: if there is no such module, or it cannot have any.

    Example:
        >>> model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> network = attach_shared(model)
        >>> x = torch.randn(32, 9)
        >>> _ = model(x)  # a first forward pass tells how many outputs there are
        >>> network.set_next(UnitSet(units=5, field=2))
        >>> network.start_candidates()
        >>> model(x).square().sum().backward()
        >>> worth = network.integrate()
        >>> [(name, tuple(value.shape)) for name, value in model.state_dict().items() if "dendrites" in name][:2]
        [('dendrites.0.weight', (5, 2)), ('dendrites.0.bias', (5,))]
    """
    return SharedNetwork(model, around)


class SharedNetwork(DendriticNetwork):
    """A model and the shared dendrites around some of its modules.

    They come in sets. For each the network stands still, as for private ones, while samples of inputs and errors are
    taken from training batches; :meth:`integrate` draws candidates from these, chooses among them and makes them a part
    of the network. While units learn live, :meth:`look` and :meth:`rewire` move their fields.

    Args:
        model: the model.
        around: see :func:`attach_shared`.
        mirrors: see :class:`~pl_dendrites.core.DendriticNetwork`.

    Attributes:
        deviation: of the inputs of each module, shape ``(n,)``, as the last samples had it; 0 where one does not vary.

    Raises:
        ValueError: if there is no such module, or it cannot have shared dendrites.
    """

    def __init__(
        self, model: nn.Module, around: Sequence[str] = ("",), mirrors: Mapping[str, str] | None = None
    ) -> None:
        modules = {plain_name(name): module for name, module in model.named_modules()}
        for name in around:
            check("around", name in modules, f"names of modules, some of {sorted(modules)}", name)
            reason = why_not_around(modules[name])
            if reason is not None:
                raise ValueError(f"`around`: no shared dendrites can hang around '{name}': {reason}")
        self.mirrors = find_mirrors(model, around) if mirrors is None else named_mirrors(model, mirrors)
        for name in around:
            if "dendrites" not in modules[name]._modules:
                hang(modules[name])
        self.model, self.targets, self.left_alone = model, list(around), set()
        self.skipped, self.share = {}, 1.0
        self._hosts = {name: module for name, module in hosts(model).items() if name in self.targets}
        self._begin()
        self.deviation: dict[str, Tensor] = {}
        self._wanted, self._pool, self._seed = UnitSet(), 1, 0
        self._max_parameters: int | None = None
        self._sets, self._samples = 1, 4096

    def set_next(  # type: ignore[override]
        self,
        wanted: UnitSet | None = None,
        *,
        max_parameters: int | float | None = None,
        sets: int = 1,
        samples: int = 4096,
    ) -> None:
        """Say what sets to come are like.

        Args:
            wanted: what they are like.
            max_parameters: where the set itself does not say how many units it has: most parameters of the model, its
                own included, or as many times its own. Without, the first set has 16 units, and each later one as many
                as there are.
            sets: how many sets share these parameters, each of which is twice the one before; those that are there
                included.
            samples: of inputs and errors that a set is found from.

        Raises:
            ValueError: if one of them is not possible, or the parameters are no more than the model has.
        """
        for name, value in (("sets", sets), ("samples", samples)):
            check_at_least(name, value, 1)
        most: int | float | None = max_parameters
        if most is not None:
            own = parameter_count(self.model) - sum(parameter_count(block) for _, block in self.blocks)
            most = round(most * own) if isinstance(most, float) else most
            check("max_parameters", most > own, f"more than the {own} parameters that the model has", max_parameters)
        self._wanted, self._max_parameters = wanted or UnitSet(), most
        self._sets, self._samples = sets, samples

    @property
    def num_dendrites(self) -> int:
        """Sets of shared dendrites, around the module that has most."""
        return max(len(dendrites.shared) for dendrites in self.layers.values())

    @property
    def units(self) -> int:
        """Units of all sets."""
        return sum(block.form.units for _, block in self.blocks)

    @property
    def blocks(self) -> list[tuple[str, SharedBlock]]:
        """All sets, each with the name of its module."""
        return [(name, block) for name, dendrites in self.layers.items() for block in dendrites.shared]

    # -- a set is found -----------------------------------------------------------------------------------------------

    def can_grow(self) -> list[str]:
        """Names of the modules whose outputs are known: not before a forward pass. Their neurons must come last."""
        names = super().can_grow()
        wrong = {name: self.layers[name].kind.dim for name in names if self.layers[name].kind.dim != -1}
        reason = "its neurons lie along dimension {} of its output, and shared dendrites need them in the last"
        self.skipped |= {name: reason.format(dim) for name, dim in wrong.items()}
        self.targets = [name for name in self.targets if name not in wrong]
        return [name for name in names if name not in wrong]

    @property
    def _watches(self) -> dict[str, ErrorWatch]:
        return {name: d.watch for name, d in self.layers.items() if d.watch is not None}

    def _check_state(self, state: Mapping[str, Mapping[str, Tensor]], pool: int) -> None:
        if not set(state) <= set(self.targets):
            raise ValueError(f"the saved samples are of {sorted(state)}, and there are {sorted(self.targets)}")
        check_claims(state, "the saved samples", "their state")
        for name, values in state.items():
            if isinstance(errors := values.get("errors"), Tensor) and errors.ndim:
                know_neurons(self._hosts[name], errors.shape[-1])

    def _start(self, name: str, pool: int, generator: torch.Generator | None) -> None:
        self._pool, self._seed = pool, 0 if generator is None else generator.initial_seed()
        self.layers[name].set_watch(ErrorWatch(self._samples, self._seed))

    def scale_loss(self, scale: Tensor | None) -> None:
        """See :meth:`DendriticNetwork.scale_loss`."""
        for watch in self._watches.values():
            watch.loss_scale = scale

    def watch(self, parameters: Iterable[nn.Parameter] | None) -> None:
        """See :meth:`DendriticNetwork.watch`."""
        trained = None if parameters is None else {id(parameter) for parameter in parameters}
        for name, watch in self._watches.items():
            watch.watching = trained is None or any(id(p) in trained for p in self._hosts[name].parameters())

    def listen(self, listening: bool, frozen: bool | None = None) -> None:
        """See :meth:`DendriticNetwork.listen`."""
        for watch in self._watches.values():
            watch.listening = listening
        super().listen(listening, frozen)

    def layers_with_error(self) -> list[str]:
        """Names of the modules that an error was seen of."""
        return [name for name, watch in self._watches.items() if watch.reservoir.seen]

    def integrate(self) -> dict[str, Tensor]:
        """Find a set for each module from its samples and make it a part of the network; flags and buffers return.

        Output weights start at zero, so that the network's output does not change.

        Returns:
            For each module that has an error what each unit takes of it, as a share of its square, in the order of the
            units; where more were wanted than take anything, or than there can be a choice among (4,096), 0.

        Raises:
            RuntimeError: if no samples are being taken.
        """
        if self._freeze is None:
            raise RuntimeError("there are no samples to find a set in: call start_candidates first")
        self._release()
        worth = {}
        samples = {name: ErrorSample(*self._watches[name].reservoir.rows()) for name in self.layers_with_error()}
        forms = {name: self._form(name, sample) for name, sample in samples.items()}
        for name, sample in samples.items():
            self.deviation[name] = sample.deviation * sample.varies
            if forms[name].units:
                worth[name] = self._add(name, sample, forms[name])
            else:
                self.skipped[name] = "the budget has no room for another unit"
        self._mirrored.follow()
        self.discard()
        return worth

    def _form(self, name: str, sample: ErrorSample) -> SharedForm:
        wanted, inputs, outputs = self._wanted, sample.inputs.shape[1], sample.errors.shape[1]
        feeds = None if wanted.feeds is None or wanted.feeds >= outputs else wanted.feeds
        size = wanted.field if isinstance(wanted.field, int) else max(1, round(wanted.field * inputs))
        field, there = min(size, inputs), sum(block.form.units for block in self.layers[name].shared)
        form = SharedForm(1, inputs, outputs, field, feeds, wanted.activation, wanted.live)
        units = wanted.units or there or _FIRST_UNITS
        if wanted.units is None and self._max_parameters is not None:
            modules, sets = len(self.layers_with_error()), max(self._sets - len(self.layers[name].shared), 1)
            left = self._max_parameters - parameter_count(self.model)
            units = max(left, 0) // (form.parameters * modules * (2**sets - 1))  # each set is twice the one before
        return replace(form, units=units)

    @torch.no_grad()
    def _add(self, name: str, sample: ErrorSample, form: SharedForm) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed + 1) % 2**63)
        candidates = max(form.units, min(form.units * self._pool, _MOST_CANDIDATES))
        alike = round(candidates * self._wanted.clustered)
        draws = [(clustered, alike), (along_errors, candidates - alike)]
        field = torch.cat([draw(sample, count, form.field, generator) for draw, count in draws if count])
        weight, bias = (drawn.to(sample.inputs) for drawn in drawn_weights(candidates, form.field, generator))
        potentials = [
            field_product(sample.inputs, *some)  # some at a time: inputs may be fetched for each
            for some in zip(*(tensor.split(_AT_ONCE) for tensor in (field, weight, bias)), strict=True)
        ]
        units = ACTIVATIONS[form.activation](torch.cat(potentials, 1))
        chosen, worth = choose_units(units, sample.errors, form.units if candidates <= _MOST_CANDIDATES else 0)
        rest = torch.ones(candidates, dtype=torch.bool, device=chosen.device)
        rest[chosen] = False
        chosen = torch.cat([chosen, rest.nonzero()[:, 0]])[: form.units]
        towards = (sample.errors.T @ units[:, chosen]).T.abs().topk(form.feeds or form.outputs, 1).indices
        block = self.layers[name].add_shared(self._hosts[name], form)
        block.fill(field[chosen], weight[chosen], bias[chosen], towards)
        return torch.cat([worth, worth.new_zeros(form.units - len(worth))])

    def discard(self) -> None:
        """The samples go; flags and buffers return. Does nothing where there are none."""
        for dendrites in self.layers.values():
            dendrites.set_watch(None)
        super().discard()

    def candidate_state(self) -> dict[str, dict[str, Tensor]]:
        """The samples so far, copied, as a dict of plain tensors."""
        return {name: watch.reservoir.state_dict() for name, watch in self._watches.items()}

    def load_candidate_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what :meth:`candidate_state` returned.

        Raises:
            ValueError: if it is of other modules, or is none of these.
        """
        self._check_state(state, self._pool)
        for name, values in state.items():
            place = weight_of(self._hosts[name]).device
            here = {part: value if part in ("batch", "seen") else value.to(place) for part, value in values.items()}
            self._watches[name].reservoir.load_state_dict(here)

    # -- fields move --------------------------------------------------------------------------------------------------

    def look(self, looking: bool = True) -> None:
        """From now on see what backward passes would move of what live units do not see yet; or no longer.

        Args:
            looking: whether to.
        """
        for name, block in self.blocks:
            form, field = block.form, block.field
            looks = looking and block.live and name in self.deviation
            block.gains = Gains(form.units, form.inputs, form.outputs, field.device) if looks else None

    def _gains(self) -> list[Tensor]:
        return [
            gain
            for _, block in self.blocks
            if block.gains is not None
            for gain in (block.gains.field, block.gains.feeds)
        ]

    def rewire(self, share: float, optimizers: Iterable[Optimizer] = ()) -> None:
        """Let the weakest inputs of each field go for those that the backward passes since :meth:`look` ask for.

        Where any of these gradients is not finite, nothing moves.

        Args:
            share: of each field, at least one input; see :func:`~pl_dendrites.core.fields.rewire.turnover`.
            optimizers: what they remember of entries that are others now starts anew.

        Example:
            >>> model = nn.Linear(9, 3)
            >>> network = attach_shared(model)
            >>> network.set_next(UnitSet(units=4, field=2))
            >>> network.start_candidates()
            >>> x, y = torch.randn(32, 9), torch.randint(3, (32,))
            >>> nn.functional.cross_entropy(model(x), y).backward()
            >>> _ = network.integrate()
            >>> _ = nn.init.ones_(model.dendrites[0].out)
            >>> before = model.dendrites[0].field.clone()
            >>> network.look()
            >>> nn.functional.cross_entropy(model(x), y).backward()
            >>> network.rewire(share=0.5)
            >>> (model.dendrites[0].field != before).sum(1).tolist()
            [1, 1, 1, 1]
        """
        optimizers, finite = list(optimizers), all(bool(gain.isfinite().all()) for gain in self._gains())
        for name, block in self.blocks:
            gains, block.gains = block.gains, None
            if gains is None or not finite:
                continue
            for parameter, moved in block.rewire(gains, share, self.deviation[name]).items():
                for optimizer in optimizers:
                    forget(optimizer, parameter, moved)
        self._mirrored.follow()

    def rewiring_state(self) -> dict[str, Any]:
        """What :meth:`look` and :meth:`rewire` know, as plain tensors."""
        return {
            "deviation": {name: value.clone() for name, value in self.deviation.items()},
            "gains": [g.clone() for g in self._gains()],
        }

    def load_rewiring_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`rewiring_state`.

        Raises:
            ValueError: if it is of another network.
        """
        check_claims(state, "what moves fields", "its state")
        for name, value in state["deviation"].items():
            inputs = {block.form.inputs for own, block in self.blocks if own == name}
            if inputs and inputs != {value.numel()}:
                raise ValueError(f"fields of '{name}' have {inputs} inputs, and what moves them knows {value.numel()}")
        there = {name: block.field.device for name, block in self.blocks}
        self.deviation = {name: value.to(there.get(name, value.device)) for name, value in state["deviation"].items()}
        if state["gains"]:
            self.look()
            for own, saved in zip(self._gains(), state["gains"], strict=True):
                own.copy_(saved)
