"""Notebooks are well-formed, ran from top to bottom, and import what exists; evidence runs them."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import notebooks
import pytest
from documents import Block
from notebooks import NOTEBOOKS, code, read
from test_documents import check_imports

LARGEST = 100_000


def test_the_page_lists_them() -> None:
    page = (notebooks.FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([\w-]+\.ipynb)\)", page)
    assert sorted(listed) == [path.name for path in NOTEBOOKS] and len(listed) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_whole(path: Path) -> None:
    book = read(path)
    assert path.stat().st_size < LARGEST
    assert book.cells[0].source.startswith("# ") and book.metadata.kernelspec.name == "python3"
    cells = code(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = {output.output_type for output in cell.outputs}
        assert kinds <= {"stream", "execute_result", "display_data"}
        assert {output.get("name", "stdout") for output in cell.outputs} <= {"stdout"}
    assert not re.search(r"/tmp/|/home/|/root/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_code_compiles_and_its_imports_exist(path: Path) -> None:
    cells = code(read(path))
    for number, cell in enumerate(cells, start=1):
        compile(cell.source, f"{path.name}, cell {number}", "exec")
        check_imports(Block(path, number, "python", cell.source, "", False))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and [link for link in links if not (path.parent / link).exists()] == []


def test_differences_are_found() -> None:
    def book(text: str, *tags: str) -> nbformat.NotebookNode:
        output = nbformat.v4.new_output("stream", text=text)
        cell = nbformat.v4.new_code_cell("print()", outputs=[output], metadata={"tags": [*tags]})
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), cell])

    vary = notebooks.FIGURES_VARY
    assert list(notebooks.differences(book("a 1"), book("a 1"))) == []
    assert list(notebooks.differences(book("a 1", vary), book("a 2.5", vary))) == []
    (found,) = notebooks.differences(book("a 1"), book("a 2"))
    assert found.startswith("cell 1 shows\na 2")
    assert len(list(notebooks.differences(book("a 1", vary), book("b 1", vary)))) == 1
