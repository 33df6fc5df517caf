"""The page of trust is made of its stored sections, each by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evidence import results, trust


def test_a_section_is_stored_and_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    trust.section("kills", "Kills", "Often.", [{"verb": "train", "kills": 1}], folder=tmp_path)
    trust.section("flips", "Flips", "All.", [{"file": "a"}, {"file": "b"}], folder=tmp_path)
    trust.section(
        "kills", "Kills", "Often.", [{"verb": "train", "kills": 2}], folder=tmp_path, command="mine"
    )
    stored = json.loads((tmp_path / "trust" / "kills.json").read_bytes())
    assert stored["rows"] == [{"verb": "train", "kills": 2}]
    page = (tmp_path / "trust.md").read_text()
    assert page.index("## Flips\n\nAll.") < page.index("## Kills\n\nOften.")
    assert "| file |\n| --- |\n| a |\n| b |\n" in page
    assert "| verb | kills |\n| --- | --- |\n| train | 2 |\n" in page
    assert "Reproduce: `mine`." in page and page.count("| train |") == 1


def test_rows_have_the_same_keys(tmp_path: Path) -> None:
    for rows in ([], [{"a": 1}, {"b": 1}]):
        with pytest.raises(AssertionError, match="rows differ"):
            trust.section("one", "One", "", rows, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_in_the_repository_is_that_of_its_sections() -> None:
    page = results.FOLDER / "trust.md"
    assert page.exists() == any((results.FOLDER / "trust").glob("*.json"))
    assert not page.exists() or page.read_text(encoding="utf-8") == trust.page()
