"""What fuzzing has found stays found: each stored file is read or refused, within the limits."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from tests.fuzz.limits import SECONDS, memory_limit
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


def test_every_folder_is_a_target() -> None:
    assert FILES
    assert {path.parent.name for path in FILES} <= set(TARGETS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_stored_files(path: Path) -> None:
    target, data = TARGETS[path.parent.name], path.read_bytes()
    target.accepts(target.seeds()[0])  # imports what it needs
    start = time.process_time()
    tracemalloc.start()
    try:
        target.accepts(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < SECONDS
    assert peak <= memory_limit(len(data))


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_accepted(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        assert target.accepts(seed)
