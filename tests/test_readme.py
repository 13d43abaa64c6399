"""Every block of Python on the README and on the pages of the documentation runs as it stands.

The blocks of a page run in its order and share their names. Before the first, a page has what its reader has: a
``model`` of a class ``MyModel``, a ``datamodule``, and ``best.ckpt``, a checkpoint of such a model that grew. A block
that cannot run here begins with ``python no_run``. One that is a whole script begins with ``python script``. Pages of
notebooks are in test_gallery.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import pl_dendrites
from pl_dendrites import DendriteCallback, attach
from tests.models import Classifier, loaders

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


class MyModel(Classifier):
    """Of a reader who knows nothing of dendrites."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        del self.net
        self.encoder = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders(128)[0]

    def val_dataloader(self) -> Any:
        return loaders(128)[1]

    test_dataloader = val_dataloader


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = MyModel()
    network = attach(model)
    network.grow(network.targets)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    path = tmp_path_factory.mktemp("grown") / "best.ckpt"
    hyper_parameters = {"hyper_parameters": dict(model.hparams), "pytorch-lightning_version": L.__version__}
    torch.save({"state_dict": model.state_dict(), **hyper_parameters}, path)
    return path


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def blocks(page: Path) -> list[tuple[int, str, str]]:
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(2)), m[1].strip(), m[2]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_in_the_order_of_the_page(page: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(checkpoint, "best.ckpt")
    make = L.Trainer.__init__  # a bar takes longer than an epoch here
    monkeypatch.setattr(L.Trainer, "__init__", lambda *a, **k: make(*a, **{**k, "enable_progress_bar": False}))
    grow = DendriteCallback.__init__  # who names no patience waits for two validations instead of ten
    monkeypatch.setattr(DendriteCallback, "__init__", wraps(grow)(lambda *a, **k: grow(*a, **{"patience": 2, **k})))
    with seeded(0):
        names: dict[str, Any] = {"model": MyModel(), "datamodule": Data(), "MyModel": MyModel}
        for line, kind, code in blocks(page):
            assert kind in ("", "no_run", "script"), f"{page.name}:{line}: unknown kind of block {kind!r}"
            if not kind:
                # The lines before keep their number, so that an error says where it is.
                exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_script_runs_when_it_is_pasted_into_a_file() -> None:
    scripts = [code for page in PAGES for _, kind, code in blocks(page) if kind == "script"]
    assert scripts
    for code in scripts:
        Path("first.py").write_text(code, encoding="utf-8")
        run = subprocess.run([sys.executable, "first.py"], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert re.search(r"^ +1 .* yes ", run.stdout, re.MULTILINE), "the first set did not help"


def test_the_readme_grows_and_loads() -> None:
    assert sum("trainer.fit" in code and not kind for _, kind, code in blocks(PAGES[0])) == 1


def test_blocks_that_do_not_run_are_rare() -> None:
    kinds = [kind for page in PAGES for _, kind, _ in blocks(page)]
    assert len(kinds) > 15
    assert kinds.count("no_run") <= 2


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^\.\. auto\w+:: pl_dendrites\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(pl_dendrites.__all__)


def headings(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_pages_at_the_top_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    inside = [target for target in targets if not target.startswith("http")]
    assert inside
    for target in inside:
        file, _, anchor = target.partition("#")
        page = ROOT / (file or name)
        assert page.exists(), target
        assert not anchor or anchor in headings(page), target
