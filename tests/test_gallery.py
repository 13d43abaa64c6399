"""The notebooks of the gallery run, and their pages on the site say what they do."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


@pytest.fixture
def undone() -> Iterator[None]:
    """What a notebook sets for its process is as it was afterwards."""
    lightning, threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = lightning.level
    with warnings.catch_warnings(), torch.random.fork_rng():
        yield
    lightning.setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.usefixtures("undone")
@every_notebook
def test_a_notebook_runs(path: Path) -> None:
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(path, "code"), 1):
        exec(compile(cell["source"], f"{path.name}, code cell {number}", "exec"), names)


@every_notebook
def test_what_is_stored_is_of_one_run_that_went_well(path: Path) -> None:
    code = cells(path, "code")
    assert 5 <= len(code) + len(cells(path, "markdown")) <= 12
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) > 1
    assert all(output["output_type"] in ("execute_result", "stream") for output in outputs)
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    text = json.dumps(outputs)
    assert not re.search(r"/home/|/root/|/tmp/|site-packages", text)  # of the machine that ran it


@every_notebook
def test_the_page_on_the_site_is_that_of_the_notebook(path: Path) -> None:
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert [code.strip() for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)] == [
        cell["source"].strip() for cell in cells(path, "code")
    ]
    first, *others = (cell["source"] for cell in cells(path, "markdown"))
    assert page.startswith(first.partition("\n")[0])
    assert all(text.strip() in page for text in [first.partition("\n")[2], *others])
    shown = [output.get("data", {}).get("text/html") for cell in cells(path, "code") for output in cell["outputs"]]
    assert all("".join(html) in page for html in shown if html)


def test_every_notebook_is_in_the_gallery_and_on_the_site() -> None:
    gallery = (DOCS / "notebooks" / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\((\w+\.\w+)\)", gallery))
    assert linked == {path.with_suffix(kind).name for path in NOTEBOOKS for kind in (".md", ".ipynb")}
    (contents,) = re.findall(r"^```\{toctree\}(.*?)^```", gallery, re.DOTALL | re.MULTILINE)
    assert {path.stem for path in NOTEBOOKS} <= set(contents.split())
