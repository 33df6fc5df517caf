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
    columns = list(rows[0])
    lines = [f"# {title}", "", text, "", f"Machine: {machine()}. Reproduce: `{command}`.", ""]
    lines.append("| " + " | ".join(columns) + " |")
    lines.append("| " + " | ".join("---" for _ in columns) + " |")
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    files.write(FOLDER / f"{name}.md", ("\n".join(lines) + "\n").encode(), force=True)
