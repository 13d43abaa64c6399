"""The correlation rule where ``torch.func`` is at work: ``vmap``, ``grad``, ``jvp``, and what they are combined to.

A transform runs a model on tensors that stand for others: a batch of samples, or a value and its derivatives. What is
counted is counted on the tensors that they stand for, below all transforms, where a batch of samples is one more
dimension. No other file knows how PyTorch wraps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Observation", "TransformedRule", "is_batch_of_backward_passes", "trained_levels"]

Observe = Callable[[Tensor, Tensor], Tensor | None]


def trained_levels(parameters: Iterable[Tensor]) -> frozenset[int]:
    """The transforms that differentiate with respect to a parameter, by number; what runs outermost is 1.

    Per-sample gradients are the gradients of a loss that trains the layers, and their errors are what candidates learn
    from. A derivative with respect to an input is the training step's own: its error is no error of the loss.

    Args:
        parameters: of a layer, as they are where it runs.

    Example:
        >>> seen = []
        >>> def loss(weight):
        ...     seen.append(trained_levels([weight]))
        ...     return weight.sum()
        >>> _ = torch.func.grad(loss)(torch.ones(2))
        >>> seen
        [frozenset({1})]
    """
    levels = set()
    for parameter in parameters:
        tensor = parameter
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch._C._functorch.is_gradtrackingtensor(tensor):
                levels.add(torch._C._functorch.maybe_get_level(tensor))
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return frozenset(levels)


def is_batch_of_backward_passes(error: Tensor) -> bool:
    """Whether an error is one of many that ``torch.autograd.grad(..., is_grads_batched=True)`` sends back at once."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(error)


class TransformedRule(torch.autograd.Function):
    """:class:`~pl_dendrites.core.rule.correlation.CorrelationRule` under transforms; see there.

    An ordinary backward pass through what a transform computed gives each candidate its gradient, as ever. The backward
    pass of a transform reaches what it differentiates with respect to, and no candidates. If that is a parameter of the
    layer, its errors are taken in all the same, and the candidates' gradients added up at once.
    """

    @staticmethod
    def forward(out: Tensor, outputs: Tensor, observe: Observe, levels: frozenset[int]) -> Tensor:
        """Return a copy of ``out``.

        Args:
            out: the layer's output.
            outputs: shape ``(P, *out.shape)``, outputs of the candidates.
            observe: see :class:`~pl_dendrites.core.rule.correlation.CorrelationRule`.
            levels: from :func:`trained_levels`.
        """
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass needs, at each level of transforms for itself."""
        out, outputs, ctx.observe, levels = inputs
        inside = torch._C._functorch.is_gradtrackingtensor(out)
        ctx.inside, ctx.trains = inside, inside and torch._C._functorch.maybe_get_level(out) in levels
        if ctx.trains or not inside:
            ctx.save_for_backward(outputs)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Hand ``error`` on, and let the candidates learn from it where it is one of the loss."""
        gradient = None
        if is_batch_of_backward_passes(error):
            return error, None, None, None
        if ctx.trains:
            Observation.apply(*ctx.saved_tensors, error, ctx.observe, True)  # type: ignore[no-untyped-call]
        elif not ctx.inside:
            gradient = Observation.apply(*ctx.saved_tensors, error, ctx.observe, False)  # type: ignore[no-untyped-call]
        return error, gradient, None, None

    @staticmethod
    def jvp(ctx: Any, out: Tensor, *_: Any) -> Tensor:
        """A derivative forward passes as the value does."""
        return out.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """A batch of calls is one call with one more dimension of samples."""
        out, outputs, observe, levels = inputs
        out = _in_front(out, in_dims[0], 0, info.batch_size)
        outputs = _in_front(outputs, in_dims[1], 1, info.batch_size)
        return TransformedRule.apply(out, outputs, observe, levels), 0  # type: ignore[no-untyped-call]


class Observation(torch.autograd.Function):
    """Lets an error be observed below all transforms; to differentiation what comes of it is a constant."""

    @staticmethod
    def forward(outputs: Tensor, error: Tensor, observe: Observe, learn: bool) -> Tensor:
        """What ``observe`` returns, or nothing of use.

        Args:
            outputs: shape ``(P, *error.shape)``, outputs of the candidates.
            error: gradient of the loss with respect to the layer's output.
            observe: see :class:`~pl_dendrites.core.rule.correlation.CorrelationRule`.
            learn: whether the candidates get their gradients here and now.
        """
        gradient = observe(outputs.detach() if not learn else outputs, error.detach())
        if learn and gradient is not None and outputs.requires_grad:
            with torch.enable_grad():
                # Kept: a transform may run backward several times through what it computed once.
                torch.autograd.backward(outputs, gradient, retain_graph=True)
        return torch.zeros_like(outputs) if gradient is None or learn else gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is differentiated."""
        ctx.mark_non_differentiable(output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None, None, None]:
        """A constant has no gradient."""
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        """Nor any derivative forward."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """A batch of errors is one error with one more dimension of samples."""
        outputs, error, observe, learn = inputs
        error = _in_front(error, in_dims[1], 0, info.batch_size)
        outputs = _in_front(outputs, in_dims[0], 1, info.batch_size)
        return Observation.apply(outputs, error, observe, learn), 1  # type: ignore[no-untyped-call]


def _in_front(values: Tensor, dim: int | None, place: int, size: int) -> Tensor:
    if dim is not None:
        return values.movedim(dim, place)
    return values.unsqueeze(place).expand(*values.shape[:place], size, *values.shape[place:])
