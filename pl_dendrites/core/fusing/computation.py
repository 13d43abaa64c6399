"""A computation in the making: a graph of PyTorch's own modules and functions, with the values that it uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["Computation", "NotFusible"]


class NotFusible(Exception):
    """Why a module and its dendrites cannot be one computation."""


class Computation:
    """Puts together what takes the place of a module.

    Example:
        >>> import torch
        >>> graph = Computation()
        >>> (x,) = graph.arguments_of(nn.ReLU())
        >>> double = graph.finish(graph.call(torch.mul, x, graph.value("factor", torch.tensor(2.0))))
        >>> double(torch.ones(3)), type(double).__module__.split(".")[:2]
        (tensor([2., 2., 2.], grad_fn=<MulBackward0>), ['torch', 'fx'])
    """

    def __init__(self) -> None:
        self._root, self._graph = nn.Module(), fx.Graph()

    def arguments_of(self, module: nn.Module, most: int | None = None) -> list[fx.Node]:
        """What the computation is called with: the arguments of a module's ``forward``, with their defaults.

        Args:
            module: the module.
            most: how many of them; ``None``: all.

        Raises:
            NotFusible: if it takes any number of arguments.
        """
        parameters = list(inspect.signature(module.forward).parameters.values())[:most]
        if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) or not parameters:
            raise NotFusible("its `forward` does not name its arguments one by one")
        return [self._graph.placeholder(p.name, default_value=p.default) for p in parameters]

    def value(self, name: str, value: Tensor) -> fx.Node:
        """A value that the computation uses: a parameter, or of integers a buffer."""
        if value.is_floating_point():
            self._root.register_parameter(name, nn.Parameter(value.detach().clone()))
        else:
            self._root.register_buffer(name, value.detach().clone())
        return self._graph.get_attr(name)

    def run(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Call a module, which becomes a part of the computation."""
        self._root.add_module(name, module)
        return self._graph.call_module(name, args)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function of PyTorch's or Python's."""
        return self._graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        """Call a method of the first of the arguments."""
        return self._graph.call_method(name, args)

    def finish(self, out: Any) -> fx.GraphModule:
        """The whole, in evaluation mode.

        Args:
            out: what it returns.
        """
        self._graph.output(out)
        return fx.GraphModule(self._root, self._graph, class_name="Fused").eval()
