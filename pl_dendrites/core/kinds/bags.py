r"""Weighted sums of a few rows of a table each, which can be differentiated any number of times.

With a table ``x`` of rows, a bag ``k`` names ``m`` of them, and its sum is :math:`y_k = \sum_j w_{kj}\, x_{i(k, j)}`.
PyTorch's ``embedding_bag`` computes that without ever forming the rows of all bags, and its gradients too, but not the
gradients of these. For an upstream gradient ``g`` all three are derivatives of one form,

.. math:: t(g, w, x) = \sum_{k, j} w_{kj}\, \langle g_k, x_{i(k, j)} \rangle,

with respect to one of its arguments, and the derivatives of each are the other two.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import flop_counter

from pl_dendrites.core.tensors import is_transformed

__all__ = ["weighted_sums"]


def weighted_sums(table: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """The sum of each bag.

    Args:
        table: shape ``(n, S)``.
        weight: shape ``(N, m)``, of the type of the table.
        rows: shape ``(N, m)``, integers of 32 or 64 bits: which rows each bag sums.

    Returns:
        Shape ``(N, S)``.

    Example:
        >>> table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> weighted_sums(table, torch.tensor([[1.0, 10.0]]), torch.tensor([[0, 2]]))
        tensor([[51., 62.]])
    """
    if is_transformed():  # which know no bags
        return (table[rows] * weight.unsqueeze(-1)).sum(1)
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if torch.is_grad_enabled() and not traced:
        sums: Tensor = _Sums.apply(table, weight, rows)  # type: ignore[no-untyped-call]
        return sums
    return _sums(table, weight, rows)


# A table lies column by column where it is the transpose of a batch, and sums of rows are then twenty times as dear.


def _sums(table: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    return F.embedding_bag(rows, table.contiguous(), mode="sum", per_sample_weights=weight)


def _spread(upstream: Tensor, weight: Tensor, rows: Tensor, size: int) -> Tensor:
    bags, sizes, largest = _layout(rows)
    spread: Tensor = torch.ops.aten._embedding_bag_dense_backward(
        upstream.contiguous(), rows.flatten(), bags, sizes, largest, size, False, 0, weight.flatten(), -1
    )
    return spread


def _products(upstream: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    bags, _, _ = _layout(rows)
    offsets = torch.arange(0, rows.numel(), rows.shape[1], dtype=rows.dtype, device=rows.device)
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        upstream.contiguous(), table.contiguous(), rows.flatten(), offsets, bags, 0, -1
    )
    return products.view(rows.shape)


def _layout(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, size = rows.shape
    bags = torch.arange(count, dtype=rows.dtype, device=rows.device).repeat_interleave(size)
    return bags, rows.new_full((count,), size), rows.new_empty(0)


class _Sums(torch.autograd.Function):
    # The derivative of the form with respect to the upstream gradient.
    @staticmethod
    def forward(ctx: Any, table: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(table, weight, rows)
        return _sums(table, weight, rows)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (table, weight, rows), (to_table, to_weight, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _Spread.apply(upstream, weight, rows, len(table)) if to_table else None,  # type: ignore[no-untyped-call]
            _Products.apply(upstream, table, rows) if to_weight else None,  # type: ignore[no-untyped-call]
            None,
        )


class _Spread(torch.autograd.Function):
    # With respect to the table.
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, weight: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(upstream, weight, rows)
        return _spread(upstream, weight, rows, size)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (upstream, weight, rows), (to_upstream, to_weight, *_) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _Sums.apply(given, weight, rows) if to_upstream else None,  # type: ignore[no-untyped-call]
            _Products.apply(upstream, given, rows) if to_weight else None,  # type: ignore[no-untyped-call]
            None,
            None,
        )


class _Products(torch.autograd.Function):
    # With respect to the weights.
    @staticmethod
    def forward(ctx: Any, upstream: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(upstream, table, rows)
        return _products(upstream, table, rows)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (upstream, table, rows), (to_upstream, to_table, _) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _Sums.apply(table, given, rows) if to_upstream else None,  # type: ignore[no-untyped-call]
            _Spread.apply(upstream, given, rows, len(table)) if to_table else None,  # type: ignore[no-untyped-call]
            None,
        )


# PyTorch's counter of operations, which Lightning's counters ask, knows no bags: sparse dendrites would cost nothing.
# Each of these gets shapes in the order of the operator's arguments; without weights a bag has sums alone.


def _forward_flops(table: Any, rows: Any, offsets: Any, *others: Any, **_: Any) -> int:
    weights = others[3] if len(others) > 3 else None  # noqa: PLR2004 - after scale_grad_by_freq, mode and sparse
    return 0 if weights is None else 2 * prod(weights) * int(table[1])


def _spread_flops(upstream: Any, rows: Any, *others: Any, **_: Any) -> int:
    weights = others[6]  # after offset2bag, bag_size, maximum_indices, num_weights, scale_grad_by_freq and mode
    return 0 if weights is None else 2 * prod(weights) * int(upstream[1])


def _products_flops(upstream: Any, table: Any, rows: Any, *others: Any, **_: Any) -> int:
    return 2 * int(prod(rows)) * int(upstream[1])


for _operator, _formula in {
    torch.ops.aten._embedding_bag: _forward_flops,
    torch.ops.aten._embedding_bag_forward_only: _forward_flops,
    torch.ops.aten._embedding_bag_dense_backward: _spread_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: _products_flops,
}.items():
    if _operator not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(_operator)(_formula)  # type: ignore[arg-type]
