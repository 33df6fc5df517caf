"""Prints the lines of every source file and their totals; with --base also what a change adds.

`python tools/size.py` lists every file; `python tools/size.py --base main` lists the files whose
size differs from that revision.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cactus_edge", "firmware_sim", "tools", "tests")
SUFFIXES = (".py", ".c", ".h", ".ld", ".s")


def counts_now() -> dict[str, int]:
    """Lines per source file of the working tree."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes().count(b"\n")
        for path in paths
        if path.suffix in SUFFIXES
    }


def counts_at(revision: str) -> dict[str, int]:
    """Lines per source file of a git revision."""
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if known.returncode != 0:
        raise SystemExit(f"size: {revision!r} is no revision of this repository")
    commit = known.stdout.strip()
    command = ["git", "grep", "-c", "", commit, "--", *FOLDERS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts: dict[str, int] = {}
    for line in found.stdout.splitlines():
        path, count = line.removeprefix(f"{commit}:").rsplit(":", 1)
        if path.endswith(SUFFIXES):
            counts[path] = int(count)
    return counts


def print_totals(now: dict[str, int], base: dict[str, int] | None) -> None:
    """Prints one line per top folder, and one for all of them."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for path in sorted(now.keys() | (base or {}).keys()):
        for name in (path.split("/")[0], "total"):
            totals[name][0] += path in now
            totals[name][1] += now.get(path, 0)
            totals[name][2] += now.get(path, 0) - (base or {}).get(path, 0)
    for name in (*FOLDERS, "total"):
        files, lines, difference = totals[name]
        change = "" if base is None else f"  {difference:+7d}"
        print(f"{lines:7d}{change}  {name} ({files} files)")


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description="lines of source, per file and in total")
    parser.add_argument("--base", metavar="REV", help="show the difference from this revision")
    revision: str | None = parser.parse_args().base
    now = counts_now()
    base = None if revision is None else counts_at(revision)
    for path in sorted(now.keys() | (base or {}).keys()):
        if base is None:
            print(f"{now[path]:7d}  {path}")
        elif difference := now.get(path, 0) - base.get(path, 0):
            print(f"{now.get(path, 0):7d}  {difference:+7d}  {path}")
    print_totals(now, base)


if __name__ == "__main__":
    main()
