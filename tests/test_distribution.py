"""What would be released: an index takes it and shows it well, and it works where nothing else is.

``make test-dist`` builds it into ``dist/`` and runs the slow tests here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import pl_dendrites

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"

built = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not DIST.exists(), reason="nothing is built (make test-dist)"),
]


def links(markdown: str) -> list[str]:
    """Where all links and pictures of a page lead, those in HTML among them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    inner = [token for block in tokens for token in [block, *(block.children or [])]]
    found = [str(token.attrs[name]) for token in inner for name in ("href", "src") if name in token.attrs]
    html = "".join(token.content for token in inner if token.type in ("html_block", "html_inline"))
    return found + re.findall(r'(?:href|src|srcset)="([^"]*)"', html)


def test_links_of_the_readme_hold_where_no_files_are_beside_it() -> None:
    tomllib = pytest.importorskip("tomllib")
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [link for link in links(text) if not link.startswith("https://")]
    for change in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert len(links(text)) > 1
    assert [link for link in links(text) if not link.startswith("https://")] == []
    assert text.startswith("# pl_dendrites\n")
    assert "MNIST" in text


def test_the_papers_that_the_readme_names_are_cited() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    said = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where it comes from")[2]
    numbers = re.findall(r"arXiv:[\d.]+\d|CMU-[\w-]+\d", said)
    assert len(numbers) == 3
    cited = [paper.get("number") or paper["identifiers"][0]["value"] for paper in citation["references"]]
    assert cited == numbers


# -- what was built -----------------------------------------------------------------------------------------------


def metadata() -> Message:
    with zipfile.ZipFile(wheel()) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def wheel() -> Path:
    (path,) = DIST.glob("*.whl")
    return path


class TestBuilt:
    pytestmark = built

    def test_an_index_would_take_them(self) -> None:
        files = [str(path) for path in DIST.iterdir()]
        assert len(files) == 2
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)

    def test_the_wheel_has_the_package_alone(self) -> None:
        with zipfile.ZipFile(wheel()) as archive:
            names = archive.namelist()
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / "pl_dendrites").rglob("*") if path.is_file()}
        inside = {name for name in names if ".dist-info/" not in name}
        assert inside == {name for name in sources if "__pycache__" not in name}
        assert {"pl_dendrites/py.typed", "pl_dendrites/reporting/page.html"} <= inside
        assert [name for name in names if name.endswith("/licenses/LICENSE")]

    def test_the_sdist_has_what_its_tests_and_pages_need(self) -> None:
        (path,) = DIST.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        tracked = {name for name in listed.stdout.split() if not name.startswith(".ci/")}
        assert names - {"PKG-INFO"} == tracked

    def test_what_the_index_shows(self) -> None:
        shown = metadata()
        assert shown["Version"] == pl_dendrites.__version__
        assert shown["Description-Content-Type"] == "text/markdown"
        assert shown["License-Expression"] == "Apache-2.0"
        text = str(shown.get_payload())
        assert text.startswith("# pl_dendrites\n")
        assert [link for link in links(text) if not link.startswith("https://")] == []

    def test_the_citation_is_valid(self) -> None:
        cffconvert = pytest.importorskip("cffconvert")
        citation = cffconvert.Citation((ROOT / "CITATION.cff").read_text())
        citation.validate()
        assert "pl_dendrites" in citation.as_bibtex()


# -- installed into an empty environment --------------------------------------------------------------------------

MODEL = """
import torch
from lightning.pytorch import LightningModule, Trainer
from pl_dendrites import DendriteCallback

class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

if __name__ == "__main__":
    dendrites = DendriteCallback(
        "loss", dirpath="kept", base_epochs=1, max_correlation_epochs=1, max_dendrites=1, form="private"
    )
    trainer = Trainer(max_epochs=-1, callbacks=[dendrites], logger=False, accelerator="cpu", default_root_dir="kept")
    trainer.fit(Tiny(), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4))
    assert dendrites.stop_reason
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a program of an environment that has the wheel, what it asks for, and pytest."""
    place = tmp_path_factory.mktemp("empty")
    venv.create(place / "env", with_pip=True)
    bin_ = place / "env" / ("Scripts" if os.name == "nt" else "bin")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(program: str, *arguments: str | Path, **more: str) -> str:
        command = [str(bin_ / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=place, env=clean | more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run(
        "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel()}[cli,figures]", "pytest"
    )
    return run


class TestInstalled:
    pytestmark = built

    def test_it_is_the_wheel(self, installed: Any) -> None:
        where = installed("python", "-c", "import pl_dendrites; print(pl_dendrites.__file__, pl_dendrites.__version__)")
        assert "site-packages" in where
        assert where.split()[-1] == pl_dendrites.__version__

    def test_the_doctests_run(self, installed: Any) -> None:
        said = installed(
            "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--doctest-modules", "--pyargs", "pl_dendrites"
        )
        assert int(re.search(r"(\d+) passed", said)[1]) > 50

    def test_the_commands_run(self, installed: Any, tmp_path: Path) -> None:
        (tmp_path / "tiny.py").write_text(MODEL)
        installed("python", tmp_path / "tiny.py")
        page = tmp_path / "report.html"
        installed("pl-dendrites-report", "kept", page)
        assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        said = installed(
            "pl-dendrites-export", "kept/best.ckpt", "--model", "tiny.Tiny", "--to", "pickle", "--input", "4",
            PYTHONPATH=str(tmp_path),
        )  # fmt: skip
        assert "largest difference" in said
