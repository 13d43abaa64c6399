"""The core stands on torch alone, and its parts stand on each other in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pl_dendrites.core

CORE = Path(pl_dendrites.core.__file__).parent
FILES = sorted(path.stem for path in CORE.glob("*.py"))

WITHOUT_LIGHTNING = """
import sys
for name in ("lightning", "pytorch_lightning", "torchmetrics"):
    sys.modules[name] = None
import torch
from pl_dendrites.core import attach, detach
network = attach(torch.nn.Linear(3, 2))
network.start_candidates(pool=2)
network.model(torch.randn(8, 3)).square().sum().backward()
assert list(network.integrate()) == [""] and network.num_dendrites == 1
detach(network.model)
loaded = [name for name in sys.modules if name.startswith("pl_dendrites") and not name.startswith("pl_dendrites.core")]
assert loaded == ["pl_dendrites"], loaded
"""


def imports(file: str) -> set[str]:
    """Full names of all that a file of the core imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((CORE / f"{file}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            whole = node.module == "pl_dendrites.core"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def ours(file: str) -> set[str]:
    return {name.removeprefix("pl_dendrites.core.") for name in imports(file) if name.startswith("pl_dendrites")}


def test_the_core_works_where_lightning_is_not_installed() -> None:
    command = [sys.executable, "-c", WITHOUT_LIGHTNING]
    run = subprocess.run(command, capture_output=True, text=True, cwd=CORE.parents[1], check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_the_core_imports_torch_the_standard_library_and_the_core(file: str) -> None:
    allowed = {"torch", "pl_dendrites", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(file)} <= allowed
    assert ours(file) <= set(FILES) - {"__init__"}


@pytest.mark.parametrize(
    ("file", "below"),
    [
        ("shapes", set()),
        ("functional", {"shapes"}),
        ("freeze", set()),
        ("phases", set()),
        ("kinds", set()),
        ("stacked", {"kinds", "shapes"}),
        ("copies", {"kinds", "stacked"}),
        ("recurrent", {"copies", "kinds"}),
        ("sparse", {"kinds", "stacked"}),
        ("layers", {"copies", "kinds", "recurrent", "sparse", "stacked"}),
        ("stack", {"functional", "kinds", "layers", "shapes"}),
        ("noted", {"kinds", "shapes"}),
        ("candidates", {"functional", "kinds", "noted", "shapes", "sparse"}),
        ("dendrites", {"candidates", "functional", "kinds", "layers", "stack"}),
        ("used", {"dendrites"}),
        ("gathering", {"candidates", "noted"}),
        ("joint", {"candidates", "functional", "gathering", "shapes"}),
        ("targets", {"copies", "dendrites", "kinds", "layers", "stacked"}),
        ("hosts", {"dendrites", "structure", "targets"}),
        ("worth", {"functional"}),
        (
            "network",
            {
                "stacked",
                "worth",
                "candidates",
                "dendrites",
                "freeze",
                "functional",
                "hosts",
                "stack",
                "targets",
                "used",
            },
        ),
        ("structure", {"dendrites", "functional", "layers", "shapes", "stack", "stacked", "targets"}),
    ],
)
def test_imports_run_one_way(file: str, below: set[str]) -> None:
    assert ours(file) <= below


def test_there_is_no_circle() -> None:
    list(TopologicalSorter({file: ours(file) for file in FILES}).static_order())


def test_the_phase_machine_needs_no_torch() -> None:
    assert "torch" not in {name.split(".")[0] for name in imports("phases")}
