"""Layers of a user's own that are derived from PyTorch's and compute in another way: their dendrites are copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pl_dendrites.core.kinds.base import Inputs, Overridden, plain_kind, register
from pl_dendrites.core.kinds.whole_module import WholeModule, bare
from pl_dendrites.core.tensors import map_tensors

__all__ = ["OwnLayer"]


@register(Overridden)
class OwnLayer(WholeModule):
    """A layer that pads its input, crops, transposes, computes its weight from another, or returns a tuple.

    Where its neurons lie is tried out when it first runs: in a copy with random numbers for its input, the weights of
    the first neuron are changed, and the output changes in one place along one dimension. Equal sizes mislead nobody.
    Where that tells nothing, the layer has no dendrites, unless its attribute ``neuron_dim`` says what is to be known.

    Args:
        layer: the layer; it is read, not kept.

    Example:
        >>> class Causal(nn.Conv1d):
        ...     def forward(self, x):
        ...         return super().forward(nn.functional.pad(x, (2, 0)))
        >>> layer, x = Causal(4, 4, 3), torch.randn(4, 4, 4)
        >>> kind = OwnLayer(layer)
        >>> kind.meet(layer, Inputs((x,), {}), layer(x))
        >>> kind.neurons, kind.dim
        (4, -2)
    """

    def meet(self, layer: nn.Module, inputs: Inputs, out: Any) -> None:
        """See :meth:`LayerKind.meet`."""
        if self._wanted_dim is not None or self.unknown is not None:
            return
        find = torch.compiler.disable(self._find) if torch.compiler.is_compiling() else self._find
        find(layer, inputs, out)

    def _find(self, layer: nn.Module, inputs: Inputs, out: Any) -> None:
        try:
            tensor = self._pick(out)
            dim = self._try_out(layer, inputs)
        except Exception as error:  # whatever it is, the call itself went well
            self.unknown = f"its neurons cannot be told: {error}"
            return
        if dim is None:
            self.unknown = (
                "its neurons cannot be told from its output: say by an attribute `neuron_dim` which dimension they are"
            )
        else:
            self.dim, self.neurons = dim, self.neurons or tensor.shape[dim]

    @torch.no_grad()
    def _try_out(self, layer: nn.Module, inputs: Inputs) -> int | None:
        plain = plain_kind(layer)
        twin = copy.deepcopy(bare(layer)).eval()
        weights = plain.first_neuron(twin)
        if weights is None:  # a recurrent layer, whose neurons reach each other
            out = self._pick(twin(*inputs.args, **inputs.kwargs))
            return -1 if out.ndim == 2 else None  # noqa: PLR2004 - (samples, neurons)
        for parameter in twin.parameters():
            parameter.copy_(_noise(parameter))
        args, kwargs = map_tensors(_noise, tuple(inputs))
        outputs = []
        # What is random in it is so alike twice, and the user's own random numbers go on as they would have.
        devices = [weights.device] if weights.device.type == "cuda" else []
        for _ in range(2):
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                outputs.append(self._pick(twin(*map_tensors(Tensor.clone, args), **map_tensors(Tensor.clone, kwargs))))
            weights.copy_(-weights)
        change = (outputs[1] - outputs[0]).abs()
        changed = change > 1e-3 * change.max()
        found = [dim for dim in range(-changed.ndim, 0) if changed.shape[dim] > 1 and _places(changed, dim) == 1]
        if not found and plain.neurons == 1 and changed.any():  # one neuron: any dimension of one will do
            found = [dim for dim in (plain.dim,) if -dim <= changed.ndim and changed.shape[dim] == 1]
        return found[0] if len(found) == 1 else None


def _places(changed: Tensor, dim: int) -> int:
    others = [d for d in range(-changed.ndim, 0) if d != dim]
    return int((changed.any(others) if others else changed).sum()) if changed.any() else 0


def _noise(values: Tensor) -> Tensor:
    # Not drawn: nothing here may depend on random numbers, or use them up.
    if not values.is_floating_point():
        return values
    steps = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float64)
    return (steps * 12.9898).sin().mul(43758.5453).frac().view(values.shape).to(values.dtype)
