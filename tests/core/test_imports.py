"""The house: imports run one way, the core stands on torch alone, and every room says what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pl_dendrites

PACKAGE = Path(pl_dendrites.__file__).parent
FILES = {
    ".".join(("pl_dendrites", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
}

# Each floor may import those below it. Rooms on one floor know nothing of each other; within a room there is no circle.
LEAVES = tuple(f"pl_dendrites.core.{name}" for name in ("activations", "checks", "keys", "markup", "tensors"))
FLOORS = (
    LEAVES,
    ("pl_dendrites.core.kinds",),
    ("pl_dendrites.core.rule", "pl_dendrites.core.fields"),
    ("pl_dendrites.core.growth",),
    ("pl_dendrites.core.fusing",),
    ("pl_dendrites.core",),
    ("pl_dendrites.saved", "pl_dendrites.training", "pl_dendrites.controls", "pl_dendrites.exporting"),
    ("pl_dendrites.reporting",),
    ("pl_dendrites.comparing",),
    ("pl_dendrites",),
)
ROOMS = [room for floor in FLOORS for room in floor if room not in LEAVES]

# What a file of the core imports where it is used. Who has such files to read has it.
LATE = {"pl_dendrites.core.pretrained": {"safetensors"}}

WITHOUT_LIGHTNING = """
import sys
for name in ("lightning", "pytorch_lightning", "torchmetrics", "safetensors"):
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
    """Full names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else str(node.module) for name in whole}
    return found


def ours(file: str) -> set[str]:
    """The files of the package that a file imports; of a room as a whole its ``__init__``."""
    found = {name for name in imports(file) if name.split(".")[0] == "pl_dendrites"}
    return {name if name in FILES else f"{name}.__init__" for name in found}


def floor(name: str) -> tuple[int, str]:
    """The floor of a file, and its room: the longest that its name begins with."""
    rooms = [(len(room), number, room) for number, floor in enumerate(FLOORS) for room in floor]
    _, number, room = max(entry for entry in rooms if name == entry[2] or name.startswith(f"{entry[2]}."))
    return number, room


def test_the_core_works_where_lightning_is_not_installed() -> None:
    command = [sys.executable, "-c", WITHOUT_LIGHTNING]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("file", sorted(file for file in FILES if file.startswith("pl_dendrites.core.")))
def test_a_file_of_the_core_imports_torch_the_standard_library_and_the_core(file: str) -> None:
    allowed = {"torch", *sys.stdlib_module_names, *LATE.get(file, ())}
    others = {name for name in imports(file) if name.split(".")[0] not in allowed}
    assert all(name.startswith("pl_dendrites.core") for name in others), others


@pytest.mark.parametrize("file", sorted(FILES))
def test_imports_run_down(file: str) -> None:
    here = floor(file)
    assert not {other for other in ours(file) if floor(other) != here and floor(other)[0] >= here[0]}


def test_there_is_no_circle() -> None:
    # What a room hands on, its own files do not take from it.
    list(TopologicalSorter({file: ours(file) for file in FILES}).static_order())


def test_the_phase_machine_needs_no_torch() -> None:
    assert "torch" not in {name.split(".")[0] for name in imports("pl_dendrites.core.phases")}


@pytest.mark.parametrize("room", ROOMS[:-1])  # the whole package's page is for users
def test_every_room_says_what_lives_there(room: str) -> None:
    page = ast.get_docstring(ast.parse(FILES[f"{room}.__init__"].read_text(encoding="utf-8"))) or ""
    files = {name.removeprefix(f"{room}.") for name in FILES if name.startswith(f"{room}.")}
    assert not [name for name in files if "." not in name and name != "__init__" and f"``{name}``" not in page]
    assert "import" in page
