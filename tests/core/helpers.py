"""References that share no code with the package: plain PyTorch layers, one per node, in Python loops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from pl_dendrites.core import Candidates

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "sharp_gelu": lambda x: x * torch.special.ndtr(2 * x),
}

LAYERS = [
    pytest.param(lambda: nn.Linear(5, 3), (7, 5), id="linear"),
    pytest.param(lambda: nn.Linear(5, 3, bias=False), (2, 4, 5), id="linear-3d"),
    pytest.param(lambda: nn.Linear(5, 1), (2, 2, 3, 5), id="linear-4d-one-neuron"),
    pytest.param(lambda: nn.Conv1d(3, 4, 3, padding="same", dilation=2), (2, 3, 7), id="conv1d-same"),
    pytest.param(
        lambda: nn.Conv1d(4, 6, 3, padding=2, groups=2, padding_mode="circular"), (4, 8), id="conv1d-circular"
    ),
    pytest.param(lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (2, 3, 6, 5), id="conv2d-stride"),
    pytest.param(lambda: nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(2, 1)), (2, 4, 5, 6), id="conv2d-groups"),
    pytest.param(lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1, padding_mode="reflect"), (2, 3, 5, 5), id="depthwise"),
    pytest.param(
        lambda: nn.Conv2d(2, 2, 3, padding=(1, 0), padding_mode="replicate"), (2, 5, 4), id="conv2d-unbatched"
    ),
    pytest.param(lambda: nn.Conv3d(2, 4, 2, groups=2, stride=(1, 2, 1)), (2, 2, 3, 4, 3), id="conv3d-groups"),
    pytest.param(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, padding=1), (4, 5), id="transposed1d-groups"),
    pytest.param(
        lambda: nn.ConvTranspose2d(3, 4, (2, 3), stride=2, output_padding=(1, 0), bias=False),
        (2, 3, 4, 3),
        id="transposed2d-stride",
    ),
    pytest.param(
        lambda: nn.ConvTranspose3d(4, 4, 2, groups=4, dilation=2), (2, 4, 2, 3, 2), id="transposed3d-depthwise"
    ),
]


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter with random values that saturate no activation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def grow(layer: nn.Module, count: int, seed: int = 0) -> None:
    """Give a layer that is attached ``count`` dendrites per neuron, random in every part."""
    layer.dendrites.reshape(layer, [replace(layer.dendrites.next, count=count)] if count else [])
    randomise(layer.dendrites, seed)


def neuron_dim(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear | nn.RNNBase | nn.RNNCellBase):
        return -1
    return -1 - len(layer.kernel_size) if hasattr(layer, "kernel_size") else layer.expected_dim


def arguments(x: Any) -> tuple[Any, ...]:
    """What a layer is called with: an input, or a tuple of all arguments."""
    return x if isinstance(x, tuple) else (x,)


def output_of(out: Any) -> Tensor:
    """The first tensor of whatever a layer returned, however deep."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def samples(values: Tensor, layer: nn.Module, lead: int = 0) -> Tensor:
    """``(*lead, samples, C)`` from ``(*lead, *, C, *)``: every dimension but the neurons holds samples."""
    return values.movedim(neuron_dim(layer), -1).flatten(lead, -2)


def reference_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer with dendrites must give; gradients pass through its own weights alone."""
    out = output_of(layer.forward(*arguments(x)))
    for weight, output in zip(output_weights(layer), reference_dendrites(layer, x), strict=True):
        out = out + _along_neurons(weight.detach(), layer) * output
    return out


def output_weights(layer: nn.Module) -> list[Tensor]:
    """Those of all dendrites in order, zero for a neuron that has none."""
    return [_for_all(weight, stack, layer, -1) for stack in layer.dendrites for weight in stack.weights]


def reference_dendrites(layer: nn.Module, x: Tensor, live: bool = False) -> list[Tensor]:
    """Outputs of the dendrites one after another, for all neurons; without gradient unless they are live."""
    outputs: list[Tensor] = []
    for stack in layer.dendrites:
        row, neurons = 0, _neurons(stack, layer)
        for j in range(stack.count):
            with torch.set_grad_enabled(live and stack.live):
                total = _potentials(layer, stack.nodes, stack.count, j, x, neurons)
                for earlier in outputs:
                    link = _along_neurons(stack.links[row], layer)
                    total = total + link * earlier.index_select(neuron_dim(layer), neurons)
                    row += 1
                output = FUNCTIONS[stack.form.activation](total)
                outputs.append(_for_all(output, stack, layer, neuron_dim(layer)))
        assert row == len(stack.links)
    return outputs


def _neurons(stack: Any, layer: nn.Module) -> Tensor:
    return torch.arange(layer.dendrites.kind.neurons) if stack.neurons is None else stack.neurons


def _for_all(values: Tensor, stack: Any, layer: nn.Module, dim: int) -> Tensor:
    if stack.neurons is None:
        return values
    shape = list(values.shape)
    shape[dim] = layer.dendrites.kind.neurons
    return values.new_zeros(shape).index_add(dim, stack.neurons, values)


def reference_pool(layer: nn.Module, x: Tensor) -> Tensor:
    """Outputs ``(P, *, C, *)`` of the candidates, differentiable in their parameters."""
    pool: Candidates = layer.dendrites.candidates
    outputs = []
    for p in range(pool.pool):
        total = _potentials(layer, pool.nodes, pool.pool, p, x)
        for link, earlier in zip(pool.links[p], reference_dendrites(layer, x), strict=True):
            total = total + _along_neurons(link, layer) * earlier
        outputs.append(FUNCTIONS[pool.activation](total))
    return torch.stack(outputs)


def reference_error(layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of a loss with respect to the layer's output."""
    out = reference_forward(layer, x).detach().requires_grad_()
    return torch.autograd.grad(loss(out), out)[0]


