"""A network that stands still while its candidates learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["Freeze"]


class Freeze:
    """Freezes every parameter of a model, and keeps what has to come back.

    A frozen BatchNorm in training mode goes on updating its running statistics, and other layers have buffers that move
    with each forward pass too; a model may also move parameters itself, an average of its own weights for one. So
    values are kept, and :meth:`hold` puts them back.

    Args:
        model: the model to freeze; its gradients are dropped, for an old one would go on moving weights by momentum.
        trainable: names of the parameters that are trainable; ``None``: those that are so now.
        values: of the model's parameters and buffers by their names, where somebody keeps them anyway. Buffers that are
            not among them are copied; parameters that are not are taken to stand still by themselves.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> freeze = Freeze(model)
        >>> _ = model(torch.randn(8, 2))
        >>> freeze.release()
        >>> model[0].weight.requires_grad, model[1].running_mean.tolist()
        (True, [0.0, 0.0])
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Iterable[str] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._thawed, self._times_held = model, True, 0
        self._frozen: list[tuple[str, nn.Parameter]] = []
        if trainable is not None:
            names = set(trainable)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
        self.freeze()
        self._held = list(_held(model, values or {}))

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that are trainable but for this."""
        if self._thawed:
            return [name for name, parameter in self._model.named_parameters() if parameter.requires_grad]
        return [name for name, _ in self._frozen]

    def freeze(self) -> None:
        """Freeze what is trainable now."""
        if self._thawed:
            self._thawed = False
            self._frozen = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
            for _, parameter in self._frozen:
                parameter.requires_grad_(False)
            for parameter in self._model.parameters():
                parameter.grad = None

    def thaw(self) -> None:
        """Let flags be the user's again, who may read and change them, until :meth:`freeze` reads them anew."""
        if not self._thawed:
            self._thawed = True
            for _, parameter in self._frozen:
                parameter.requires_grad_(True)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Within the block flags are the user's, whatever they are around it."""
        frozen = not self._thawed
        self.thaw()
        try:
            yield
        finally:
            if frozen:
                self.freeze()

    @torch.no_grad()
    def hold(self, compare: bool = False) -> None:
        """Put back whatever moved.

        PyTorch counts changes of a tensor, but not those by ``tensor.data``. So values are compared too, on a CPU the
        first time and then more and more rarely; what was once seen to move is put back every time.

        Args:
            compare: compare now, on any device, which waits for it.
        """
        self._times_held += 1
        often = self._times_held & (self._times_held - 1) == 0
        for held in self._held:
            held.put_back(compare, often)

    def held(self) -> dict[str, Tensor]:
        """By name what moved since :meth:`hold`, as it would be put back: a batch that is under way still needs it."""
        return {name: value for held in self._held for name, value in held.moved()}

    @torch.no_grad()
    def adopt(self) -> None:
        """Keep what changed since :meth:`hold`: a threshold that a validation finds, a cache that grows in it."""
        for held in self._held:
            held.adopt()

    def release(self) -> None:
        """Put everything back and make trainable what is so but for this."""
        self.hold(compare=True)
        self.thaw()


def _held(model: nn.Module, values: Mapping[str, Any]) -> Iterator[_Held]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for own, of in ((False, module.named_buffers), (True, module.named_parameters)):
            for name, tensor in of(recurse=False):
                value = values.get(f"{prefix}.{name}" if prefix else name)
                if not isinstance(value, Tensor) or (value.shape, value.dtype) != (tensor.shape, tensor.dtype):
                    value = None if own else tensor.detach().clone()
                if value is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield _Held(module, prefix, name, tensor, value)


class _Held:
    def __init__(self, module: nn.Module, prefix: str, name: str, tensor: Tensor, value: Tensor) -> None:
        self._module, self._name, self._value = module, name, value
        self._path = f"{prefix}.{name}" if prefix else name
        # Normalisation layers move their statistics past PyTorch's count.
        self._tensor, self._version, self._moves = tensor, _version(tensor), isinstance(module, _NormBase)

    def put_back(self, compare: bool, often: bool) -> None:
        now = getattr(self._module, self._name, None)
        if not isinstance(now, Tensor) or now.is_inference():
            setattr(self._module, self._name, self._value.to(self._tensor.device, copy=True))
            self._take(getattr(self._module, self._name))
        elif now.shape != self._value.shape:  # a cache that grew: what is in it depends on nothing that learns
            self.adopt()
        elif self._moved(now) or ((compare or (often and now.device.type == "cpu")) and self._differs(now)):
            self._moves, self._value = True, self._value.to(now.device)
            now.copy_(self._value)
            self._take(now)

    def moved(self) -> Iterator[tuple[str, Tensor]]:
        now = getattr(self._module, self._name, None)
        if isinstance(now, Tensor) and now.shape == self._value.shape and self._moved(now):
            yield self._path, self._value

    def adopt(self) -> None:
        now = getattr(self._module, self._name, None)
        if isinstance(now, Tensor) and (now is not self._tensor or _version(now) != self._version):
            self._value = now.detach().clone()
            self._take(now)

    def _differs(self, now: Tensor) -> bool:
        return not torch.equal(now, self._value.to(now.device))

    def _moved(self, now: Tensor) -> bool:
        return self._moves or now is not self._tensor or _version(now) != self._version

    def _take(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, _version(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
