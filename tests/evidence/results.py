"""Evidence is written down: a page in ``docs/results/`` and the JSON behind it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from cactus_edge import files

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "results"


def machine() -> str:
    """The processor's name, its cores and the Python version."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((ln.split(":", 1)[1].strip() for ln in lines if "model name" in ln), name)
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def write(
    name: str,
    title: str,
    text: str,
    rows: Sequence[Mapping[str, object]],
    command: str = "make evidence",
) -> None:
    """Write ``name.json`` and ``name.md``; every row has the same keys."""
    record = {"title": title, "machine": machine(), "command": command, "rows": list(rows)}
    files.write(
        FOLDER / f"{name}.json",
        json.dumps(record, indent=2, default=str).encode() + b"\n",
        force=True,
    )
    origin = f"Machine: {machine()}. Reproduce: `{command}`."
    page = f"# {title}\n\n{text}\n\n{origin}\n\n{table(rows)}\n"
    files.write(FOLDER / f"{name}.md", page.encode(), force=True)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as a table in Markdown."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
