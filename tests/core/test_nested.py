"""Nested tensors: sequences of different lengths in one batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pl_dendrites.core import attach
from tests.core.helpers import assert_gradients, grow, reference_forward, reference_gradients

LENGTHS = (5, 1, 3)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def padded() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor(LENGTHS)[:, None]


@pytest.mark.parametrize("dendrites", [0, 2])
def test_an_encoder_with_padding_gives_the_same_on_its_fast_path_and_beside_it(dendrites: int) -> None:
    """In inference PyTorch makes nested tensors of what is not padded, hooks or not."""
    model = encoder()
    x, padding = padded()
    network = attach(model)
    for name in network.layers:
        grow(model.get_submodule(name), dendrites)
    expected = model(x, src_key_padding_mask=padding).detach()
    with torch.inference_mode():
        fast = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast[~padding], expected[~padding])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_samples_of_a_nested_tensor_are_those_of_its_components(layout: torch.layout) -> None:
    layer = nn.Linear(4, 4).double()
    network = attach(layer)
    grow(layer, 1)
    parts = [torch.randn(length, 4, dtype=torch.float64) for length in LENGTHS]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    flat = torch.cat(parts)
    out = layer(nested)
    assert out.is_nested
    assert out.layout == layout
    torch.testing.assert_close(torch.cat((out + nested).unbind()), reference_forward(layer, flat) + flat)

    network.start_candidates(pool=2)
    loss = torch.cat(layer(nested).unbind()).sin().sum()
    loss.backward()
    error = torch.cos(reference_forward(layer, flat)).detach()
    assert_gradients(layer, reference_gradients(layer, [(flat, error)]))
    assert layer.dendrites.candidates.samples.unique().item() == sum(LENGTHS)
