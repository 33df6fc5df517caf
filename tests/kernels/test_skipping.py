"""Kernels that skip inputs at the zero point: what they compute, list, and when they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cactus_edge import profiles
from cactus_edge.errors import DataError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import (
    Add,
    Conv2D,
    FullyConnected,
    Graph,
    Linear,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.kernels import choose
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.program import Program, build
from cactus_edge.kernels.replay import SAMPLES, Replay, chosen_samples, median_seconds
from cactus_edge.kernels.simd.emit import activation_shift
from cactus_edge.kernels.simd.skipping import AHEAD
from cactus_edge.kernels.simd.tiers import Tier, available
from cactus_edge.kernels.simd.tiers import choose as fastest_tier
from cactus_edge.kernels.steps import DENSE, SKIPPING, STREAM
from cactus_edge.kernels.threads import ParallelWorker
from cactus_edge.kernels.walk import Frame
from cactus_edge.runtime import Session
from cactus_edge.semantics import Rounding
from tests.graphs import random_graph
from tests.kernels.cases import unit_factors

SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.sampled_from((0.0, 0.3, 0.8, 0.97, 1.0))
TIER = fastest_tier()
DEAD = activation_shift(TIER) - 128
"""The zero point, stored, of inputs that can be skipped."""
vector = pytest.mark.skipif(TIER is Tier.PLAIN, reason="the plain tier has no such layout")


def network(
    rng: np.random.Generator, widths: list[int], bits: int, zeros: list[int], pixel: bool = False
) -> Graph:
    """FULLY_CONNECTED layers, or convolutions of one pixel; outputs spread over their range."""
    head = (1, 1, 1) if pixel else (1,)
    tensors = [
        Tensor(f"t{i}", (*head, width), quantization=Quantization.of(1.0, zero))
        for i, (width, zero) in enumerate(zip(widths, zeros, strict=True))
    ]
    operators: list[Linear] = []
    for i, (inputs, channels) in enumerate(zip(widths, widths[1:], strict=False)):
        operators.append(linear(rng, i, i + 1, inputs, channels, bits, pixel))
    return Graph(tuple(tensors), tuple(operators), 0, len(widths) - 1)


def linear(
    rng: np.random.Generator,
    source: int,
    target: int,
    inputs: int,
    channels: int,
    bits: int,
    pixel: bool = False,
) -> Linear:
    least = -(1 << (bits - 1))
    values = rng.integers(least, -least, (channels, inputs)).astype(np.int8)
    values[rng.random(values.shape) < rng.choice((0.0, 0.5))] = 0
    halvings = round(np.log2(-1.5 * least * inputs**0.5))  # outputs take all of their range
    common = {
        "name": f"layer {source} {target}",
        "inputs": (source,),
        "output": target,
        "bias": rng.integers(-500, 500, channels).astype(np.int32),
        "requantization": unit_factors(rng.choice(list(Rounding)), channels, halvings),
    }
    if pixel:
        weights = Weights(values[:, None, None, :], bits)
        return Conv2D(weights=weights, padding=Padding.VALID, **common)  # type: ignore
    return FullyConnected(weights=Weights(values, bits), **common)  # type: ignore


def images(
    rng: np.random.Generator, graph: Graph, count: int, share: float, clustered: bool = False
) -> np.ndarray:
    """Stored inputs, int8, with a share of zero points, alone or side by side."""
    tensor = graph.tensors[graph.core_input]
    x = rng.integers(-128, 128, (count, tensor.size))
    dead = rng.random(x.shape) < share
    if clustered:
        dead = np.repeat(dead[:, ::20], 20, axis=1)[:, : tensor.size]
    x[dead] = tensor.zero_point
    return x.reshape(count, *tensor.shape[1:]).astype(np.int8)


def program_of(graph: Graph, layout: Layout = Layout.SKIPPING, tier: Tier = TIER) -> Program:
    return build(graph, core_tensors(graph), 1, layout, tier)


def by_program(
    program: Program, graph: Graph, x: np.ndarray, threads: int
) -> dict[int, np.ndarray]:
    """Every activation of images that are computed one by one."""
    worker = ParallelWorker(program, threads, grain=0)
    results = np.zeros((len(x), program.result_bytes), np.uint8)
    worker.run(np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8), results)
    worker.close()
    return {
        tensor: results[:, begin : begin + graph.tensors[tensor].size]
        .view(np.int8)
        .reshape(-1, *graph.tensors[tensor].shape[1:])
        for tensor, begin in program.results.items()
    }


# ---------------------------------------------------------------------- results
@settings(max_examples=30)
@given(
    SEEDS,
    st.lists(st.integers(1, 180), min_size=2, max_size=4),
    st.sampled_from((8, 8, 4, 2)),
    st.lists(st.sampled_from((-128, -128, 0, 127, -3)), min_size=4, max_size=4),
    SHARES,
    st.booleans(),
    st.sampled_from((1, 2)),
)
@example(0, [600, 70], 8, [-128] * 4, 0.9, False, 1)
@example(0, [600, 70], 4, [-128] * 4, 0.9, False, 2)
def test_any_share_of_dead_inputs(
    seed: int,
    widths: list[int],
    bits: int,
    zeros: list[int],
    share: float,
    pixel: bool,
    threads: int,
) -> None:
    rng = np.random.default_rng(seed)
    graph = network(rng, widths, bits, zeros[: len(widths)], pixel)
    x = images(rng, graph, 3, share, clustered=bool(seed % 2))
    expected = execute_all(graph, x)
    for tier in available():
        program = program_of(graph, tier=tier)
        for number, op in enumerate(graph.core):
            shift = activation_shift(tier) - 128
            able = tier is not Tier.PLAIN and graph.tensors[op.inputs[0]].zero_point == shift
            usual = DENSE if tier is Tier.PLAIN else STREAM
            assert program.opcode(number) == (SKIPPING if able else usual)
        for tensor, values in by_program(program, graph, x, threads).items():
            np.testing.assert_array_equal(values, expected[tensor], f"tier {tier}")


@settings(max_examples=20)
@given(SEEDS, SHARES, st.sampled_from(Layout))
def test_sessions(seed: int, share: float, layout: Layout) -> None:
    """One image, a batch, and samples that calibrate."""
    rng = np.random.default_rng(seed)
    widths = [int(rng.integers(1, 300)), int(rng.integers(1, 90)), 7]
    graph = network(rng, widths, int(rng.choice((4, 8))), [DEAD, DEAD, 3])
    x = images(rng, graph, 9, share)
    expected = execute(graph, x)
    for tier in available():
        session = Session(graph, layout=layout, threads=2, tier=tier, calibration=x[:4])
        np.testing.assert_array_equal(session.run(x), expected)
        for i in range(3):
            np.testing.assert_array_equal(session.run(x[i : i + 1]), expected[i : i + 1])


def bordered() -> Graph:
    """A FULLY_CONNECTED layer reads the inside of a tensor that has a border for a convolution."""
    rng = np.random.default_rng(3)
    zero = Quantization.of(1.0, DEAD)
    tensors = (
        Tensor("x", (1, 4, 3, 5), quantization=zero),
        Tensor("convolved", (1, 4, 3, 5), quantization=zero),
        Tensor("flat", (1, 60), quantization=zero),
        Tensor("left", (1, 60), quantization=zero),
        Tensor("right", (1, 60), quantization=zero),
        Tensor("other", (1, 60), quantization=zero),
        Tensor("sum", (1, 60), quantization=zero),
    )
    weights = Weights(rng.integers(-9, 9, (5, 3, 3, 5)).astype(np.int8), 8)
    convolution = Conv2D(
        name="convolution",
        inputs=(0,),
        output=1,
        weights=weights,
        bias=np.zeros(5, np.int32),
        padding=Padding.SAME,
        requantization=unit_factors(Rounding.FLOAT32, 5, 6),
    )
    operators = (
        convolution,
        Reshape(name="a", inputs=(0,), output=2),
        linear(rng, 2, 3, 60, 60, 8),
        Reshape(name="b", inputs=(1,), output=4),
        linear(rng, 4, 5, 60, 60, 8),
        Add(name="add", inputs=(3, 5), output=6),
    )
    return profiles.resolve(Graph(tensors, operators, 0, 6))


@pytest.mark.parametrize("threads", [1, 2])
def test_inputs_in_several_runs(threads: int) -> None:
    graph = bordered()
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5, 0.9):
        x = images(rng, graph, 20, share, clustered=True)
        expected = execute_all(graph, x)
        for tier in available():
            program = program_of(graph, tier=tier)
            if tier is TIER and tier is not Tier.PLAIN:
                step = program.steps[program.operators.index(2)]
                assert step["opcode"] == SKIPPING and step["run_count"] == 4
            for tensor, values in by_program(program, graph, x, threads).items():
                np.testing.assert_array_equal(values, expected[tensor], f"tier {tier}")


# ---------------------------------------------------------------------- the list of live steps
@vector
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 3, 4, 8, 31, 32, 33, 64, 130, 257])
def test_live_steps_are_those_with_an_input(width: int, bits: int) -> None:
    """And nothing is written behind the list."""
    rng = np.random.default_rng(width)
    graph = network(rng, [width, 40], bits, [DEAD, 0])
    program = program_of(graph)
    size = 8 if bits == 4 else 4
    steps = -(-width // size)
    assert program.demand.rows == 1 + steps + AHEAD
    for share in (0.0, 0.5, 0.9, 1.0):
        x = images(rng, graph, 5, share)
        padded = np.zeros((5, steps * size), np.int64)
        padded[:, :width] = x.reshape(5, -1) - DEAD
        expected = padded.reshape(5, steps, size).any(axis=2)
        memory = np.full(program.demand.rows + 50, -7, np.int64)
        work = program.workspace()._replace(positions=memory[: program.demand.rows])
        frame = Frame(program, work)
        for image, live in zip(x, expected, strict=True):
            bytes_ = np.ascontiguousarray(image.reshape(-1).view(np.uint8))
            results = np.zeros(program.result_bytes, np.uint8)
            frame.run(bytes_.ctypes.data, results.ctypes.data, 1)
            count = int(memory[0])
            listed = memory[1 : 1 + count].view(np.int32).reshape(-1, 2)
            np.testing.assert_array_equal(listed[:, 0], np.flatnonzero(live))
            np.testing.assert_array_equal(listed[:, 1], size * np.flatnonzero(live))
        assert (memory[program.demand.rows :] == -7).all()
        replay = Replay(graph, program, 0, x.reshape(5, -1).view(np.uint8))
        assert replay.live() == np.median(expected.mean(axis=1))


# ---------------------------------------------------------------------- the choice
@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was chosen before."""
    monkeypatch.setattr(choose, "cache_folder", lambda: tmp_path)
    return tmp_path


