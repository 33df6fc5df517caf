"""Packed weights, run as a kernel would run them: loads, permutes, dot products of four bytes.

The emulators below know nothing of how weights were packed, and check that no load leaves the
bytes that a format says it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.kernels.formats.bitmask import CHANNELS, Bitmask, pack_bitmask
from cactus_edge.kernels.formats.blocks import Blocks, block_share, pack_blocks
from cactus_edge.kernels.formats.dense import Dense, pack_dense
from cactus_edge.kernels.formats.layout import LINE, cover, nonzero_rows
from cactus_edge.kernels.formats.permuted import Permuted, Shape, pack_permuted

START = 37
"""Where the window lies in memory: no load is aligned by luck."""
SPARSITIES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 1.0)
SHAPES = (
    Shape(),
    Shape(registers=1, alignment=64, single_cost=0.6),
    Shape(dual=False, alignment=16),
    Shape(lanes=8, registers=2, window=16, dual=False),
    Shape(lanes=8, registers=3, window=16),
    Shape(lanes=4, registers=2, window=32, dual=False),
    Shape(lanes=4, registers=1, window=32, alignment=4),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A matrix, where its inputs lie, and a window of activations to multiply it with."""

    matrix: np.ndarray
    offsets: np.ndarray
    bytes: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Int64 [channels]."""
        return self.matrix.astype(np.int64) @ self.bytes[START + self.offsets].astype(np.int64)


def make_layer(rng: np.random.Generator, matrix: np.ndarray, runs: list[tuple[int, int]]) -> Layer:
    """Runs are (gap before it, length)."""
    parts, end = [np.zeros(0, np.int64)], 0
    for gap, length in runs:
        parts.append(end + gap + np.arange(length))
        end += gap + length
    memory = rng.integers(0, 256, START + end + 600).astype(np.uint8)
    return Layer(matrix, np.concatenate(parts), memory)


@st.composite
def layers(draw: st.DrawFn, bits: int = 8) -> Layer:
    """Any channels, runs and sparsity; rows and columns without weights, extreme weights."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    channels = draw(st.integers(1, 70))
    # Gaps about as long as a step decide whether it is worth skipping one.
    gap = st.one_of(st.integers(0, 9), st.integers(0, 90))
    run = st.tuples(gap, st.integers(1, 150))
    runs = draw(st.lists(run, min_size=1, max_size=4))
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    shape = (channels, sum(length for _, length in runs))
    if draw(st.booleans()):
        matrix = rng.integers(low, high + 1, shape)
    else:
        matrix = rng.choice([low, high], shape)
    matrix[rng.random(shape) < draw(st.sampled_from(SPARSITIES))] = 0
    if draw(st.booleans()):
        # Uneven rows, as in trained networks, and some of either kind that are dead.
        matrix[rng.random(shape) < rng.random((channels, 1))] = 0
        matrix[rng.random(channels) < 0.2] = 0
        matrix[:, rng.random(shape[1]) < 0.2] = 0
    return make_layer(rng, matrix.astype(np.int8), runs)


