"""The notebooks of the documentation, run from top to bottom."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from nbclient import NotebookClient
from notebooks import FOLDER, NOTEBOOKS, differences, read


@pytest.mark.evidence
@pytest.mark.filterwarnings("default")  # what Jupyter's libraries say of each other
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_showed(path: Path) -> None:
    stored = read(path)
    found = deepcopy(stored)
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(found, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert list(differences(stored, found)) == []