def kernels(session: Session) -> list[str]:
    return [layer.kernel.split(",")[0] for layer in session.explain()]


@vector
@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("bits", [8, 4])
def test_dead_samples_choose_to_skip(bits: int) -> None:
    rng = np.random.default_rng(1)
    graph = network(rng, [1024, 512, 30], bits, [DEAD, 5, 0])
    dead = images(rng, graph, 40, 0.98, clustered=True)
    usual = Session(graph)
    assert "skipping stream" not in kernels(usual)
    session = Session(graph, calibration=dead)
    first, second = session.explain()
    assert first.kernel.startswith("skipping stream")
    assert second.kernel == usual.explain()[1].kernel, "its inputs have another zero point"
    assert first.live is not None and first.live < 0.1 and second.live is None
    assert "skipping stream" not in [layer.kernel for layer in session.explain(batch=True)]
    assert first.microseconds < usual.explain()[0].microseconds
    alive = images(rng, graph, 5, 0.0)
    np.testing.assert_array_equal(session.run(alive[:1]), execute(graph, alive[:1]))
    np.testing.assert_array_equal(session.run(dead), execute(graph, dead))


@vector
def test_the_choice_is_kept_for_the_samples(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    graph = network(rng, [256, 40], 8, [DEAD, 0])
    measured: list[int] = []

    def median(replays: Sequence[Replay]) -> list[float]:
        measured.append(replays[0].samples)
        return [2.0, 1.0]

    monkeypatch.setattr(choose, "median_seconds", median)
    x = images(rng, graph, 100, 0.5)
    for _ in range(2):
        session = Session(graph, calibration=x)
        assert session.program.opcode(0) == SKIPPING
        assert measured == [SAMPLES]
    assert Session(graph, calibration=x.astype(np.int64)).program.opcode(0) == SKIPPING
    assert measured == [SAMPLES]
    Session(graph, calibration=x[:7])
    assert measured == [SAMPLES, 7]
    assert len(list(empty_cache.iterdir())) == 2
    monkeypatch.setattr(choose, "median_seconds", lambda _: [1.0, 2.0])
    assert Session(graph, calibration=x[7:9]).program.opcode(0) == STREAM
    assert Session(graph).program.opcode(0) == STREAM


@vector
def test_without_samples_time_is_that_of_a_layer_that_skips_nothing() -> None:
    rng = np.random.default_rng(2)
    graph = network(rng, [2048, 256], 8, [DEAD, 0])
    alive, dead = (images(rng, graph, 4, share) for share in (0.0, 1.0))
    forced = [
        Session(graph, layout="skipping", calibration=x).explain()[0] for x in (None, alive, dead)
    ]
    assert [layer.live for layer in forced] == [None, 1.0, 0.0]
    assert forced[0].microseconds > 2 * forced[2].microseconds


def test_median_over_samples_of_least_times() -> None:
    class Fake:
        samples = 3

        def __init__(self, factor: int) -> None:
            self.factor, self.calls = factor, 0

        def seconds(self, sample: int) -> float:
            self.calls += 1
            return self.factor * (10.0**sample + max(0, 3 - self.calls // 3))

    assert median_seconds([Fake(1), Fake(2)]) == [10.0, 20.0]  # type: ignore


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 1000])
def test_samples_are_spread_over_all(count: int) -> None:
    chosen = chosen_samples(count)
    assert len(np.unique(chosen)) == len(chosen) == min(count, SAMPLES)
    assert chosen[0] == 0 and chosen[-1] < count
    steps = np.diff(np.append(chosen, count))
    assert steps.max() - steps.min() <= 1


# ---------------------------------------------------------------------- wrong samples
@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (np.zeros((2, 6, 5, 2)), "stored integers, got float64; quantize it first"),
        (np.zeros((6, 5, 2), np.int8), r"has shape \[6, 5, 2\], the model takes \[n, 6, 5, 2\]"),
        (np.zeros((2, 6, 5, 3), np.int8), r"has shape \[2, 6, 5, 3\]"),
        (np.int8(0), r"has shape \[\]"),
        ("x", "stored integers"),
        (np.full((50, 6, 5, 2), 128), "outside int8"),
        (np.zeros((0, 6, 5, 2), np.int8), "calibration holds no sample; give at least one"),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "dense"])
def test_wrong_calibration(calibration: object, message: str, layout: str) -> None:
    graph = random_graph(np.random.default_rng(11), shape=(1, 6, 5, 2), depth=2)
    with pytest.raises(DataError, match=message):
        Session(graph, layout=layout, calibration=calibration)  # type: ignore


def test_a_value_outside_the_type_in_a_sample_that_is_not_used() -> None:
    graph = random_graph(np.random.default_rng(11), shape=(1, 6, 5, 2), depth=2)
    x = np.zeros((100, 6, 5, 2), np.int64)
    x[1] = 300
    assert 1 not in chosen_samples(100)
    with pytest.raises(DataError, match="outside int8"):
        Session(graph, calibration=x)


def test_calibration_belongs_to_the_caller() -> None:
    rng = np.random.default_rng(11)
    graph = random_graph(rng, shape=(1, 6, 5, 2), depth=2)
    x = np.zeros((3, 6, 5, 2), np.int8)
    session = Session(graph, layout="skipping", calibration=x)
    before = [layer.live for layer in session.explain()]
    x[...] = 77
    assert [layer.live for layer in session.explain()] == before
