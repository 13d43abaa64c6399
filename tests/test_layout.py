"""The house: imports run one way, and one file alone reaches into the Trainer."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pl_dendrites

PACKAGE = Path(pl_dendrites.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "arguments",
    "state",
    "optimizers",
    "host",
    "ranks",
    "sharding",
    "score",
    "training_loss",
    "correlation",
    "checkpoint",
    "history",
    "figures",
    "pages",
    "report",
    "loggers",
    "monitor",
    "status",
    "persistence",
    "callback",
    "comparison",
]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name: str) -> None:
    above = {f"pl_dendrites.{other}" for other in ORDER[ORDER.index(name) + 1 :]}
    assert not imported(PACKAGE / f"{name}.py") & above


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
    allowed = path.name == "host.py" or all(name.rpartition(".")[2] in torchs | tuples for name in private)
    assert allowed, private


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
