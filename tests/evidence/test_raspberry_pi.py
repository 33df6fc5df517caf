"""``make pi-check``: the repository's models in our runtime, on emulated CPUs of Raspberry Pis.

The Numba runtime is compiled for the CPU of a Pi 4 and of a Pi 5 and given the very files; its
logits must be the reference executor's, which runs here. An emulator shows that, and no speed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from cactus_edge.execute import execute
from cactus_edge.validate import Peer
from tests import stock
from tests.evidence import emulator
from tests.evidence.matrix.subjects import own

SAMPLES = 8
BOARDS = {"cortex-a72": "Raspberry Pi 4", "cortex-a76": "Raspberry Pi 5"}


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
