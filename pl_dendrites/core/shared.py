"""Shared dendrites around modules of a network, and how they grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.core.checks import check, check_at_least
from pl_dendrites.core.claims import check_claims
from pl_dendrites.core.cost import parameter_count
from pl_dendrites.core.fields.find import Found, find_units
from pl_dendrites.core.fields.gathered import Processes, as_one, deal, gather_samples, of_first
from pl_dendrites.core.fields.sample import ErrorSample, on_one_scale
from pl_dendrites.core.growth.error_watch import ErrorWatch
from pl_dendrites.core.growth.hooks import hang, hosts, know_neurons
from pl_dendrites.core.growth.shared_block import SharedBlock, SharedForm
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.kinds import weight_of
from pl_dendrites.core.mirrors import find_mirrors, named_mirrors
from pl_dendrites.core.moves import Moves
from pl_dendrites.core.targets import why_not_around
from pl_dendrites.core.unit_set import UnitSet
from pl_dendrites.core.watching import WatchingNetwork

__all__ = ["SharedNetwork", "attach_shared"]

_FIRST_UNITS = 16
# Of the seeds that say which samples two processes keep, one for each batch, 32 bits count.
_APART = 0x9E3779B1


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
        >>> from pl_dendrites.core import UnitSet
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


class SharedNetwork(WatchingNetwork[ErrorWatch]):
    """A model and the shared dendrites around some of its modules.

    They come in sets. For each the network stands still, as for private ones, while samples of inputs and errors are
    taken from training batches; :meth:`integrate` draws candidates from these, chooses among them and makes them a part
    of the network. While units learn live, :meth:`look` and :meth:`rewire` move their fields.

    Several processes, each with its part of every batch, find the same set in the samples of all, and move its fields
    alike. All must call ``layers_with_error``, :meth:`integrate` and :meth:`rewire` then.

    Args:
        model: the model.
        around: see :func:`attach_shared`.
        mirrors: see :class:`~pl_dendrites.DendriticNetwork`.
        processes: all of them; ``None``: this one is alone.

    Attributes:
        moves: moves fields.

    Raises:
        ValueError: if there is no such module, or it cannot have shared dendrites.
    """

    def __init__(
        self,
        model: nn.Module,
        around: Sequence[str] = ("",),
        mirrors: Mapping[str, str] | None = None,
        processes: Processes | None = None,
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
        self._join(processes)
        self.moves = Moves(lambda: self.blocks, self._processes)
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
            samples: of inputs and errors that a set is found from, of all processes together.

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

    def looks_for(self, pool: int) -> str:
        """See :meth:`pl_dendrites.DendriticNetwork.looks_for`."""
        return "samples of errors are taken"

    def has(self) -> str:
        """See :meth:`pl_dendrites.DendriticNetwork.has`."""
        return f"shared dendrites {self.units}, parameters {parameter_count(self.model)}"

    @property
    def blocks(self) -> list[tuple[str, SharedBlock]]:
        """All sets, each with the name of its module."""
        return [(name, block) for name, dendrites in self.layers.items() for block in dendrites.shared]

    # -- a set is found -----------------------------------------------------------------------------------------------

    def can_grow(self) -> list[str]:
        """Names of the modules whose outputs are known: not before a forward pass. Their neurons must come last."""
        names = super().can_grow()
        dims = {name: self.layers[name].kind.dim for name in names}
        wrong = {name: dim for name, dim in dims.items() if dim not in (-1, 0)}  # 0: it has not run yet
        reason = "its neurons lie along dimension {} of its output, and shared dendrites need them in the last"
        self.skipped |= {name: reason.format(dim) for name, dim in wrong.items()}
        self.targets = [name for name in self.targets if name not in wrong]
        return [name for name in names if name not in wrong]

    def tell_neurons(self, neurons: Mapping[str, int]) -> None:
        """Say how many outputs modules have, as a forward pass would.

        Args:
            neurons: by the names of modules; of those that dendrites do not hang around nothing is said.

        Example:
            >>> network = attach_shared(nn.Sequential(nn.Linear(9, 3)))
            >>> network.can_grow()
            []
            >>> network.tell_neurons({"": 3})
            >>> network.can_grow()
            ['']
        """
        for name in neurons.keys() & self._hosts.keys():
            know_neurons(self._hosts[name], neurons[name])

    def _check_state(self, state: Mapping[str, Mapping[str, Tensor]], pool: int) -> None:
        if not set(state) <= set(self.targets):
            raise ValueError(f"the saved samples are of {sorted(state)}, and there are {sorted(self.targets)}")
        check_claims(state, "the saved samples", "their state")
        for name, values in state.items():
            if isinstance(errors := values.get("errors"), Tensor) and errors.ndim:
                know_neurons(self._hosts[name], errors.shape[-1])

    def _start(self, name: str, pool: int, generator: torch.Generator | None) -> None:
        self._pool, self._seed = pool, 0 if generator is None else generator.initial_seed()
        rank, parts = self._processes.rank, self._processes.count
        share = -(-self._samples // parts)
        self.layers[name].set_watch(ErrorWatch(share, self._seed + rank * _APART, parts))

    def _gathered(self) -> dict[str, dict[str, Tensor]]:
        # Of all modules, whether or not this process' part of the batches ever reached one.
        watches = self._watches
        own = [watches[name].reservoir.samples if name in watches else {} for name in self._hosts]
        return dict(zip(self._hosts, gather_samples(own, self._processes, self._device), strict=True))

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
        samples = {name: _sample(as_one(parts, self._seed)) for name, parts in self._gathered().items() if parts}
        sizes = {name: (sample.inputs.shape[1], sample.errors.shape[1]) for name, sample in samples.items()}
        forms = {name: self._form(name, *size, len(samples)) for name, size in sizes.items()}
        worth = {}
        for name, sample in samples.items():
            self.moves.deviation[name] = of_first(sample.deviation * sample.varies, self._processes)
            if forms[name].units:
                worth[name] = self._add(name, sample, forms[name])
            else:
                self.skipped[name] = "the budget has no room for another unit"
        self._mirrored.follow()
        self.discard()
        return worth

    def next_at_most(self, name: str) -> SharedForm | None:
        """The largest set that may come next around a module; ``None``: before it ran nothing tells.

        Args:
            name: of the module.

        Example:
            >>> network = attach_shared(nn.Sequential(nn.Linear(9, 30), nn.ReLU(), nn.Linear(30, 20)))
            >>> network.next_at_most("").parameters == 16 * (32 + 1 + 16)
            True
        """
        wanted, kind = self._wanted, self.layers[name].kind
        inputs = kind.inputs or (wanted.field if isinstance(wanted.field, int) else None)
        outputs = kind.neurons or wanted.feeds
        return None if inputs is None or outputs is None else self._form(name, inputs, outputs, len(self.targets))

    def _form(self, name: str, inputs: int, outputs: int, modules: int) -> SharedForm:
        wanted, there = self._wanted, sum(block.form.units for block in self.layers[name].shared)
        form = wanted.unit(inputs, outputs)
        units = wanted.units or there or _FIRST_UNITS
        if wanted.units is None and self._max_parameters is not None:
            sets = max(self._sets - len(self.layers[name].shared), 1)
            left = self._max_parameters - parameter_count(self.model)
            units = max(left, 0) // (form.parameters * modules * (2**sets - 1))  # each set is twice the one before
        return replace(form, units=units)

    def _add(self, name: str, sample: ErrorSample, form: SharedForm) -> Tensor:
        found = find_units(
            sample,
            form.units,
            form.field,
            form.feeds or form.outputs,
            form.activation,
            pool=self._pool,
            seed=(self._seed + 1) % 2**63,
        )
        # Hardware that is not alike may choose otherwise between two that are.
        found = Found(*(of_first(part, self._processes) for part in found))
        know_neurons(self._hosts[name], form.outputs)
        block = self.layers[name].add(self._hosts[name], form)
        assert isinstance(block, SharedBlock)
        block.fill(found.field, found.weight, found.bias, found.feeds)
        return found.worth

    def candidate_state(self, together: bool = False) -> dict[str, dict[str, Tensor]]:
        """The samples so far, copied, as a dict of plain tensors.

        Args:
            together: whether all processes call this, and get the samples of all; if not, it is those of this one.
        """
        if not together:
            return {name: watch.reservoir.state_dict() for name, watch in self._watches.items()}
        gathered = self._gathered().items()
        return {name: {part: value.clone() for part, value in samples.items()} for name, samples in gathered if samples}

    def load_candidate_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what :meth:`candidate_state` returned. Each process goes on with its own, or a share of all.

        Raises:
            ValueError: if it is of other modules, or is none of these.
        """
        self._check_state(state, self._pool)
        for name, values in state.items():
            place, own = weight_of(self._hosts[name]).device, deal(values, self._processes, self._seed)
            here = {part: value.to(place) if part in ("inputs", "errors") else value for part, value in own.items()}
            self._watches[name].reservoir.load_state_dict(here)

    # -- fields move --------------------------------------------------------------------------------------------------

    def look(self, looking: bool = True) -> None:
        """From now on see what backward passes would move of what live units do not see yet; or no longer.

        Args:
            looking: whether to.
        """
        self.moves.look(looking)

    def rewire(self, share: float, optimizers: Iterable[Optimizer] = ()) -> None:
        """Let the weakest inputs of each field go for those that the backward passes since :meth:`look` ask for.

        Where any of these gradients is not finite, nothing moves.

        Args:
            share: of each field, at least one input; see ``turnover``.
            optimizers: what they remember of entries that are others now starts anew.

        Example:
            >>> from pl_dendrites.core import UnitSet
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
        self.moves.rewire(share, optimizers)
        self._mirrored.follow()


def _sample(samples: Mapping[str, Tensor]) -> ErrorSample:
    return ErrorSample(samples["inputs"], on_one_scale(samples["errors"], samples["batch"]))
