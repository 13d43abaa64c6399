"""Inputs of a module and errors of its outputs, of a bounded number of samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ErrorSample", "Reservoir", "check_samples", "on_one_scale"]

# An input that varies less than this share of what the most variable one does is noise of a constant.
_LEAST_DEVIATION = 0.02
_MATRIX = 2  # dimensions


class ErrorSample:
    r"""What growth looks at: inputs, and the errors :math:`E = \partial L / \partial out` that they came with.

    Args:
        inputs: shape ``(N, n)``.
        errors: shape ``(N, C)``.

    Attributes:
        inputs: as given.
        errors: centred over the samples.
        deviation: shape ``(n,)``, standard deviation of each input.
        varies: shape ``(n,)``, whether it is worth looking at.
        correlation: shape ``(n, C)``, covariance of each input with each error over the input's deviation; 0 for inputs
            that do not vary.

    Example:
        >>> sample = ErrorSample(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[-1.0], [1.0]]))
        >>> sample.varies.tolist(), sample.correlation.tolist()
        ([True, False], [[1.0], [0.0]])
    """

    def __init__(self, inputs: Tensor, errors: Tensor) -> None:
        self.inputs, self.errors = inputs, errors - errors.mean(0)
        self._mean = inputs.mean(0)
        square = (inputs.square().mean(0) - self._mean.square()).clamp(min=0)
        if inputs.dtype != torch.float64 and bool((square < 1e-4 * self._mean.square()).any()):
            square = (inputs - self._mean).square().mean(0)  # a large mean takes the digits of a small deviation
        self.deviation = square.sqrt()
        self.varies = self.deviation > _LEAST_DEVIATION * self.deviation.max()
        self.correlation = self._over_deviation(inputs.T @ self.errors / len(inputs))

    def alike(self, seeds: Tensor) -> Tensor:
        """Absolute correlation of some inputs with all.

        Args:
            seeds: shape ``(S,)``, indices of inputs.

        Returns:
            Shape ``(S, n)``; 0 for inputs that do not vary.
        """
        centred = self.inputs[:, seeds] - self._mean[seeds]
        products = self._over_deviation(self.inputs.T @ centred / len(centred)).T
        return products.abs() / self.deviation[seeds, None].clamp(min=1e-12)

    def _over_deviation(self, products: Tensor) -> Tensor:
        return torch.where(self.varies[:, None], products / self.deviation[:, None].clamp(min=1e-12), 0)


class Reservoir:
    """Keeps a random part of all samples that come, each with the same chance.

    Errors of a loss that is a mean over its batch are as many times larger as the batch is smaller; those of one that
    is a sum are not. Which it is they say themselves where batches differ, see :meth:`rows`.

    Args:
        size: most samples.
        seed: which ones they are follows from it.
        parts: into which batches are split, of which one comes here; the loss of a batch is the mean of theirs.

    Attributes:
        seen: samples that came.
    """

    def __init__(self, size: int, seed: int = 0, parts: int = 1) -> None:
        self._size, self._seed, self._parts, self.seen = size, seed, parts, 0
        self._inputs: Tensor | None = None
        self._errors: Tensor | None = None
        self._batch = torch.zeros(size, device="cpu")

    @torch.no_grad()
    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Take in a batch. Positions without any error are no samples: no loss looks at them.

        Args:
            inputs: shape ``(*, n)``.
            errors: shape ``(*, C)``.
        """
        inputs, errors = inputs.detach().flatten(0, -2), errors.detach().flatten(0, -2)
        real = (errors != 0).any(1) & errors.isfinite().all(1)
        if not bool(real.all()):
            inputs, errors = inputs[real], errors[real]
        count = len(errors)
        if self._inputs is None or self._errors is None:
            wide = torch.promote_types(errors.dtype, torch.float32)
            self._inputs = inputs[:0].to(torch.promote_types(inputs.dtype, wide))
            self._errors = errors[:0].to(wide)
        if len(self._inputs) < self._size:  # not before it is known that there are such inputs
            self._inputs, self._errors = (
                _room(self._inputs, inputs, self._size),
                _room(self._errors, errors, self._size),
            )
        order = torch.arange(self.seen, self.seen + count, device="cpu")
        # A generator of the batch's own: nothing of it needs to be saved.
        generator = torch.Generator().manual_seed((self._seed + self.seen) % 2**63)
        chance = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        slots = torch.where(order < self._size, order, (chance * (order + 1)).long())
        rows = (slots < self._size).nonzero()[:, 0]
        # Of several for one slot the last; two writes to it would be a race on a GPU.
        last = dict(zip(slots[rows].tolist(), rows.tolist(), strict=True))
        slots, rows = torch.tensor(list(last), dtype=torch.int64), torch.tensor(list(last.values()), dtype=torch.int64)
        self._batch[slots] = float(count * self._parts)
        there = inputs.device
        self._inputs[slots.to(there)] = inputs[rows.to(there)].to(self._inputs.dtype)
        self._errors[slots.to(there)] = errors[rows.to(there)].to(self._errors.dtype) / self._parts
        self.seen += count

    @property
    def samples(self) -> dict[str, Tensor]:
        """What it keeps, as plain tensors, which are not copied; nothing before the first sample."""
        if self._inputs is None or self._errors is None or not self.seen:
            return {}
        there = min(self.seen, self._size)
        kept = {"inputs": self._inputs, "errors": self._errors, "batch": self._batch}
        counts = {"seen": self.seen, "kept": there}
        return {
            **{name: tensor[:there] for name, tensor in kept.items()},
            **{name: torch.tensor([count], device="cpu") for name, count in counts.items()},
        }

    def state_dict(self) -> dict[str, Tensor]:
        """:attr:`samples`, copied."""
        return {name: tensor.clone() for name, tensor in self.samples.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`: where not all samples that came are there, with as many as are.

        Raises:
            ValueError: if it cannot be one's.
        """
        if not state:
            return
        check_samples(state)
        if len(state["kept"]) != 1:
            raise ValueError(f"the saved samples must be of one process, got those of {len(state['kept'])}")
        self.seen, there = int(state["seen"]), int(state["kept"])
        self._size = there if there < self.seen else max(self._size, there)
        self._inputs, self._errors = state["inputs"].clone(), state["errors"].clone()
        self._batch = torch.zeros(self._size, device="cpu")
        self._batch[:there] = state["batch"]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Inputs ``(N, n)`` and errors ``(N, C)``, the latter :func:`on_one_scale`.

        Raises:
            RuntimeError: if no sample ever came.
        """
        samples = self.samples
        if not samples:
            raise RuntimeError("no sample with an error was seen")
        return samples["inputs"], on_one_scale(samples["errors"], samples["batch"])


def on_one_scale(errors: Tensor, batch: Tensor) -> Tensor:
    r"""Errors that came from batches of different sizes, as if these were of one size.

    With :math:`a` the logarithm of how much larger the errors from batches of a size are than those of the most
    frequent size, and :math:`l` that of how many more samples such a batch has, the slope
    :math:`\sum a l / \sum l^2` is about -1 for a loss that is a mean over its batch and 0 for a sum.

    Args:
        errors: shape ``(N, C)``.
        batch: shape ``(N,)``, samples in the batch of each.

    Example:
        >>> on_one_scale(torch.tensor([[1.0], [-1.0], [3.0]]), torch.tensor([2.0, 2.0, 1.0])).flatten().tolist()
        [1.0, -1.0, 1.5]
    """
    batch = batch.cpu()
    sizes, counts = batch.unique(return_counts=True)
    most = sizes[counts.argmax()]
    square = errors.square().mean(1).cpu()
    means = torch.stack([square[batch == size].mean() for size in sizes])
    larger, more = (means / means[counts.argmax()]).log() / 2, (sizes / most).log()
    # Many samples say more of their size than few.
    is_mean = bool((counts * larger * more).nan_to_num(0, 0, 0).sum() < -(counts * more * more).sum() / 2)
    return errors.mul((batch / most).to(errors)[:, None]) if is_mean else errors


def check_samples(state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless a state can be that of a reservoir, or of several, one after another.

    Args:
        state: ``inputs``, ``errors`` and ``batch``, a row for each sample; and of each reservoir how many were ``seen``
            and ``kept``.
    """
    wanted = {"inputs", "errors", "batch", "seen", "kept"}
    counts = [state[name] for name in ("seen", "kept") if name in state]
    whole = all(count.ndim == 1 and not count.is_floating_point() and len(count) for count in counts)
    if set(state) != wanted or not whole or state["inputs"].ndim != _MATRIX:
        raise ValueError(f"the saved samples must have {sorted(wanted)}, got {sorted(state)}")
    seen, kept = (count.tolist() for count in counts)
    if len(seen) != len(kept) or not all(0 <= k <= s for s, k in zip(seen, kept, strict=True)):
        raise ValueError(f"of {seen} samples that came {kept} cannot have been kept")
    there, inputs, errors = sum(kept), state["inputs"], state["errors"]
    shapes = {"inputs": (there, inputs.shape[1]), "errors": (there, errors.shape[-1]), "batch": (there,)}
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape or not state[name].is_floating_point():
            raise ValueError(f"the saved samples have {name} of the shape {tuple(state[name].shape)}, not {shape}")


def _room(first: Tensor, new: Tensor, size: int) -> Tensor:
    if first.shape[1] != new.shape[1]:
        raise ValueError(f"the samples so far have {first.shape[1]} numbers each, and the next ones {new.shape[1]}")
    room = new.new_empty(size, first.shape[1], dtype=first.dtype)
    room[: len(first)] = first
    return room
