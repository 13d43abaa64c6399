"""Runs the notebooks of the gallery and makes their pages: ``make notebooks``, or this file with names of notebooks.

``notebooks/NAME.ipynb`` is what is edited. What its cells show is stored in it, and ``notebooks/NAME.md`` is the same
for the site, which needs nothing but Markdown for it. Both are committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).resolve().parent / "notebooks"


def run(path: Path) -> None:
    """Run a notebook from its first cell to its last, and store what they show."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run it
    nbformat.write(notebook, path)


def write_page(path: Path) -> None:
    """Write a notebook, with what is stored in it, as Markdown."""
    page, _ = MarkdownExporter().from_filename(str(path))
    title, _, rest = page.partition("\n")
    download = f"This page is a notebook: [download {path.name}]({path.name})."
    path.with_suffix(".md").write_text(f"{title}\n\n{download}\n{rest.rstrip()}\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        run(FOLDER / f"{name}.ipynb")
        write_page(FOLDER / f"{name}.ipynb")
