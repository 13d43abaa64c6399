"""Which form dendrites are to have, and where shared ones hang: what a model's first batch of training calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pl_dendrites.core.growth.hooks import attached_layers, dendrites_of, know_neurons
from pl_dendrites.core.growth.shared_block import features
from pl_dendrites.core.keys import plain_name
from pl_dendrites.core.kinds import Inputs
from pl_dendrites.core.network import DendriticNetwork
from pl_dendrites.core.soma import Soma
from pl_dendrites.core.targets import why_not_around
from pl_dendrites.training.trainer import is_compiled

__all__ = ["FirstCalls", "Form", "known_form"]

_CONNECTED = (nn.Linear, Soma, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.PReLU)


class Form(NamedTuple):
    """Which form dendrites have.

    Attributes:
        around: names of the modules that shared dendrites hang around; ``None``: dendrites are private.
        reason: why, in words.
    """

    around: list[str] | None
    reason: str


def known_form(model: nn.Module, sharded: bool = False) -> Form | None:
    """The form that can be told before a model trains; ``None``: what it calls must tell.

    Args:
        model: the model.
        sharded: whether its parameters are to be shared out to several processes, and nobody asks for shared dendrites.

    Example:
        >>> known_form(nn.Sequential(Soma(3, 2), nn.ReLU()))
        Form(around=['0'], reason='neuron bodies learn from shared dendrites alone')
    """
    layers = {plain_name(name): dendrites_of(layer) for name, layer in attached_layers(model)}
    shared, private = ([n for n, d in layers.items() if getattr(d, form)] for form in ("shared", "private"))
    bodies = [name for name, module in model.named_modules() if isinstance(module, Soma)]
    if shared:
        return Form(shared, "the model has shared dendrites")
    if private:
        return Form(None, "the model has private dendrites")
    if bodies:
        return Form(bodies, "neuron bodies learn from shared dendrites alone")
    reasons = {
        "nothing of the model is trainable, and it grows before its first batch": not any(
            parameter.requires_grad for parameter in model.parameters()
        ),
        "the model is sharded, and nobody asked for shared dendrites": sharded,
        "the model is compiled, and is not looked at when it runs": is_compiled(model),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return None if reason is None else Form(None, reason)


@dataclass
class _Call:
    name: str
    module: nn.Module
    inputs: int = 0  # numbers that it makes each of its outputs from; 0: these are no vector
    outputs: int = 0
    inner: list[_Call] = field(default_factory=list)


class FirstCalls:
    """Watches what a model calls, to find the one module that maps vectors of numbers to all outputs.

    Shared dendrites are worth their parameters around a network of fully connected layers. One that looks for patterns
    in places, in order or among tokens grows dendrites of its neurons' own.

    Args:
        model: the model. It is watched until :meth:`end`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> calls = FirstCalls(model)
        >>> _ = model(torch.randn(5, 3, 3))
        >>> calls.end()
        Form(around=[''], reason='the model itself maps 9 inputs to 3 outputs through fully connected layers')
        >>> FirstCalls(model).end()
        Form(around=None, reason='no one module maps its inputs to its outputs')
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = [_Call("", model)]
        self._hooks: list[Any] = []
        self._found: _Call | None = None
        for name, module in model.named_modules():
            if any(True for _ in module.parameters()) and not isinstance(module, torch.jit.ScriptModule):
                self._hooks.append(module.register_forward_pre_hook(self._begin(name)))
                self._hooks.append(module.register_forward_hook(self._end, with_kwargs=True))

    def _begin(self, name: str) -> Any:
        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen.append(_Call(name, module))

        return begin

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        places = [place for place, call in enumerate(self._seen) if place and call.module is module]
        if not places:  # called in another thread meanwhile
            return
        call = self._seen[places[-1]]
        del self._seen[places[-1] :]  # with calls in it that an exception ended
        call.inputs, call.outputs = _sizes(Inputs(args, kwargs), out)
        self._seen[-1].inner.append(call)

    def end(self) -> Form:
        """Watch no longer, and say what was found."""
        for hook in self._hooks:
            hook.remove()
        self._found, reason = _network(self._seen[0].inner)
        return Form(None if self._found is None else [self._found.name], reason)

    def tell_neurons(self, network: DendriticNetwork) -> None:
        """Tell a network that hangs around what was found how many neurons that has, as a forward pass would."""
        if self._found is not None:
            know_neurons(network.model.get_submodule(self._found.name), self._found.outputs)


def _sizes(inputs: Inputs, out: Any) -> tuple[int, int]:
    given = [value for value in (*inputs.args, *inputs.kwargs.values()) if isinstance(value, Tensor)]
    if len(given) != 1 or not isinstance(out, Tensor) or not out.is_floating_point() or not out.ndim:
        return 0, 0
    try:
        return features(inputs, out).shape[-1], out.shape[-1]
    except ValueError:
        return 0, 0


def _network(calls: list[_Call]) -> tuple[_Call | None, str]:
    names = dict.fromkeys(call.name for call in calls)
    if len(names) != 1:
        called = f": it calls {', '.join(map(repr, names))}" if names else ""
        return None, f"no one module maps its inputs to its outputs{called}"
    call = calls[0]
    if not call.inputs:  # a batch, a mask beside it, a loss: what does the work may be inside
        return _network([inner for call in calls for inner in call.inner])
    what = f"'{call.name}'" if call.name else "the model itself"
    other = next(_of_other_kinds(call.module), None)
    reason = f"it has a {other}" if other else why_not_around(call.module)
    if reason is None and not _sees_all(call):
        reason = f"no layer of it sees all {call.inputs} of its inputs"
    if reason is not None:
        return None, f"{what}: {reason}"
    maps = f"maps {call.inputs:,} inputs to {call.outputs:,} outputs through fully connected layers"
    return call, f"{what} {maps}"


def _of_other_kinds(module: nn.Module) -> Iterator[str]:
    for part in module.modules():
        own = part.parameters(recurse=False)
        if any(True for _ in own) and not isinstance(part, _CONNECTED):
            yield type(part).__name__


def _sees_all(call: _Call) -> bool:
    # Else the number of its inputs may differ from batch to batch, as of a mean over positions.
    return not call.inner or any(inner.inputs == call.inputs and _sees_all(inner) for inner in call.inner)
