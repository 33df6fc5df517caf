"""The page of trust, ``docs/results/trust.md``: one section for each file of ``trust/``.

A test stores its section, and the page is made anew from all that are stored, so that each can be
measured on its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from cactus_edge import files
from tests.evidence import results

COMMAND = "make evidence-trust"
_HEAD = """\
# What was done to break it

Each section is what one test measured, and its figures are those of a JSON file in `trust/`. What
an attacker or an accident may reach, and what not, is in [SECURITY.md](../../SECURITY.md).
"""


class Section(TypedDict):
    """A stored section, ``NAME.json``; every row has the same keys."""

    title: str
    text: str
    machine: str
    command: str
    rows: list[dict[str, object]]


def section(
    name: str,
    title: str,
    text: str,
    rows: Sequence[Mapping[str, object]],
    *,
    command: str = COMMAND,
    folder: Path = results.FOLDER,
) -> None:
    """Store a section below ``folder``, in the place of an earlier one, and make the page anew.

    Args:
        name: of its file; sections stand on the page in the order of their names.
        title: heading of the section.
        text: what was done, in Markdown.
        rows: the figures; every row has the same keys.
        command: measures them again.
        folder: gets ``trust.md`` and ``trust/NAME.json``.
    """
    assert rows and all(list(row) == list(rows[0]) for row in rows), "rows differ in their keys"
    stored = Section(
        title=title,
        text=text,
        machine=results.machine(),
        command=command,
        rows=[dict(row) for row in rows],
    )
    data = json.dumps(stored, indent=2, default=str).encode() + b"\n"
    files.write(folder / "trust" / f"{name}.json", data, force=True)
    files.write(folder / "trust.md", page(folder).encode(), force=True)


def page(folder: Path = results.FOLDER) -> str:
    """The page of the sections that are stored below ``folder``."""
    paths = sorted((folder / "trust").glob("*.json"))
    return "\n".join([_HEAD, *(_shown(json.loads(path.read_bytes())) for path in paths)])


def _shown(stored: Section) -> str:
    origin = f"Machine: {stored['machine']}. Reproduce: `{stored['command']}`."
    table = results.table(stored["rows"])
    return f"## {stored['title']}\n\n{stored['text']}\n\n{origin}\n\n{table}\n"


if __name__ == "__main__":  # after a merge of sections
    files.write(results.FOLDER / "trust.md", page().encode(), force=True)
