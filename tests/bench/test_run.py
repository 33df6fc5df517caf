"""``benchmark`` and the verb ``bench``: what is measured, what is absent, what is written."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from graphs import random_inputs

from cactus_edge.bench import benchmark, drawing
from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.bench.child import start
from cactus_edge.bench.peers import PIECE, Model, Ours, TFLitePeer, peer_named, usual_profile
from cactus_edge.bench.roofline import roof
from cactus_edge.bench.work import work
from cactus_edge.cli import run
from cactus_edge.errors import DataError, InvalidGraphError, ToolError, UsageError
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import Graph, Linear

MISSING = TFLitePeer("nowhere", "nowhere-runtime", "nowhere_runtime.interpreter")
LIMITS = Ceilings("test", 100.0, {"L1": 100.0, "DRAM": 10.0}, {"L1": 1 << 15})


def test_benchmark_measures_ours_and_lists_absent_peers(small_graph: Graph) -> None:
    result = benchmark(small_graph, candidates=(MISSING,), rounds=2, batch=5, starts=False)
    own = result.ours
    assert (own.ratio, own.cold_ratio, own.throughput_ratio) == (1, 1, 1)
    assert own.calls == 2 * 20
    assert 0 < own.lower_quartile_us <= own.median_us <= own.upper_quartile_us
    assert own.images_per_second > 0
    assert own.differing == 0 < own.compared
    assert own.start is None
    assert result.batch == PIECE
    assert result.peers == {}
    assert list(result.absent) == ["nowhere"]
    assert "pip install 'cactus-edge[runtimes]'" in result.absent["nowhere"]
    assert result.profile == usual_profile(small_graph)
    assert result.machine


def test_benchmark_on_samples(small_graph: Graph) -> None:
    """Ours is calibrated on some of them, in the process that measures its start too."""
    samples = random_inputs(np.random.default_rng(0), small_graph, 5)
    result = benchmark(
        small_graph, samples=samples, layout="skipping", candidates=(), rounds=1, batch=4
    )
    assert result.ours.start is not None
    with pytest.raises(DataError, match="1 sample: give at least 2"):
        benchmark(small_graph, samples=samples[:1], candidates=(), rounds=1)
    with pytest.raises(DataError, match="outside int8"):
        benchmark(small_graph, samples=samples + 300, candidates=(), rounds=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_benchmark_compares_on_the_same_images(small_graph: Graph, threads: int) -> None:
    pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
    names = ("litert-xnnpack", "litert-builtin")
    candidates = [peer_named(name) for name in names]
    result = benchmark(
        small_graph, candidates=candidates, rounds=3, batch=32, threads=threads, starts=False
    )
    assert tuple(result.peers) == names
    assert result.threads == threads
    for peer in result.peers.values():
        assert peer.version.count(".") == 2
        assert peer.ratio == pytest.approx(peer.median_us / result.ours.median_us)
        assert peer.throughput_ratio == pytest.approx(
            result.ours.images_per_second / peer.images_per_second
        )
        assert peer.cold_us > 0
        assert peer.compared == result.ours.compared
        assert peer.differing == 0


def test_benchmark_wants_rounds_images_and_threads(small_graph: Graph) -> None:
    with pytest.raises(UsageError, match="0 rounds of batch 4 on 1 thread:"):
        benchmark(small_graph, rounds=0, batch=4)
    with pytest.raises(UsageError, match="no layout 'dusty'"):
        benchmark(small_graph, layout="dusty", candidates=(), rounds=1)
    last = small_graph.core[-1]
    assert isinstance(last, Linear)
    bad = replace(last, bias=np.full(last.channels, 2**31 - 1))
    broken = replace(small_graph, operators=(*small_graph.operators[:-1], bad))
    with pytest.raises(InvalidGraphError, match="2\\^27"):
        benchmark(broken, candidates=(), rounds=1)


def test_work_counts_products_and_zeros(small_graph: Graph) -> None:
    counted = work(small_graph)
    layers = [op for op in small_graph.core if isinstance(op, Linear)]
    products = useful = 0
    for op in layers:
        pixels = small_graph.tensors[op.output].size // op.channels
        products += op.weights.values.size * pixels
        useful += int((op.weights.values != 0).sum()) * pixels
    assert (counted.multiplications, counted.useful_multiplications) == (products, useful)
    assert counted.weights == counted.weight_bytes == sum(op.weights.values.size for op in layers)
    assert counted.sparsity == pytest.approx(1 - counted.nonzero_weights / counted.weights)
    assert 0.3 < counted.sparsity < 0.7
    assert counted.bits == 8
    narrow = [replace(op, weights=replace(op.weights, bits=4)) for op in layers]
    assert work(replace(small_graph, operators=tuple(narrow))).weight_bytes == sum(
        (op.weights.values.size + 1) // 2 for op in layers
    )


# ---------------------------------------------------------------------- processes of their own
@pytest.mark.parametrize("name", ["cactus-edge", "litert-xnnpack"])
def test_start_is_measured_in_a_process_of_its_own(small_graph: Graph, name: str) -> None:
    if name != "cactus-edge":
        pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
    model = Model(small_graph, write_tflite(small_graph))
    begun = start(name, model, bytes(36), 1, Ours(usual_profile(small_graph)))
    assert begun.load_seconds > 0
    assert begun.first_call_us > 0
    assert begun.peak_kib is None or begun.peak_kib > 10_000
    assert begun.memory_kib is None or begun.peak_kib is None or begun.memory_kib < begun.peak_kib


def test_a_process_that_fails_says_why(small_graph: Graph) -> None:
    model = Model(small_graph, write_tflite(small_graph))
    with pytest.raises(ToolError, match="nobody: no peer 'nobody'"):
        start("nobody", model, bytes(36), 1, Ours())
    with pytest.raises(ToolError, match="cactus-edge: no rounding profile 'round'"):
        start("cactus-edge", model, bytes(36), 1, Ours(profile="round"))


def test_a_first_start_reads_no_cache(small_graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    environments: list[dict[str, str] | None] = []

    def answer(
        _: list[str], *, env: dict[str, str] | None, **options: object
    ) -> subprocess.CompletedProcess[bytes]:
        environments.append(env)
        if env is not None:
            assert list(Path(env["NUMBA_CACHE_DIR"]).iterdir()) == []
        text = b'{"load_seconds": 1, "first_call_us": 2, "memory_kib": null, "peak_kib": null}'
        return subprocess.CompletedProcess([], 0, text, b"")

    monkeypatch.setattr("cactus_edge.bench.child.subprocess.run", answer)
    model = Model(small_graph, b"")
    assert start("cactus-edge", model, b"", 1, Ours()).load_seconds == 1
    start("cactus-edge", model, b"", 1, Ours(), compiled=False)
    assert environments[0] is None
    assert environments[1] is not None
    assert not Path(environments[1]["NUMBA_CACHE_DIR"]).exists()


# ---------------------------------------------------------------------- figures
def test_drawings_are_the_same_every_time(small_graph: Graph, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = benchmark(small_graph, candidates=(), rounds=1, batch=1, starts=False)
    denser = replace(result, work=replace(result.work, sparsity=0.0))
    texts: list[str] = []
    for name in ("a.svg", "b.svg"):
        drawing.draw_sparsity([result, denser], tmp_path / name, "Latency")
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1]
    assert "Latency" in texts[0]
    roofs = {"small": roof(result.work, result.ours.median_us, LIMITS)}
    drawing.draw_roofline(roofs, LIMITS, tmp_path / "roof.svg", "Roof")
    assert "L1 100 GB/s" in (tmp_path / "roof.svg").read_text()


# ---------------------------------------------------------------------- the verb
def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_verb_prints_one_object_for_one_model(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
    code, out, _ = call(
        capsys, "bench", small_model, "--peer", "litert-xnnpack", "--rounds", 1, "--batch", 1,
        "--no-starts", "--json",
    )  # fmt: skip
    assert code == 0
    shown = json.loads(out)
    assert shown["model"] == "small.tflite"
    assert shown["ours"]["median_us"] > 0
    peer = shown["peers"]["litert-xnnpack"]
    assert peer["ratio"] == pytest.approx(peer["median_us"] / shown["ours"]["median_us"])
    assert shown["roof"] is None
    assert shown["ceilings"] is None


def test_verb_takes_several_models_and_threads_and_draws(
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr("cactus_edge.bench.ceilings.measure", lambda: LIMITS)
    again = tmp_path / "again.tflite"
    again.write_bytes(small_model.read_bytes())
    plot, roofline = tmp_path / "plot.svg", tmp_path / "roofline.svg"
    arguments = (
        "bench", small_model, "--rounds", 1, "--batch", 1, "--no-starts",
        "--peer", "litert-xnnpack", "--plot", plot, "--roofline", roofline,
    )  # fmt: skip
    code, out, _ = call(capsys, *arguments, again, "--threads", 1, "--threads", 2, "--json")
    assert code == 0
    shown = json.loads(out)
    assert [(row["model"], row["threads"]) for row in shown] == [
        ("small.tflite", 1), ("small.tflite", 2), ("again.tflite", 1), ("again.tflite", 2),
    ]  # fmt: skip
    assert [row["roof"] is None for row in shown] == [False, True, False, True]
    assert shown[0]["ceilings"]["products"] == 100
    assert plot.read_text().startswith("<?xml")
    assert "again" in roofline.read_text()
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "exists already" in err
    code, out, _ = call(capsys, *arguments, "--force")
    assert code == 0
    assert "Ceilings of one thread (test): 100 GMAC/s" in " ".join(out.split())


def test_verb_names_peers(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "bench", small_model, "--peer", "nobody")
    assert code == 2
    assert "no peer 'nobody'" in err
