"""The page of layers and models says what is so."""

from __future__ import annotations

import pytest

from tests.layer_table import COMMAND, LAYERS, NAMED, PAGE, layer_rows, model_rows, named_rows, try_layer, written

STALE = f"docs/{PAGE.name} does not say what is so: run `{COMMAND}`, and look at what changed"


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_grows_without_effect_at_first_or_is_left_alone(name: str) -> None:
    assert try_layer(name)


@pytest.mark.parametrize("name", list(NAMED))
def test_a_module_that_is_named_does_so_too(name: str) -> None:
    assert try_layer(name, named=True)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PyTorch's, of old styles
def test_the_page_is_what_was_found() -> None:
    assert written("layers") == layer_rows(), STALE
    assert written("named") == named_rows(), STALE
    assert written("models") == model_rows(), STALE
