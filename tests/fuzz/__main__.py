"""``make fuzz``: each target in turn, ``CACTUS_EDGE_FUZZ_SECONDS`` seconds (60 without it).

Targets of ``LONGER`` take that many times as long. ``.tflite`` files that were accepted are then
run by LiteRT, see ``compare``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.fuzz.record import record
from tests.fuzz.targets import TARGETS

FOLDER = Path("build/fuzz")
LONGER = {"tflite": 6, "onnx": 6}


def main() -> int:
    seconds = int(os.environ.get("CACTUS_EDGE_FUZZ_SECONDS", "60"))
    failed = 0
    for name in TARGETS:
        length = str(seconds * LONGER.get(name, 1))
        command = [sys.executable, "-m", "tests.fuzz.search", name, "--seconds", length]
        done = subprocess.run([*command, "--folder", str(FOLDER)], check=False)
        found = sorted((FOLDER / name / "findings").glob("*.bin"))
        failed += bool(done.returncode or found)
        print(f"{name}: exit code {done.returncode}, {len(found)} findings", flush=True)
        for path in found:
            print(f"  {path}: {path.with_suffix('.txt').read_text().splitlines()[-1]}")
    command = [sys.executable, "-m", "tests.fuzz.compare", str(FOLDER / "tflite" / "accepted")]
    failed += subprocess.run(command, check=False).returncode
    record(FOLDER)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
