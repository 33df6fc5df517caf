"""``make pi-check``: the repository's models in our runtime, on emulated CPUs of Raspberry Pis.

The Numba runtime is compiled for the CPU of a Pi 4 and of a Pi 5 and given the very files; its
logits must be the reference executor's, which runs here. An emulator shows that, and no speed.
What the guides have the reader type on the board is run there, too, with the packages that pip
chooses for one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from cactus_edge import datasets
from cactus_edge.cli import run
from cactus_edge.execute import execute
from cactus_edge.validate import Peer
from tests import documents, stock
from tests.evidence import emulator
from tests.evidence.matrix.subjects import own

SAMPLES = 8
BOARDS = {"cortex-a72": "Raspberry Pi 4", "cortex-a76": "Raspberry Pi 5"}


GUIDES = ("docs/tutorials/raspberry-pi.md", "docs/raspberry-pi.md")
UNTIL = "## 2. On the board"
"""What stands above it in a guide is typed on the computer."""
ELSEWHERE = {
    "--learn-profile": "asks the stock runtimes, see docs/results/runtimes.md",
}
"""Options of commands that the emulated board cannot run, and why."""
SCRIPT = "import sys; from cactus_edge.cli import run; sys.exit(run(sys.argv[1:]))"
SYSTEMS = {"Raspberry Pi OS 12": "3.11", "Raspberry Pi OS 13": "3.13"}
_GLIBC = (17, 27, 28)
"""Wheels of these versions and older ones run on both systems."""


@pytest.fixture(scope="module")
def emulated() -> None:
    try:
        emulator.prepare()
    except emulator.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.evidence
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_dependency_of_a_device_has_a_wheel(system: str, tmp_path: Path) -> None:
    """By pip's own resolver, which here may not build anything."""
    project = tomllib.loads((emulator.ROOT / "pyproject.toml").read_text())["project"]
    tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in _GLIBC)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "-q", "--ignore-installed"]
    command += ["--report", "-", "--only-binary=:all:", "--target", str(tmp_path)]
    command += [part for tag in tags for part in ("--platform", tag)]
    command += ["--python-version", SYSTEMS[system], *project["dependencies"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [part["metadata"] for part in json.loads(done.stdout)["install"]]
    names = {part["name"].lower() for part in found}
    assert {"numba", "numpy", "llvmlite", "tflite"} <= names
    assert not names & {"torch", "scipy"}
    print(f"\n{system}:", ", ".join(f"{part['name']} {part['version']}" for part in found))


@pytest.mark.evidence
@pytest.mark.usefixtures("emulated")
def test_models_of_the_repository_on_emulated_boards() -> None:
    subjects = list(own())
    table = Table(
        "board", "model", "logits", "mismatches", "SHA-256", title="Raspberry Pi, emulated"
    )
    mismatches = 0
    for cpu in emulator.CPUS.values():
        peer = Peer(
            "numba", "", "tests.evidence.session_runtime", "", "micro", "tflite-micro",
            emulator.python(cpu), "own",
        )  # fmt: skip
        parts = [
            (one.model, one.graph.tensors[one.graph.logits].name, one.inputs[:SAMPLES])
            for one in subjects
        ]
        for one, found in zip(subjects, stock.Layers(peer).run(parts), strict=True):
            wanted = execute(one.graph, one.inputs[:SAMPLES])
            wrong = int(np.count_nonzero(found.reshape(wanted.shape) != wanted))
            digest = hashlib.sha256(found.astype(np.int8).tobytes()).hexdigest()[:12]
            board = f"{BOARDS[cpu]} ({cpu})"
            table.add_row(board, one.name, str(wanted.size), str(wrong), digest)
            mismatches += wrong
    Console(width=100).print(table)
    assert len(subjects) == table.row_count // len(BOARDS) > 0
    assert mismatches == 0


@pytest.mark.evidence
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("page", GUIDES)
def test_what_a_guide_types_on_the_board(page: str, tmp_path: Path) -> None:
    board = Board(tmp_path)
    work = board.work
    shutil.copy(emulator.ROOT / "models" / "digits-0.05" / "model.tflite", work)
    test = datasets.load("digits", "test")
    parts = {"x": test.images[:100], "y": np.asarray(test.labels[:100])}
    np.savez(
        work / "digits.npz", **{f"{n}_{s}": parts[n] for n in parts for s in ("train", "test")}
    )
    words = ["certify", work / "model.tflite", "--data", work / "digits.npz", "--eps", "0.05"]
    assert run([*map(str, words), "-o", str(work / "model.jsonl")]) == 0
    source = emulator.ROOT / page
    blocks = documents.blocks(source)
    lines = source.read_text().splitlines()
    first = lines.index(UNTIL) if UNTIL in lines else 0
    typed, shown = 0, ""
    for block in blocks:
        if block.line <= first:
            continue
        if block.language == "text":
            assert documents.agrees(block.text, shown), (block, shown)
        elif block.language == "python":
            shown = board.call("-c", block.text)[0]
            typed += 1
        elif block.language in ("bash", "console"):
            for command in documents.commands(block):
                words = documents.words(command.text)
                if words[0] != "cactus-edge" or any(word in ELSEWHERE for word in words):
                    continue
                found = "".join(board.call("-c", SCRIPT, *words[1:], *board.options(words[1])))
                assert documents.agrees(command.shown or "...", found), (command, found)
                typed += 1
    print(f"\n{page}: {typed} commands on an emulated Cortex-A72")
    assert typed >= 4


class Board:
    """A folder on an emulated Pi 4, with our wheel and what pip installs with it there."""

    def __init__(self, folder: Path) -> None:
        self.site, self.work = folder / "site", folder / "work"
        self.work.mkdir()
        python = emulator.python(emulator.CPUS["neon"])
        assert python.environment is not None
        self.command = python.command
        self.environment = {
            **python.environment,
            "PYTHONPATH": str(self.site),
            "NUMBA_CACHE_DIR": str(folder / "cache"),
            "HOME": str(self.work),
            "COLUMNS": "160",
        }
        pip = [sys.executable, "-m", "pip"]
        wheel = [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(emulator.ROOT)]
        subprocess.run(wheel, check=True)
        (built,) = folder.glob("*.whl")
        version = Path(self.command[-1]).name.removeprefix("python")
        tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in _GLIBC)]
        platforms = [part for tag in tags for part in ("--platform", tag)]
        install = [*pip, "install", "-q", "--only-binary=:all:", "--target", str(self.site)]
        install += [*platforms, "--python-version", version, f"{built}[digits]"]
        subprocess.run(install, check=True)

    def call(self, *words: str) -> tuple[str, str]:
        """What Python prints there, and its errors."""
        done = subprocess.run(
            [*self.command, *words],
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=3600,
            check=False,
        )
        assert done.returncode == 0, (words[2:], done.stdout, done.stderr)
        return done.stdout, done.stderr

    @staticmethod
    def options(verb: str) -> tuple[str, ...]:
        """Of a verb: what starts processes of the board's Python would start this machine's."""
        return ("--no-starts", "--rounds", "2", "--batch", "4") if verb == "bench" else ()