def reference_gradients(
    layer: nn.Module, uses: Iterable[tuple[Tensor, Tensor]], together: bool = False
) -> list[Tensor]:
    """Autograd's gradient of minus the absolute covariances for each candidate parameter.

    Args:
        layer: a layer with candidates.
        uses: its input and the error at its output, in the order in which backward passes meet them. The sign of a
            pass is that of the covariances' running average (momentum 0.95) up to its first use.
        together: whether one backward pass meets all of them, or each has its own.
    """
    average: Tensor | float = 0.0
    sign: Tensor | None = None
    objective = torch.zeros((), dtype=torch.float64)
    for x, error in uses:
        outputs, errors = samples(reference_pool(layer, x), layer, 1), samples(error, layer)
        covariance = ((outputs - outputs.mean(1, keepdim=True)) * (errors - errors.mean(0))).sum(1)
        average = 0.95 * average + 0.05 * covariance.detach()
        sign = average.sign() if sign is None or not together else sign
        objective = objective + (sign * covariance).sum()
    parameters = list(layer.dendrites.candidates.parameters())
    return list(torch.autograd.grad(-objective, parameters, materialize_grads=True))


def assert_gradients(layer: nn.Module, expected: Sequence[Tensor], relative: float = 1e-9) -> None:
    """The candidates' gradients are the expected ones, each to a share of its length."""
    for (name, parameter), reference in zip(layer.dendrites.candidates.named_parameters(), expected, strict=True):
        if parameter.numel():
            assert reference.norm() > 0, name
            assert (parameter.grad - reference).norm() <= relative * reference.norm(), name


def _potentials(
    layer: nn.Module, nodes: nn.Module, count: int, node: int, x: Tensor, neurons: Tensor | None = None
) -> Tensor:
    if isinstance(nodes, nn.ModuleList):
        return output_of(nodes[node](*arguments(x)))
    every = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    groups, transposed = getattr(layer, "groups", 1), "Transpose" in type(layer).__name__
    having = list(range(every)) if neurons is None else neurons.tolist()
    size = len(having) // groups  # of some neurons only where they are sparse or of one group
    outputs = []
    for place, neuron in enumerate(having):
        group = neuron // (every // groups)
        if hasattr(nodes, "inputs"):
            row = node * len(having) + place
            weight, bias = _as_dense(layer, nodes, row, group, transposed)
        else:
            row = (group * count + node) * size + place % size
            weight, bias = nodes.weight[row : row + 1], nodes.bias[row : row + 1]
            if transposed:
                inputs, row_of_group = layer.in_channels // groups, node * size + place % size
                weight = nodes.weight[group * inputs :][:inputs, row_of_group : row_of_group + 1]
        outputs.append(_one_node(layer, weight, bias, group, x))
    return torch.cat(outputs, neuron_dim(layer))


def _as_dense(layer: nn.Module, nodes: nn.Module, row: int, group: int, transposed: bool) -> tuple[Tensor, Tensor]:
    # The same node with zeros for the inputs that it does not see.
    if isinstance(layer, nn.Linear):
        own, seen = nodes, layer.in_features
    else:
        own, seen = nodes.layer, layer.in_channels // layer.groups
    kernels = own.weight.reshape(*nodes.inputs.shape, *own.weight.shape[2:])[row]
    inputs = nodes.inputs[row] - group * seen
    assert len(set(inputs.tolist())) == len(inputs)
    dense = kernels.new_zeros(seen, *kernels.shape[1:]).index_add(0, inputs, kernels)
    return dense.unsqueeze(1 if transposed else 0), own.bias[row : row + 1]


def _one_node(layer: nn.Module, weight: Tensor, bias: Tensor, group: int, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x @ weight.T + bias
    inputs = layer.in_channels // layer.groups
    names = ("stride", "padding", "output_padding", "dilation", "padding_mode")
    geometry = {name: getattr(layer, name) for name in names if name in signature(type(layer)).parameters}
    plain = type(layer)(inputs, 1, layer.kernel_size, **geometry)
    seen = x.narrow(neuron_dim(layer), group * inputs, inputs)
    return functional_call(plain, {"weight": weight, "bias": bias}, (seen,))


def _along_neurons(values: Tensor, layer: nn.Module) -> Tensor:
    return values.reshape(-1, *[1] * (-neuron_dim(layer) - 1))
