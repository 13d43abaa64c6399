"""Shared dendrites around modules of a network: how they grow, and how their fields move while they learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.checks import check, check_at_least, check_one_of
from pl_dendrites.core.fields.choose import choose_units
from pl_dendrites.core.fields.draw import along_errors, clustered, drawn_weights
from pl_dendrites.core.fields.product import field_product
from pl_dendrites.core.fields.rewire import Gains, forget
from pl_dendrites.core.fields.sample import ErrorSample
from pl_dendrites.core.growth.dendrites import Dendrites
from pl_dendrites.core.growth.error_watch import ErrorWatch
from pl_dendrites.core.growth.freeze import Freeze
from pl_dendrites.core.growth.hooks import dendrites_of, hang, know_neurons
from pl_dendrites.core.growth.shared_block import SharedBlock, SharedForm
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.structure import grow_on_load
from pl_dendrites.core.targets import why_not_around

__all__ = ["SharedGrowth", "UnitSet", "attach_shared"]


@dataclass(frozen=True)
class UnitSet:
    """What a set of shared dendrites to come is like.

    Attributes:
        units: how many.
        field: inputs that each sees; all, where there are no more.
        pool: candidates for each; those that together take most from the error become dendrites.
        clustered: share of the candidates whose field is an input and those that vary with it; that of the others are
            the inputs that correlate most with a direction of the error.
        feeds: outputs that each feeds; ``None``: all.
        activation: ``"tanh"``, ``"sigmoid"``, ``"relu"`` or ``"gelu"``.
        live: whether they go on learning with the network, by gradient; if not, their output weights alone do.

    Raises:
        ValueError: if one of them is not possible.
    """

    units: int
    field: int
    pool: int = 8
    clustered: float = 1.0
    feeds: int | None = None
    activation: str = "gelu"
    live: bool = True

    def __post_init__(self) -> None:
        for name in ("units", "field", "pool"):
            check_at_least(name, getattr(self, name), 1)
        if self.feeds is not None:
            check_at_least("feeds", self.feeds, 1)
        number = isinstance(self.clustered, int | float) and not isinstance(self.clustered, bool)
        check("clustered", number and 0 <= self.clustered <= 1, "a share from 0 to 1", self.clustered)
        check_one_of("activation", self.activation, ACTIVATIONS)


def attach_shared(model: nn.Module, around: Sequence[str] = ("",)) -> SharedGrowth:
    """Prepare a model for shared dendrites. Its outputs, type and state_dict keys do not change.

    Args:
        model: any module.
        around: names of the modules that they hang around; an empty name is the model itself. Each maps ``(..., n)`` to
            ``(..., C)``, or examples of any shape to a vector each.

    Returns:
        The object that grows them.

    Raises:
        ValueError: if there is no such module, or it cannot have any.

    Example:
        >>> model = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> growth = attach_shared(model)
        >>> growth.start(samples=64)
        >>> model(torch.randn(32, 9)).square().sum().backward()
        >>> worth = growth.integrate(UnitSet(units=5, field=2))
        >>> [(name, tuple(value.shape)) for name, value in model.state_dict().items() if "dendrites" in name][:2]
        [('dendrites.0.weight', (5, 2)), ('dendrites.0.bias', (5,))]
    """
    return SharedGrowth(model, around)


class SharedGrowth:
    """Shared dendrites around some modules of a network.

    They come in sets. For each the network stands still (:meth:`start`) while samples of inputs and errors are taken
    from ordinary training batches; :meth:`integrate` then draws fields from them, chooses units and makes these a part
    of the network. They start without effect. While they learn live, :meth:`look` and :meth:`rewire` move their fields.

    Args:
        model: the model.
        around: see :func:`attach_shared`.

    Attributes:
        model: the model.
        around: names of the modules.
        deviation: of the inputs of each module, shape ``(n,)``, as the last samples had it; 0 where one does not vary.

    Raises:
        ValueError: if there is no such module, or it cannot have shared dendrites.
    """

    def __init__(self, model: nn.Module, around: Sequence[str] = ("",)) -> None:
        modules = {plain_name(name): module for name, module in model.named_modules()}
        for name in around:
            check("around", name in modules, f"names of modules, some of {sorted(modules)}", name)
            reason = why_not_around(modules[name])
            if reason is not None:
                raise ValueError(f"`around`: no shared dendrites can hang around '{name}': {reason}")
        self.model, self.around = model, list(around)
        self._hosts = {name: modules[name] for name in around}
        for module in self._hosts.values():
            if "dendrites" not in module._modules:
                hang(module)
        self.deviation: dict[str, Tensor] = {}
        self._freeze: Freeze | None = None
        grow_on_load(model)

    @property
    def layers(self) -> dict[str, Dendrites]:
        """The dendrites of each module by its name."""
        return {name: dendrites_of(module) for name, module in self._hosts.items()}

    def blocks(self) -> list[tuple[str, SharedBlock]]:
        """All sets of shared dendrites, each with the name of its module."""
        return [(name, block) for name, dendrites in self.layers.items() for block in dendrites.shared]

    # -- a set is found -----------------------------------------------------------------------------------------------

    def start(
        self,
        samples: int = 4096,
        generator: torch.Generator | None = None,
        trainable: Sequence[str] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Freeze the model, remembering every ``requires_grad`` flag, and take samples from what it trains on.

        Args:
            samples: most of them; a random part of those that come.
            generator: a generator on the CPU that decides which; ``None``: a new one with seed 0.
            trainable: names of the parameters whose flag returns; ``None``: those that are trainable now.
            values: of the model by its names, where somebody keeps them: see :meth:`hold_still`.

        Raises:
            RuntimeError: if samples are being taken already.
            ValueError: if ``samples`` is not at least 2.
        """
        if self._freeze is not None:
            raise RuntimeError("samples are being taken already: integrate or discard first")
        check_at_least("samples", samples, 2)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        for dendrites in self.layers.values():
            dendrites.set_watch(ErrorWatch(samples, generator))
        self._freeze = Freeze(self.model, trainable, values)

    def integrate(self, wanted: UnitSet, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Find a set of units for each module from its samples and make it a part of the network; flags return.

        Output weights start at zero: the network's output does not change.

        Args:
            wanted: what the set is like.
            generator: a generator on the CPU; ``None``: a new one with seed 0.

        Returns:
            For each module that has an error what each unit takes of it, as a share of its square, in the order of the
            units; where more were wanted than take anything, 0.

        Raises:
            RuntimeError: if no samples are being taken.
        """
        if self._freeze is None:
            raise RuntimeError("there are no samples: call start first")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._freeze.release()
        worth = {}
        for name, module in self._hosts.items():
            watch = dendrites_of(module).watch
            if watch is not None and watch.reservoir.seen:
                worth[name] = self._add_units(name, module, ErrorSample(*watch.reservoir.rows()), wanted, generator)
        self.discard()
        return worth

    @torch.no_grad()
    def _add_units(
        self, name: str, module: nn.Module, sample: ErrorSample, wanted: UnitSet, generator: torch.Generator
    ) -> Tensor:
        self.deviation[name] = sample.deviation * sample.varies
        (_, inputs), (_, outputs) = sample.inputs.shape, sample.errors.shape
        size, feeds = min(wanted.field, inputs), min(wanted.feeds or outputs, outputs)
        form = SharedForm(
            wanted.units, inputs, outputs, size, feeds if feeds < outputs else None, wanted.activation, wanted.live
        )
        candidates = wanted.units * wanted.pool
        alike = round(candidates * wanted.clustered)
        draws = [(clustered, alike), (along_errors, candidates - alike)]
        field = torch.cat([draw(sample, count, size, generator) for draw, count in draws if count])
        weight, bias = (drawn.to(sample.inputs) for drawn in drawn_weights(candidates, size, generator))
        units = ACTIVATIONS[wanted.activation](field_product(sample.inputs, field, weight, bias))
        chosen, worth = choose_units(units, sample.errors, wanted.units)
        rest = torch.ones(candidates, dtype=torch.bool, device=chosen.device)
        rest[chosen] = False
        chosen = torch.cat([chosen, rest.nonzero()[:, 0]])[: wanted.units]
        towards = (sample.errors.T @ units[:, chosen]).T.abs().topk(feeds, 1).indices
        know_neurons(module, outputs)
        block = dendrites_of(module).add_shared(module, form)
        block.fill(field[chosen], weight[chosen], bias[chosen], towards)
        return torch.cat([worth, worth.new_zeros(wanted.units - len(worth))])

    def discard(self) -> None:
        """The samples go; flags and buffers return. Does nothing where there are none."""
        for dendrites in self.layers.values():
            dendrites.set_watch(None)
        if self._freeze is not None:
            self._freeze.release()
            self._freeze = None

    # -- fields move --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """From now on see what the next backward passes would move of what live units do not see yet."""
        for name, block in self.blocks():
            block.gains = Gains() if block.live and name in self.deviation else None

    def rewire(self, share: float, optimizers: Iterable[Optimizer] = ()) -> None:
        """Let the weakest inputs of each field go for those that the backward passes since :meth:`look` ask for.

        Args:
            share: of each field, at least one input; see :func:`~pl_dendrites.core.fields.rewire.turnover`.
            optimizers: what they remember of entries that are others now starts anew.

        Example:
            >>> model = nn.Linear(9, 3)
            >>> growth = attach_shared(model)
            >>> growth.start()
            >>> x, y = torch.randn(32, 9), torch.randint(3, (32,))
            >>> nn.functional.cross_entropy(model(x), y).backward()
            >>> _ = growth.integrate(UnitSet(units=4, field=2))
            >>> _ = nn.init.ones_(model.dendrites[0].out)
            >>> before = model.dendrites[0].field.clone()
            >>> growth.look()
            >>> (nn.functional.cross_entropy(model(x), y)).backward()
            >>> growth.rewire(share=0.5)
            >>> (model.dendrites[0].field != before).sum(1).tolist()
            [1, 1, 1, 1]
        """
        optimizers = list(optimizers)
        for name, block in self.blocks():
            gains, block.gains = block.gains, None
            if gains is None:
                continue
            for parameter, moved in block.rewire(gains, share, self.deviation[name]).items():
                for optimizer in optimizers:
                    forget(optimizer, parameter, moved)
