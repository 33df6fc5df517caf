"""Our runtime beside its peers on trained and pruned networks; see ``bench_networks``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cactus_edge import datasets, flatbuffer, inputs
from cactus_edge.bench import Benchmark, Figures, benchmark, ceilings
from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.bench.child import Start, start
from cactus_edge.bench.machine import State
from cactus_edge.bench.peers import Model, Ours, usual_profile
from cactus_edge.bench.work import Work
from cactus_edge.errors import ToolError
from cactus_edge.kernels.simd.tiers import features
from cactus_edge.runtime import Session
from tests.evidence import bench_networks, bench_page, results
from tests.evidence.bench_networks import Entry, Trained
from tests.evidence.bench_page import Record, Row

ROUNDS = 8
THREADS = (1, 2)
BATCH = {"mlp": 1024, "cnn-small": 1024, "cnn-7": 128}
SAMPLES = {"mlp": 10_000, "cnn-small": 10_000, "cnn-7": 1000}


logger = logging.getLogger(__name__)


def measure(
    entries: Sequence[Entry], *, rounds: int = ROUNDS, threads: Sequence[int] = THREADS
) -> Record:
    """Accuracy of the deployed integers, and every runtime's figures, model by model."""
    rows = tuple(_row(entry, rounds, threads) for entry in entries)
    networks = dict.fromkeys(entry.network for entry in entries)
    trained = [t for network in networks for t in bench_networks.training(network)]
    try:
        best = ceilings.measure()
    except ToolError:
        best = None
    return Record(rows, tuple(trained), best, rounds, _compile_seconds(entries[0]))


def _compile_seconds(entry: Entry) -> float:
    """The first load of all on a machine."""
    graph, content = flatbuffer.load(entry.path)
    image = bytes(graph.tensors[graph.core_input].size)
    own = Ours(usual_profile(graph))
    return start(own.name, Model(graph, content), image, 1, own, compiled=False).load_seconds


def _row(entry: Entry, rounds: int, threads: Sequence[int]) -> Row:
    logger.info("%s", entry.path.name)
    graph, content = flatbuffer.load(entry.path)
    count = SAMPLES[entry.network]
    data = datasets.load(entry.data, "test")
    stored = inputs.stored(graph, data.images[:count])
    logits = Session(graph, usual_profile(graph)).run(stored)
    hits = logits.reshape(count, -1).argmax(1) == data.labels[:count]
    measured = {
        number: benchmark(
            graph,
            model=content,
            rounds=rounds,
            batch=BATCH[entry.network],
            threads=number,
            starts=number == 1 and entry.bits == 8 and entry.sparsity in (0, 0.9),
        )
        for number in threads
    }
    return Row(entry, float(np.mean(hits)), count, measured)


@pytest.mark.evidence
def test_performance(data_dir: Path) -> None:
    record = measure(bench_networks.make())
    bench_page.write(record, results.FOLDER)
    for row in record.rows:
        for result in row.results.values():
            for name, figures in result.peers.items():
                # torch has no profile: it rounds biases in its own way, and where the CPU has no
                # VNNI it adds pairs of products with saturation.
                exact = any("vnni" in feature for feature in features())
                limit = figures.compared // (5 if exact else 1) if name.startswith("torch") else 0
                assert figures.differing <= limit, (row.name, name)


# ---------------------------------------------------------------------- the page itself
def figures(median: float, ratio: float) -> Figures:
    begun = Start(0.5, 100.0, 2048, 99_000)
    return Figures(
        "1.2", median, median, median, 20, ratio, (ratio, ratio), 5 * median, ratio,
        1e6 / median, ratio, 0, 160, begun,
    )  # fmt: skip


