"""The mathematics on tensors, against loops, NumPy and torch's own statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pl_dendrites.core.activations import ACTIVATIONS
from pl_dendrites.core.growth.block import cascade
from pl_dendrites.core.rule.correlation import pearson
from pl_dendrites.core.rule.moments import Moments, batch_moments, merge_moments
from tests.core.helpers import FUNCTIONS


def start(pool: int, neurons: int, dtype: torch.dtype = torch.float64) -> Moments:
    shapes = [(neurons,), (pool, neurons), (neurons,), (pool, neurons), (neurons,), (pool, neurons)]
    return Moments(*(torch.zeros(shape, dtype=dtype) for shape in shapes))


def epoch(outputs: Tensor, errors: Tensor, sizes: list[int]) -> Moments:
    """Moments of ``(P, n, C)`` outputs and ``(n, C)`` errors that arrive in batches of the given sizes."""
    moments = start(outputs.shape[0], errors.shape[1], errors.dtype)
    for output, error in zip(outputs.split(sizes, 1), errors.split(sizes), strict=True):
        moments = merge_moments(moments, batch_moments(output, error, -1)[0])
    return moments


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize(("shape", "dim"), [((5, 3), -1), ((2, 3, 4), -2), ((3, 2, 2), -3)])
def test_cascade_is_the_formula_of_one_neuron_at_a_time(
    shape: tuple[int, ...], dim: int, count: int, activation: str
) -> None:
    potentials = [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    links = torch.randn(count * (count - 1) // 2, 3, dtype=torch.float64)
    outputs = cascade(potentials, links, ACTIVATIONS[activation], dim)
    assert len(outputs) == count
    for neuron in range(3):
        seen: list[Tensor] = []
        for j, potential in enumerate(potentials):
            total = potential.select(dim, neuron)
            for i in range(j):
                total = total + links[j * (j - 1) // 2 + i, neuron] * seen[i]
            seen.append(FUNCTIONS[activation](total))
            torch.testing.assert_close(outputs[j].select(dim, neuron), seen[j])


def test_cascade_without_links_is_the_activation() -> None:
    potentials = [torch.randn(4, 2), torch.randn(4, 2)]
    for output, potential in zip(cascade(potentials, torch.zeros(1, 2), torch.tanh, -1), potentials, strict=True):
        torch.testing.assert_close(output, potential.tanh())


@pytest.mark.parametrize(
    ("scale", "error_offset", "output_offset", "dtype", "tolerance"),
    [
        pytest.param(1.0, 0.0, 0.0, torch.float64, 1e-12, id="float64"),
        pytest.param(1e-12, 0.0, 0.0, torch.float32, 1e-5, id="tiny-errors"),
        pytest.param(1e-12, 1e-9, 0.0, torch.float32, 1e-3, id="tiny-errors-with-an-offset"),
        pytest.param(1.0, 1000.0, 0.0, torch.float32, 1e-3, id="error-offset"),
        pytest.param(1.0, 0.0, 1000.0, torch.float32, 1e-3, id="output-offset"),
        pytest.param(1e18, 0.0, 0.0, torch.float32, 1e-5, id="huge-errors"),
    ],
)
@pytest.mark.parametrize("sizes", [[60], [1] * 60, [20, 1, 39], [16, 16, 16, 12]], ids=str)
def test_moments_of_batches_are_those_of_their_union(
    sizes: list[int], scale: float, error_offset: float, output_offset: float, dtype: torch.dtype, tolerance: float
) -> None:
    common = torch.randn(60, 3, dtype=torch.float64)
    errors = (error_offset + scale * common).to(dtype)
    outputs = (output_offset + 0.5 * common + torch.randn(2, 60, 3, dtype=torch.float64)).to(dtype)
    moments = epoch(outputs, errors, sizes)
    exact_outputs, exact_errors = outputs.double().numpy(), errors.double().numpy()
    deviation_output = exact_outputs - exact_outputs.mean(1, keepdims=True)
    deviation_error = exact_errors - exact_errors.mean(0)
    expected = Moments(
        samples=np.full(3, 60.0),
        mean_output=exact_outputs.mean(1),
        mean_error=exact_errors.mean(0),
        square_output=(deviation_output**2).sum(1),
        square_error=(deviation_error**2).sum(0),
        covariance=(deviation_output * deviation_error).sum(1),
    )
    for name, value in moments._asdict().items():
        reference = getattr(expected, name)
        near = tolerance * np.abs(reference).max()
        np.testing.assert_allclose(value.double().numpy(), reference, rtol=tolerance, atol=near, err_msg=name)
    correlation = pearson(moments).double().numpy()
    for p, neuron in np.ndindex(2, 3):
        exact = np.corrcoef(exact_outputs[p, :, neuron], exact_errors[:, neuron])[0, 1]
        assert correlation[p, neuron] == pytest.approx(exact, abs=tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("when", [0, 1, 2], ids=["first", "middle", "last"])
def test_an_error_that_overflows_in_one_neuron_costs_that_batch_of_that_neuron_only(when: int, bad: float) -> None:
    outputs, errors = torch.randn(2, 30, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    spoilt = errors.clone()
    spoilt[10 * when + 4, 1] = bad
    moments = epoch(outputs, spoilt, [10, 10, 10])
    assert moments.samples.tolist() == [30, 20, 30]
    left = torch.tensor([i for i in range(30) if i // 10 != when])
    for neuron, kept in ((0, torch.arange(30)), (1, left), (2, torch.arange(30))):
        for p in range(2):
            exact = torch.corrcoef(torch.stack([outputs[p, kept, neuron], errors[kept, neuron]]))[0, 1]
            torch.testing.assert_close(pearson(moments)[p, neuron], exact)


@pytest.mark.parametrize("when", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_batch_of_nothing_but_nan_is_as_if_it_had_not_been(when: int) -> None:
    outputs, errors = torch.randn(2, 20, 3), torch.randn(20, 3)
    batches = [(outputs[:, :10], errors[:10]), (outputs[:, 10:], errors[10:])]
    batches.insert(when, (torch.full((2, 5, 3), torch.nan), torch.full((5, 3), torch.nan)))
    moments = start(2, 3, torch.float32)
    for output, error in batches:
        moments = merge_moments(moments, batch_moments(output, error, -1)[0])
    exact = [[torch.corrcoef(torch.stack([o[:, c], errors[:, c]]))[0, 1] for c in range(3)] for o in outputs]
    torch.testing.assert_close(pearson(moments), torch.tensor(exact))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_gradient_of_an_overflowed_neuron_is_zero_and_that_of_the_others_is_not(bad: float) -> None:
    errors = torch.randn(2, 3, 4, 4)
    expected = errors - errors.mean((0, 2, 3), keepdim=True)
    expected[:, 1] = 0
    errors[1, 1, 2, 2] = bad
    torch.testing.assert_close(batch_moments(torch.randn(2, *errors.shape), errors, -3)[1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_kept_in_single(dtype: torch.dtype) -> None:
    outputs, errors = torch.ones(1, 70000, 1, dtype=dtype), torch.ones(70000, 1, dtype=dtype)
    outputs[:, ::2], errors[::2] = -1, -1
    moments, _ = batch_moments(outputs, errors, -1)
    assert {value.dtype for value in moments} == {torch.float32}
    assert moments.covariance.item() == moments.square_error.item() == moments.square_output.item() == 70000


@pytest.mark.parametrize(
    ("outputs", "errors"),
    [
        pytest.param([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], id="constant-output"),
        pytest.param([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], id="constant-error"),
        pytest.param([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], id="no-error"),
        pytest.param([1.0], [1.0], id="one-sample"),
    ],
)
def test_a_correlation_that_is_not_defined_is_zero(outputs: list[float], errors: list[float]) -> None:
    moments, _ = batch_moments(torch.tensor(outputs).reshape(1, -1, 1), torch.tensor(errors).reshape(-1, 1), -1)
    assert pearson(moments).item() == 0
    assert pearson(start(1, 1)).item() == 0


def test_a_single_unbatched_sample_has_no_covariance() -> None:
    moments, centred = batch_moments(torch.randn(2, 3), torch.randn(3), -1)
    assert moments.samples.tolist() == [1, 1, 1]
    assert not centred.any()
    assert not moments.covariance.any()


def test_a_perfect_correlation_is_one_in_single_precision() -> None:
    errors = torch.randn(1000, 5) * 1e-12
    moments = epoch(torch.stack([errors * 3e12, errors * -1e13]), errors, [10] * 100)
    torch.testing.assert_close(pearson(moments), torch.tensor([1.0, -1.0])[:, None].expand(2, 5))
    assert pearson(moments).abs().max() <= 1