def random_matrix(channels: int, inputs: int, sparsity: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(1, 128, (channels, inputs))
    matrix[rng.random(matrix.shape) < sparsity] = 0
    return matrix.astype(np.int8)


class Memory:
    """The window of a layer; loads outside of what the format says it reads fail."""

    def __init__(self, layer: Layer, reach: int) -> None:
        self.bytes = layer.bytes
        self.reach = reach

    def load(self, offset: int, size: int) -> np.ndarray:
        assert offset >= 0
        assert offset + size <= self.reach
        return self.bytes[START + offset : START + offset + size]


def take(stream: np.ndarray, begin: int, size: int) -> np.ndarray:
    """A load of weights."""
    assert begin + size <= stream.size
    return stream[begin : begin + size]


def dot(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Int32 [lanes]: the sum of four products of unsigned and signed bytes in each lane."""
    products = activations.reshape(-1, 4).astype(np.int32) * weights.view(np.int8).reshape(-1, 4)
    return products.sum(axis=1, dtype=np.int32)


def halves(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two shifts by which kernels read nibbles: 16 times each weight."""
    return packed << 4, packed & 0xF0


def run_dense(packed: Dense, layer: Layer) -> np.ndarray:
    memory = Memory(layer, packed.reach)
    size = 4 * packed.channels
    sums = np.zeros((packed.groups, packed.channels), np.int32)
    at = 0
    for group in range(packed.groups):
        for offset, steps in packed.runs.tolist():
            for step in range(steps):
                values = take(packed.weights, at, size)
                at += size
                place = offset + packed.step_bytes * step
                for i, part in enumerate(halves(values) if packed.nibbles else (values,)):
                    four = memory.load(place + 4 * i, 4)
                    sums[group] += dot(np.tile(four, packed.channels), part)
    assert packed.weights.size == -(-at // LINE) * LINE
    return sums.reshape(-1)


def gather(memory: Memory, offsets: list[int], window: int, indices: np.ndarray) -> np.ndarray:
    """Loads of one or two windows, permuted by indices."""
    table = np.concatenate([memory.load(offset, window) for offset in offsets])
    assert indices.max() < table.size
    return table[indices]


def run_permuted(packed: Permuted, layer: Layer) -> np.ndarray:
    memory = Memory(layer, packed.reach)
    shape = packed.shape
    register, half = 4 * shape.lanes, 4 * shape.channels
    sums = np.zeros((len(packed.counts), shape.channels), np.int32)
    at = window = 0
    for group, counts in enumerate(packed.counts.tolist()):
        for loads, steps in enumerate(counts, 1):
            for _ in range(steps):
                offsets = packed.offsets[window : window + loads].tolist()
                for r in range(shape.registers):
                    indices = take(packed.stream, at + r * register, register)
                    weights = take(packed.stream, at + half + r * register, register)
                    lanes = sums[group, r * shape.lanes : (r + 1) * shape.lanes]
                    lanes += dot(gather(memory, offsets, shape.window, indices), weights)
                at += 2 * half
                window += loads
    assert window == packed.offsets.size
    assert packed.stream.size == -(-at // LINE) * LINE
    return sums.reshape(-1)


def run_bitmask(packed: Bitmask, layer: Layer) -> np.ndarray:
    memory = Memory(layer, packed.reach)
    sums = np.zeros((len(packed.masks), CHANNELS), np.int32)
    at = 0
    for group, masks in enumerate(packed.masks):
        assert packed.starts[group] == at
        offsets = [o + 4 * i for o, steps in packed.runs.tolist() for i in range(steps)]
        for offset, mask in zip(offsets, masks.tolist(), strict=True):
            loaded = take(packed.values, at, LINE)
            bits = [i for i in range(LINE) if mask >> i & 1]
            weights = np.zeros(LINE, np.uint8)
            weights[bits] = loaded[: len(bits)]
            at += len(bits)
            sums[group] += dot(np.tile(memory.load(offset, 4), CHANNELS), weights)
    return sums.reshape(-1)


def run_blocks(packed: Blocks, layer: Layer) -> np.ndarray:
    memory = Memory(layer, packed.reach)
    size = 4 * packed.channels
    sums = np.zeros((packed.counts.size, packed.channels), np.int32)
    block = 0
    for group, count in enumerate(packed.counts.tolist()):
        for offset in packed.offsets[block : block + count].tolist():
            four = np.tile(memory.load(offset, 4), packed.channels)
            sums[group] += dot(four, take(packed.weights, block * size, size))
            block += 1
    assert block == packed.offsets.size
    assert packed.weights.size == -(-block * size // LINE) * LINE
    return sums.reshape(-1)


def assert_ordered(sums: np.ndarray, layer: Layer, order: np.ndarray, factor: int = 1) -> None:
    """Sums of channels in packed order, then of none."""
    np.testing.assert_array_equal(np.sort(order), np.arange(len(layer.matrix)))
    np.testing.assert_array_equal(sums[: order.size], factor * layer.expected[order])
    assert not sums[order.size :].any()


def in_order(layer: Layer) -> np.ndarray:
    return np.arange(len(layer.matrix))


# ---------------------------------------------------------------------------- sums are exact
@given(layers(), st.sampled_from((2, 4, 8, 16, 32, 64)))
def test_dense_sums(layer: Layer, channels: int) -> None:
    packed = pack_dense(layer.matrix, layer.offsets, channels)
    assert_ordered(run_dense(packed, layer), layer, in_order(layer))


@given(layers(bits=4), st.sampled_from((4, 16, 64)))
def test_dense_nibble_sums(layer: Layer, channels: int) -> None:
    packed = pack_dense(layer.matrix, layer.offsets, channels, nibble=True)
    assert_ordered(run_dense(packed, layer), layer, in_order(layer), 16)


@settings(deadline=None)  # the first example compiles
@given(layers(), st.sampled_from(SHAPES), st.booleans(), st.sampled_from((0, 20_000)))
def test_permuted_sums(layer: Layer, shape: Shape, keep_order: bool, effort: int) -> None:
    packed = pack_permuted(layer.matrix, layer.offsets, shape, keep_order=keep_order, effort=effort)
    assert_ordered(run_permuted(packed, layer), layer, packed.order)
    if keep_order:
        np.testing.assert_array_equal(packed.order, in_order(layer))
    if not shape.dual:
        assert not packed.counts[:, 1].any()
    assert not (packed.offsets % shape.alignment).any()
    slots = packed.counts.sum() * 4 * shape.channels
    assert packed.fill * slots == pytest.approx(np.count_nonzero(layer.matrix))


@given(layers())
def test_bitmask_sums(layer: Layer) -> None:
    packed = pack_bitmask(layer.matrix, layer.offsets)
    assert_ordered(run_bitmask(packed, layer), layer, in_order(layer))


@given(layers(), st.sampled_from((8, 16, 32)))
def test_block_sums(layer: Layer, channels: int) -> None:
    packed = pack_blocks(layer.matrix, layer.offsets, channels)
    assert_ordered(run_blocks(packed, layer), layer, in_order(layer))
    assert packed.share == block_share(layer.matrix, layer.offsets, channels)


@pytest.mark.parametrize("weight", [-128, 127])
def test_extreme_sums_wrap_in_no_format(weight: int) -> None:
    """255 times the extreme weight in every product of a long layer."""
    matrix = np.full((20, 4096), weight, np.int8)
    rng = np.random.default_rng(0)
    layer = make_layer(rng, matrix, [(3, 4096)])
    layer.bytes[:] = 255
    order = in_order(layer)
    for sums in (
        run_dense(pack_dense(matrix, layer.offsets, 32), layer),
        run_permuted(pack_permuted(matrix, layer.offsets, Shape(), keep_order=True), layer),
        run_bitmask(pack_bitmask(matrix, layer.offsets), layer),
        run_blocks(pack_blocks(matrix, layer.offsets, 16), layer),
    ):
        assert_ordered(sums, layer, order)


# ---------------------------------------------------------------------------- sizes
@given(layers(), st.sampled_from((4, 8, 16)))
def test_slots_hold_every_input_once_and_none_is_empty(layer: Layer, width: int) -> None:
    places = cover(layer.offsets, width)
    slots, inside = np.divmod(places.columns, width)
    np.testing.assert_array_equal(places.offsets[slots] + inside, layer.offsets)
    np.testing.assert_array_equal(np.unique(slots), np.arange(places.slots))
    assert (np.diff(places.offsets) >= width).all()


def test_dense_run_table() -> None:
    """Runs of 7 and 5 bytes are two steps each; a gap shorter than a step is read over."""
    matrix = np.ones((3, 14), np.int8)
    offsets = np.concatenate([np.arange(7), 20 + np.arange(5), [26, 27]])
    packed = pack_dense(matrix, offsets, 16)
    assert packed.runs.tolist() == [[0, 2], [20, 2]]
    assert (packed.groups, packed.steps, packed.reach) == (1, 4, 28)
    assert packed.weights.size == 4 * 16 * 4


def test_dense_nibbles_are_half_of_the_bytes() -> None:
    matrix = random_matrix(64, 256, 0.0) & 7
    whole = pack_dense(matrix, np.arange(256), 64)
    half = pack_dense(matrix, np.arange(256), 64, nibble=True)
    assert half.weights.size == whole.weights.size // 2


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_bitmask_stores_a_bit_for_a_weight_and_a_byte_for_a_nonzero_one(sparsity: float) -> None:
    matrix = random_matrix(48, 320, sparsity)
    packed = pack_bitmask(matrix, np.arange(320))
    assert packed.masks.nbytes * 8 == matrix.size
    stored = np.count_nonzero(matrix)
    assert stored + LINE <= packed.values.size < stored + 2 * LINE
    assert not packed.values[stored:].any()


def test_share_of_blocks() -> None:
    """Weights in blocks of 32 x 4 fill as many blocks of 32, and all of the rest is skipped."""
    rng = np.random.default_rng(0)
    kept = rng.random((4, 72)) < 0.1
    matrix = np.kron(kept, np.ones((32, 4))).astype(np.int8)
    packed = pack_blocks(matrix, np.arange(288), 32)
    assert packed.share == kept.mean()
    np.testing.assert_array_equal(packed.counts, kept.sum(axis=1))
    np.testing.assert_array_equal(packed.offsets, 4 * np.nonzero(kept)[1])
    scattered = random_matrix(128, 288, 0.9)
    assert pack_blocks(scattered, np.arange(288), 32).share > 0.99


def test_windows_beyond_int32_are_refused() -> None:
    matrix = np.ones((2, 2), np.int8)
    offsets = np.array([0, 1 << 31], np.int64)
    for pack in (
        lambda: nonzero_rows(matrix, offsets),
        lambda: pack_blocks(matrix, offsets, 16),
    ):
        with pytest.raises(UnsupportedModelError, match="2147483648 bytes apart"):
            pack()


# ---------------------------------------------------------------------------- how well they fill
def relative_cost(packed: Permuted, matrix: np.ndarray) -> float:
    """Time in units of dual steps without an empty slot."""
    return packed.cost * 4 * packed.shape.channels / np.count_nonzero(matrix)


def tap_rows(inputs: int) -> np.ndarray:
    """Offsets of the inputs of a 3 x 3 convolution."""
    length = inputs // 3
    return np.arange(inputs) % length + np.arange(inputs) // length * 2048


@pytest.mark.parametrize(
    ("sparsity", "most"), [(0.0, 0.72), (0.5, 0.78), (0.7, 0.82), (0.8, 0.87), (0.9, 1.03)]
)
def test_permuted_cost_of_random_masks(sparsity: float, most: float) -> None:
    """Whole chunks of 64 bytes cost 0.86, 0.95, 1.02 and 1.22 from 50 to 90 %."""
    matrix = random_matrix(128, 1152, sparsity, seed=5)
    packed = pack_permuted(matrix, tap_rows(1152), Shape())
    assert relative_cost(packed, matrix) <= most


@pytest.mark.parametrize("kept", [1, 2])
def test_patterns_along_the_inputs_are_filled_completely(kept: int) -> None:
    """One or two weights of four in every channel."""
    rng = np.random.default_rng(0)
    places = rng.random((32, 144, 4)).argsort(axis=2) < kept
    matrix = places.reshape(32, 576).astype(np.int8)
    packed = pack_permuted(matrix, tap_rows(576), Shape())
    assert packed.fill == 1.0
    assert not packed.counts[:, 1].any()


def test_ordering_and_exchanging_channels_saves_steps() -> None:
    rng = np.random.default_rng(0)
    matrix = random_matrix(128, 1152, 0.9)
    matrix[rng.random(matrix.shape) < rng.random((128, 1))] = 0
    offsets = tap_rows(1152)
    kept = pack_permuted(matrix, offsets, Shape(), keep_order=True)
    ordered = pack_permuted(matrix, offsets, Shape(), effort=0)
    exchanged = pack_permuted(matrix, offsets, Shape(), effort=1_000_000)
    assert ordered.cost < 0.8 * kept.cost
    assert exchanged.cost < ordered.cost


def test_second_windows_save_time() -> None:
    matrix, offsets = random_matrix(64, 576, 0.98), tap_rows(576)
    both = pack_permuted(matrix, offsets, Shape(), effort=0)
    single = pack_permuted(matrix, offsets, Shape(dual=False), effort=0)
    assert both.counts[:, 1].any()
    assert both.cost < 0.9 * single.cost


def test_dead_channels_take_no_steps() -> None:
    matrix = random_matrix(64, 300, 0.5)
    matrix[::2] = 0
    packed = pack_permuted(matrix, np.arange(300), Shape())
    assert packed.counts[1].tolist() == [0, 0]
    np.testing.assert_array_equal(np.sort(packed.order[:32]), np.arange(1, 64, 2))


def test_packing_is_reproducible() -> None:
    matrix, offsets = random_matrix(96, 400, 0.8), np.arange(400)
    first, second = (pack_permuted(matrix, offsets, Shape()) for _ in range(2))
    np.testing.assert_array_equal(first.order, second.order)
    np.testing.assert_array_equal(first.stream, second.stream)


def fewest_steps(positions: tuple[tuple[int, ...], ...], window: int) -> int:
    """By trying every base, and every choice of four weights in each lane."""

    @cache
    def remaining(lanes: tuple[tuple[int, ...], ...]) -> int:
        if not any(lanes):
            return 0
        best = sum(map(len, lanes))
        for base in range(-window, max(map(max, filter(None, lanes))) + 1):
            options: list[list[tuple[int, ...]]] = []
            for lane in lanes:
                inside = [p for p in lane if base <= p < base + window]
                taken = list(combinations(inside, min(4, len(inside))))
                options.append([tuple(p for p in lane if p not in chosen) for chosen in taken])
            for left in {(a, b) for a in options[0] for b in options[1]}:
                if left != lanes:
                    best = min(best, 1 + remaining(left))
        return best

    return remaining(positions)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(4, 9))
def test_steps_of_one_kind_are_the_fewest_there_can_be(seed: int, inputs: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.random((2, inputs)) < 0.7).astype(np.int8)
    offsets = np.sort(rng.choice(14, inputs, replace=False))
    shape = Shape(lanes=2, registers=1, window=8, dual=False)
    packed = pack_permuted(matrix, offsets, shape)
    lanes = tuple(tuple(offsets[row != 0].tolist()) for row in matrix)
    assert packed.counts.sum() == fewest_steps(lanes, 8)