def record() -> Record:
    state = State(None, None, None, None, None)
    one = Benchmark(
        machine="Test machine",
        caches={"L1": 32 << 10},
        python="3.11",
        before=state,
        after=state,
        profile="p",
        layout="auto",
        threads=1,
        batch=64,
        work=Work(2_500_000, 1_250_000, 10_000, 5000, 10_000, 8, 0.5),
        ours=figures(10.0, 1.0),
        peers={"litert-xnnpack": figures(25.0, 2.5)},
        absent={"onnxruntime": "not installed"},
        microjoules=None,
    )
    two = replace(one, threads=2, ours=figures(6.0, 1.0))
    entry = Entry("cnn-7", 8, 0.5, "unstructured", Path("nowhere"))
    blocks = replace(entry, sparsity=0.9, pattern="32x4 blocks")
    limits = Ceilings("avx512", 500.0, {"L1": 400.0, "DRAM": 20.0}, {"L1": 32 << 10})
    made = (Trained("cnn-7", "unstructured", 0.5, 61.0, 0.5),)
    rows = (Row(entry, 0.4321, 1000, {1: one, 2: two}), Row(blocks, 0.3, 1000, {1: one, 2: two}))
    return Record(rows, made, limits, 30, 21.4)


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    bench_page.write(record(), tmp_path)
    text = (tmp_path / "performance-avx512.md").read_text()
    assert "| cnn-7 | int8 | 50 % | 43.21 | 1000 | 2.50 |" in text
    assert "| cnn-7 int8 90 % in 32x4 blocks | 10.00 | 25.00 (x2.50) |" in text
    assert "| cnn-7 int8 50 % | 6.00 | 25.00 (x2.50) |" in text
    assert "| cnn-7 int8 50 % | 100,000 | 40,000 (x2.50) |" in text
    assert "| cnn-7 int8 50 % | L1 | 250.0 | 125.0 | 50 % | 25 % |" in text
    assert "| cnn-7 int8 50 % | litert-xnnpack | 0.50 | 100 | 2.0 |" in text
    assert "onnxruntime absent (not installed)" in text
    assert "our first load takes 21 s" in text
    assert "no counter" in text
    for name in ("performance-avx512-cnn-7-int8.svg", "performance-avx512-roofline.svg"):
        assert f"({name})" in text
        assert (tmp_path / name).read_text().startswith("<?xml")


def test_overview_has_every_tier(tmp_path: Path) -> None:
    other = record()
    limits = Ceilings("avx2", 90.0, {"L1": 90.0, "DRAM": 9.0}, {"L1": 32 << 10})
    bench_page.write(record(), tmp_path)
    bench_page.write(replace(other, ceilings=limits), tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "## Tier avx2: Test machine" in text
    assert "[All figures](performance-avx512.md)" in text
    assert text.count("| cnn-7 int8 90 % in 32x4 blocks | 2.50 |") == 2


def test_page_counts_the_outputs_that_differ() -> None:
    page = bench_page.page(record(), [])
    assert "All runtimes gave the same integers." in page
    same = record()
    result = same.rows[0].results[1]
    peer = replace(result.peers["litert-xnnpack"], differing=3)
    row = replace(same.rows[0], results={1: replace(result, peers={"litert-xnnpack": peer})})
    page = bench_page.page(replace(same, rows=(row,)), [])
    assert "single logits: litert-xnnpack in 3 of 160." in page


def test_json_has_ours_and_peers_by_threads(tmp_path: Path) -> None:
    bench_page.write(record(), tmp_path)
    stored = json.loads((tmp_path / "performance-avx512.json").read_text())
    row = stored["rows"][0]
    assert row["threads"]["1"]["ours"]["median_us"] == 10
    assert row["threads"]["1"]["peers"]["litert-xnnpack"]["ratio"] == 2.5
    assert row["roof"]["dense_us"] == 5
    assert (stored["command"], stored["machine"]) == ("make bench", "Test machine")


def test_blocks_keep_whole_blocks_of_the_deployed_layout() -> None:
    """32 channels by 4 neighbouring inputs are zero together, behind the flattening too."""
    network = bench_networks.cnn7()
    masks = bench_networks.block_masks(network)
    assert set(masks) == {"conv2", "conv3", "conv4", "conv5", "fc1"}
    for name, mask in masks.items():
        assert mask.float().mean().item() == pytest.approx(0.1, abs=0.01), name
        deployed = mask.numpy()
        if deployed.ndim == 2:
            deployed = deployed.reshape(512, 128, 16, 16)
        deployed = deployed.transpose(0, 2, 3, 1).reshape(len(deployed), -1)
        blocks = deployed.reshape(len(deployed) // 32, 32, -1, 4)
        np.testing.assert_array_equal(blocks.any((1, 3)), blocks.all((1, 3)))
