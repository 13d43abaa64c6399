"""One file alone reaches into the Trainer, and no file is long. Imports are in core/test_imports.py."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pl_dendrites

PACKAGE = Path(pl_dendrites.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_file_touches_what_lightning_does_not_document(path: Path) -> None:
    """Attributes with an underscore of anything but ``self``, ``cls`` and our own objects."""
    own = {"self", "cls", "torch", "pool", "dendrites"}
    private = {
        f"{ast.unparse(node.value)}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[0] not in own
    }
    torchs = {"_load_state_dict_pre_hooks", "_modules", "_parameters", "_version"}
    torchs |= {f"_forward{kind}hooks{keywords}" for kind in ("_", "_pre_") for keywords in ("", "_with_kwargs")}
    tuples = {"_asdict", "_fields", "_replace"}
    allowed = path.name == "trainer.py" or all(name.rpartition(".")[2] in torchs | tuples for name in private)
    assert allowed, private


def test_the_picture_of_the_house_is_that_of_its_imports() -> None:
    script = PACKAGE.parent / "docs" / "house.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
