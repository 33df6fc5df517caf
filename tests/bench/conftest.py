"""A small model for all that needs a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import random_graph

from cactus_edge import flatbuffer
from cactus_edge.bench import run as bench_run
from cactus_edge.graph import Graph


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in the tests is of no interest, so that little is enough."""
    monkeypatch.setattr(bench_run, "_BATCH_TURNS", 2)
    monkeypatch.setattr(bench_run, "_ENERGY_SECONDS", 0.05)
    monkeypatch.setattr(bench_run, "_LARGEST_FLUSH", 1 << 20)


@pytest.fixture(scope="session")
def small_graph() -> Graph:
    return random_graph(
        np.random.default_rng(7),
        shape=(1, 6, 6, 1),
        operators=("CONV_2D",),
        depth=2,
        bits=(8,),
        sparsity=0.5,
        universal=True,
    )


@pytest.fixture
def small_model(tmp_path: Path, small_graph: Graph) -> Path:
    path = tmp_path / "small.tflite"
    flatbuffer.save(small_graph, path)
    return path
