"""Where a network is, in memory or in a file, and how it comes back into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pl_dendrites.core.growth.sharded import is_sharded, scatter_weights
from pl_dendrites.core.keys import is_dendrite_key
from pl_dendrites.core.structure import apply_structure, taken_whole
from pl_dendrites.saved.copies import same_memory

__all__ = ["Place", "has_values", "put_weights"]


@dataclass(frozen=True)
class Place:
    """Where a network is.

    Attributes:
        held: its weights, if they are in memory.
        path: the file, if it is in one.
        file: by which that file is known to be the one.
    """

    held: dict[str, Any] | None = None
    path: str = ""
    file: str = ""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Place:
        """The place that :meth:`state_dict` told."""
        weights = state["weights"]
        held = None if weights is None else {key: _on_cpu(value) for key, value in weights.items()}
        return cls(held, state["path"], state.get("file", ""))

    def state_dict(self, other: Mapping[str, Any]) -> dict[str, Any]:
        """For the callback's state.

        Args:
            other: weights of another network; what is in the same memory are the same tensors.
        """
        if self.held is None:
            return {"weights": None, "path": self.path, "file": self.file}
        held = {key: other[key] if same_memory(value, other.get(key)) else value for key, value in self.held.items()}
        return {"weights": held, "path": ""}

    def completed(self, other: Place) -> Place:
        """With what another network has and this one does not, but for dendrites."""
        if self.held is None or other.held is None:
            return self
        own = {key: value for key, value in other.held.items() if key not in self.held and not is_dendrite_key(key)}
        return replace(self, held={**self.held, **own})


def put_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a network into a model, which grows or shrinks to fit.

    Args:
        module: the model.
        weights: all that the network has.
    """
    if is_sharded(module):
        scatter_weights(module, weights)
        return
    with taken_whole():
        apply_structure(module, weights)  # a model that has not grown yet does not do that by itself
        module.load_state_dict(weights, strict=getattr(module, "strict_loading", True))


def has_values(value: Any) -> bool:
    """Whether something is a tensor with numbers.

    Example:
        >>> import torch
        >>> has_values(torch.zeros(2)), has_values(torch.zeros(2, device="meta")), has_values(2)
        (True, False, False)
    """
    return isinstance(value, Tensor) and not is_lazy(value) and not value.is_meta


def _on_cpu(value: Any) -> Any:
    return value.cpu() if has_values(value) else value
