"""Counts of searches, as a section of docs/results/trust.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.evidence import trust
from tests.fuzz.guides import readers
from tests.fuzz.limits import SECONDS
from tests.fuzz.targets import TARGETS

_TEXT = f"""\
Atheris, which follows the branches of the readers, made files from small valid ones; each was given
to the reader in process. A finding is an error that is not one of the named ones, a message of
more than a thousand characters, {SECONDS:.0f} s of processor time, or memory of more than 64 MiB
and four times the file's size. Targets with a second word set checksums, lengths or digests right
behind the change, so that what lies behind them is reached. What was found, and what reading
the code suggested, is fixed and stored in `tests/fuzz/corpus/` and `tests/fuzz/test_hostile.py`,
which `make test` replays; *left* are findings that the present readers still have. Executions
are those of the present readers, at most 500 a run fewer than were made."""

_WARNED = """\
*As warned*: read with a warning that TFLite and LiteRT refuse the file, such as convolutions
without a bias, which TFLite Micro computes with zeros as the reader does (`docs/importing.md`)."""


def left(folder: Path, name: str) -> int:
    """Findings of earlier searches that still are ones."""
    count = 0
    for path in folder.glob("findings/*.bin"):
        try:
            TARGETS[name].accepts(path.read_bytes())
        except Exception:
            count += 1
    return count


def accepted_still(folder: Path) -> int:
    """Files that gave LiteRT other integers and are still read."""
    return sum(
        TARGETS["tflite"].accepts(path.read_bytes())
        for path in folder.glob("tflite/different-*.tflite")
    )


def record(folder: Path) -> None:
    """Store the section."""
    rows: list[dict[str, object]] = []
    counted = ("executions", "accepted", "processor seconds")
    for name in TARGETS:
        counts = [json.loads(p.read_text()) for p in (folder / name).glob("count-*.json")]
        counts = [c for c in counts if c.get("readers") == readers(name)]
        row: dict[str, object] = {"target": name}
        row |= {k: sum(c[k] for c in counts) for k in counted}
        found = len(list((folder / name).glob("findings/*.bin")))
        rows.append({**row, "found": found, "left": left(folder / name, name)})
    total = {k: sum(int(str(row[k])) for row in rows) for k in (*counted, "found", "left")}
    rows.append({"target": "all", **total})
    compared = folder / "tflite" / "compare.json"
    text = _TEXT
    if compared.exists():
        tally = json.loads(compared.read_text())
        counts = ", ".join(f"{n} {kind}" for kind, n in tally.items() if kind != "not covered")
        given = sum(tally.values()) - tally.get("not covered", 0)
        text += f"\n\n{given} of the accepted `.tflite` files were given to LiteRT: {counts}.\n"
        text += _WARNED
        if tally.get("different"):
            text += f" Of the different ones the present reader accepts {accepted_still(folder)}."
    trust.section("fuzzing", "Hostile files", text, rows, command="make fuzz")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
