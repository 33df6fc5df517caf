"""The notebooks of the documentation: found, read, and what their cells print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nbformat
from documents import ROOT, agrees
from nbformat import NotebookNode

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES_VARY = "figures-vary"
"""The tag of a cell whose figures differ between machines."""


def read(path: Path) -> NotebookNode:
    """A notebook, valid in format 4."""
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    return book


def code(book: NotebookNode) -> list[NotebookNode]:
    """The cells that run."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    """What a cell prints, and the text of what it shows."""
    texts = (out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)
    return "".join(texts)


def differences(stored: NotebookNode, found: NotebookNode) -> Iterator[str]:
    """Cells that do not show what they showed."""
    for number, (old, new) in enumerate(zip(code(stored), code(found), strict=True), start=1):
        figures = FIGURES_VARY not in old.metadata.get("tags", ())
        if not agrees(printed(old), printed(new), figures=figures):
            yield f"cell {number} shows\n{printed(new)}\ninstead of\n{printed(old)}"
