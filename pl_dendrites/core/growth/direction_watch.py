"""Along which directions the inputs of a layer vary where its outputs err."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pl_dendrites.core.growth.watch import Watch
from pl_dendrites.core.kinds import Inputs, LinearConv, inputs_of, like, run_like, weight_of
from pl_dendrites.core.tensors import below_transforms

__all__ = ["DirectionWatch", "Found"]


class Found(NamedTuple):
    """What was seen of a layer.

    Attributes:
        directions: shape ``(K, n, *kernel)``, orthogonal, the strongest first, and as long as it takes for an input
            of the same size in all directions to have the variance 1 along each.
        slope: how fast the loss would fall along them: the squared gradient of all weights between them and the
            layer's neurons.
    """

    directions: Tensor
    slope: float


class DirectionWatch(Watch):
    r"""Finds the principal directions of a layer's inputs, each input weighted by the error of the layer's outputs.

    .. math:: S = \sum_s |E_s|^2\, x_s x_s^T

    is as large as the square of the inputs. Its first eigenvectors are found without it, in two looks (Halko,
    Martinsson & Tropp, arXiv:0909.4061): first :math:`Y = S R` of a few random directions ``R``, and then, in the space
    that ``Y`` spans, ``S`` as it is there. Of a convolution an input is what one position of a kernel covers.

    Args:
        layer: a Linear or a convolution without groups; it is read, not kept.
        kind: the view that dendrites have of it.
        count: directions to look along, at most as many as there are.
        seed: of the random ones.

    Attributes:
        along: shape ``(count, n, *kernel)``, the directions that are looked along.
        closer: whether it is the second look.
        sums: what is added up, by name.

    Example:
        >>> layer, x, error = nn.Linear(9, 2), torch.randn(50, 9), torch.randn(50, 2)
        >>> x[:, 4] *= 5
        >>> watch = DirectionWatch(layer, LinearConv(layer), count=3)
        >>> for look in range(2):
        ...     watch.take(watch.features(Inputs((x,), {}), layer(x)), error)
        ...     found = watch.look_closer() if look == 0 else watch.found(1)
        >>> found.directions.abs().argmax().item()
        4
    """

    def __init__(self, layer: nn.Module, kind: LinearConv, count: int, seed: int = 0) -> None:
        super().__init__()
        self._kind, self._backward = kind, 0
        weight = weight_of(layer)
        self._dtype = torch.promote_types(weight.dtype, torch.float32)
        count = min(count, weight.numel() // kind.neurons)
        self._nodes = like(layer, inputs_of(layer), count, 1, weight.device).to(self._dtype)
        nn.init.zeros_(self._nodes.get_parameter("bias"))
        draw = torch.randn(self.along.shape, device="cpu", generator=torch.Generator("cpu").manual_seed(seed))
        self.along.copy_(draw)
        self.closer, self.sums = False, {"image": torch.zeros_like(self.along), "size": self.along.new_zeros(2)}

    @property
    def along(self) -> Tensor:
        """See the class."""
        return self._rows(self._nodes.get_parameter("weight")).detach()

    def _rows(self, weight: Tensor) -> Tensor:
        inputs_first = isinstance(self._nodes, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        return weight.transpose(0, 1) if inputs_first else weight

    @torch.no_grad()
    def look_closer(self) -> None:
        """From now on look at the space that what was seen so far spans; ``sums`` are those of all processes."""
        basis = torch.linalg.qr(_precise(self.sums["image"]).flatten(1).T).Q.T
        square, entries = self.sums["size"].tolist()
        deviation = math.sqrt(square / entries) if square > 0 else 1.0
        self.along.copy_(basis.view(self.along.shape) / deviation)
        self._begin_second()

    def _begin_second(self) -> None:
        count = len(self.along)
        shapes = {"square": (count, count), "slope": (self._kind.neurons, count)}
        self.closer, self.sums = True, {name: self.along.new_zeros(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def found(self, count: int) -> Found:
        """The directions; ``sums`` are those of all processes.

        Args:
            count: how many, at most as many as were looked along.
        """
        vectors = torch.linalg.eigh(_precise(self.sums["square"])).eigenvectors.flip(1)[:, :count].to(self.along)
        directions = (vectors.T @ self.along.flatten(1)).view(-1, *self.along.shape[1:])
        return Found(directions, float((self.sums["slope"] @ vectors).square().sum()))

    @property
    def seen(self) -> int:
        """Backward passes that brought an error."""
        return self._backward

    @torch.no_grad()
    def features(self, inputs: Inputs, out: Tensor) -> Tensor:
        """See :meth:`Watch.features`."""
        x = below_transforms(self._kind.input_of(inputs, live=False))
        return self._look(x, out) if self.closer else x

    def _look(self, x: Tensor, out: Tensor) -> Tensor:
        # Autocast would go on with directions that it cast before they changed.
        with torch.autocast(x.device.type, enabled=False):
            return run_like(self._nodes, x.to(self._dtype), out)

    @torch.no_grad()
    def take(self, x: Tensor, error: Tensor) -> None:
        """See :meth:`Watch.take`. Where a batch's sums are not finite, nothing of it is taken."""
        self._backward += 1
        dim, x, error = self._kind.dim, x.to(self._dtype), error.to(self._dtype)
        weight = error.square().sum(dim, keepdim=True)
        if self.closer:
            seen, weighted, errors = (part.movedim(dim, -1).flatten(0, -2) for part in (x, x * weight, error))
            seen_now = {"square": weighted.T @ seen, "slope": errors.T @ seen}
        else:
            size = torch.stack([x.square().sum(), x.new_tensor(x.numel())])
            seen_now = {"image": self._image(x, weight), "size": size}
        for name, value in seen_now.items():
            self.sums[name] += value.nan_to_num(0.0, 0.0, 0.0)

    @torch.enable_grad()
    def _image(self, x: Tensor, weight: Tensor) -> Tensor:
        directions = self._nodes.get_parameter("weight")
        seen = self._look(x, weight)
        (image,) = torch.autograd.grad(seen, directions, seen.detach() * weight)
        return self._rows(image)

    def state_dict(self) -> dict[str, Tensor]:
        """What it saw, as plain tensors."""
        return {"along": self.along.clone(), "seen": torch.tensor(self._backward), **_copied(self.sums)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: of the same layer.

        Raises:
            ValueError: if it is of another.
        """
        if "square" in state:
            self._begin_second()
        for name, own in (("along", self.along), *self.sums.items()):
            if name not in state or state[name].shape != own.shape:
                raise ValueError(f"{name!r} of what was seen is to be of the shape {tuple(own.shape)}")
            own.copy_(state[name])
        self._backward = int(state["seen"])


def _precise(values: Tensor) -> Tensor:
    # Not every accelerator has numbers of 64 bits.
    return values.to("cpu", torch.float64)


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}
