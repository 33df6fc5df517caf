"""A virtual environment for the peer alone, and the process that answers from it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cactus_edge import files

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "evidence" / "peers-venv"
PACKAGE = "auto_LiRPA==0.3"
"""The newest release on PyPI; later ones are on GitHub only."""
DEPENDENCIES = ("appdirs", "ninja", "numpy", "packaging", "pyyaml", "tqdm")
"""What it imports beside torch."""
_SERVER = Path(__file__).with_name("lirpa_server.py")


@dataclass(frozen=True)
class Environment:
    """``command`` is the plain installation, ``refusal`` why pip does not do it (or empty)."""

    python: Path
    command: str
    refusal: str


def environment() -> Environment:
    """The environment, made on the first call; a half-made one is made again."""
    record = FOLDER / "installed.json"
    python = FOLDER / "bin" / "python"
    if not record.exists():
        _call(sys.executable, "-m", "venv", "--clear", str(FOLDER))
        _call(str(python), str(ROOT / "tools" / "install_torch.py"))
        pip = (str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check")
        constraints = ("-c", str(ROOT / "constraints.txt"))
        _call(*pip, *constraints, *DEPENDENCIES)
        refusal = _refusal(python)
        _call(*pip, "--no-deps", PACKAGE)
        content = {"command": f"pip install {PACKAGE}", "refusal": refusal}
        files.write(record, json.dumps(content).encode(), force=True)
    stored = json.loads(record.read_text())
    return Environment(python, stored["command"], stored["refusal"])


def _call(*command: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT, stdin=subprocess.DEVNULL)


def _refusal(python: Path) -> str:
    """Why pip does not install the package with its own requirements; empty if it would."""
    pip = (str(python), "-m", "pip", "--disable-pip-version-check")
    done = _answer(*pip, "install", "--dry-run", PACKAGE)
    if not done.returncode:
        return ""
    reasons = [line.strip() for line in done.stdout.splitlines() if " depends on " in line]
    versions = _answer(*pip, "index", "versions", "torch").stdout
    known = next(line for line in versions.splitlines() if line.startswith("Available versions"))
    reasons.append(f"the oldest torch for this Python is {known.split(', ')[-1].strip()}")
    return "; ".join(reasons)


def _answer(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Lirpa:
    """The answering process; a context manager."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [str(python), "-W", "ignore", str(_SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Lirpa:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def ask(self, **request: object) -> dict[str, Any]:
        """The answer to one request; an AssertionError names the log when the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"auto_LiRPA's process has ended on {request}, see {self._log.name}"
        return json.loads(line)
