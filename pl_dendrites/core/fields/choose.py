"""Choosing, of many candidates, those that take most from the error together."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["choose_units"]

# What is left of a unit beside those taken is noise below this share of it.
_NEW = 1e-6


def choose_units(outputs: Tensor, errors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""A greedy choice of different units: orthogonal matching pursuit (Pati, Rezaiifar & Krishnaprasad, 1993).

    Each step takes the unit :math:`h` whose part that is new beside those taken, :math:`\tilde h`, is worth most, which
    is :math:`\lVert \tilde h^\top E \rVert^2 / \lVert \tilde h \rVert^2`: so much of the squared error it would take
    away with output weights fitted to it. It is a Cholesky decomposition of :math:`H^\top H` that chooses its pivots by
    :math:`H^\top E`; neither is formed but for what is taken.

    Args:
        outputs: shape ``(N, P)``, of the candidates.
        errors: shape ``(N, C)``, centred.
        count: how many to take; fewer are taken where no other one adds anything.

    Returns:
        The units in the order they were taken, and the worth of each as a share of the squared error.

    Example:
        >>> e = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
        >>> twins = torch.cat([e, e, torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])], 1)
        >>> choose_units(twins, e, count=2)[0].tolist()  # the second adds nothing to the first
        [0]
    """
    if not count:
        return torch.empty(0, dtype=torch.int64, device=outputs.device), outputs.new_zeros(0).float()
    outputs = (outputs - outputs.mean(0)).double()
    size = outputs.norm(dim=0)
    outputs = torch.where(size > 0, outputs / size.clamp(min=1e-30), 0)
    errors = errors.double()
    product, own = outputs.T @ errors, outputs.square().sum(0)
    total = float(errors.square().sum())
    # Of what is taken, orthogonal parts: a column of the products of all candidates with each.
    parts = outputs.new_zeros(outputs.shape[1], min(count, outputs.shape[1]))
    taken: list[int] = []
    worths: list[float] = []
    for place in range(parts.shape[1]):
        worth = torch.where(own > _NEW, product.square().sum(1) / own.clamp(min=_NEW), -1.0)
        best = int(worth.argmax())
        if not float(worth[best]) > 1e-12 * total:
            break
        taken.append(best)
        worths.append(float(worth[best]) / total)
        scale = own[best].sqrt()
        column = (outputs.T @ outputs[:, best] - parts[:, :place] @ parts[best, :place]) / scale
        product = product - column[:, None] * (product[best] / scale)
        own = own - column.square()
        own[best] = 0
        parts[:, place] = column
    device = outputs.device
    return torch.tensor(taken, dtype=torch.int64, device=device), torch.tensor(worths, device=device)
