"""Every installed runtime against its profile, at the very accumulators where roundings differ.

Random data almost never meets a rounding boundary, so each output channel gets a bias that makes
its accumulator sweep across one. All roundings being monotone, the positions of the steps are then
what is compared. The cases must also tell the methods apart: a profile with another method for an
operator has to fail, or the comparison would show nothing.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import pytest

from cactus_edge import profiles, semantics
from cactus_edge.execute import accumulate, execute, execute_all, run_operator
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Pad,
    Padding,
    Quantization,
    Reshape,
    Tensor,
    Weights,
)
from cactus_edge.scales import ScaleArithmetic
from cactus_edge.semantics import AddRounding, Rounding
from cactus_edge.validate import Peer, peers
from cactus_edge.validate.probes import linear as probe_maker
from cactus_edge.validate.runtimes import runner
from tests.graphs import random_graph, random_inputs, scaled

LIMIT = 1 << 27
CHANNELS = 48
RUNTIMES = tuple(peer for peer in peers() if peer.extra == "runtimes")
EXACT_IDENTITY = 64


@pytest.fixture(params=RUNTIMES, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Peer:
    chosen: Peer = request.param
    if chosen.absence:
        pytest.skip(chosen.absence)
    return chosen


# ---------------------------------------------------------------------- linear layers
@dataclass(frozen=True)
class Regime:
    """Effective factors ``significand * 2**exponent``, and the activation that goes with them.

    ``bits`` 0 draws both from the reals; otherwise scales are exact, significands have that many
    bits, and ties are met exactly.
    """

    name: str
    lowest: int
    highest: int
    bits: int = 0
    activation: Activation = Activation.NONE


REGIMES = (
    Regime("usual", -14, -2),
    Regime("usual", -14, -2, activation=Activation.RELU),
    Regime("small", -26, -14),
    Regime("small", -26, -16),
    Regime("small", -26, -18),
    Regime("near one", -2, 0, activation=Activation.RELU6),
    Regime("ties", -12, -2, bits=1),
    Regime("ties", -16, -8, bits=1),
    Regime("short", -12, -2, bits=6),
)


@dataclass(frozen=True)
class Column:
    """One kind of layer, such as the tables of ``profiles`` tell apart."""

    kind: type[Linear]
    kernel: int
    depth: int
    per_channel: bool
    bits: int

    @property
    def name(self) -> str:
        scales = "per-channel" if self.per_channel else "per-tensor"
        return f"{self.kind.__name__} {self.kernel}x{self.kernel}x{self.depth} {scales} {self.bits}"


COLUMNS = (
    Column(FullyConnected, 1, 12, False, 8),
    Column(FullyConnected, 1, 12, True, 8),
    Column(FullyConnected, 1, 33, False, 8),
    Column(FullyConnected, 1, 33, True, 8),
    # XNNPACK takes int4 with an even number of inputs only; files hold no per-channel int4 here.
    Column(FullyConnected, 1, 12, False, 4),
    Column(FullyConnected, 1, 33, False, 4),
    *(
        Column(kind, kernel, depth, per_channel, bits)
        for kind, kernel, depth in (
            (Conv2D, 1, 12),
            (Conv2D, 3, 4),
            # A depth multiplier of 1, and a tail behind the last 8 channels.
            (DepthwiseConv2D, 3, CHANNELS + 5),
        )
        for per_channel in (False, True)
        for bits in (8, 4)
    ),
)


@dataclass(frozen=True, eq=False)
class Case:
    graph: Graph
    inputs: Int64Array

    @property
    def op(self) -> Linear:
        op = self.graph.core[-1]
        assert isinstance(op, Linear)
        return op


def factors(rng: np.random.Generator, regime: Regime, count: int) -> np.ndarray:
    if not regime.bits:
        return np.minimum(2.0 ** rng.uniform(regime.lowest, regime.highest, count), 0.998)
    odd = 2 * rng.integers(0, 1 << (regime.bits - 1), count) + 1
    return odd * 2.0 ** (rng.integers(regime.lowest, regime.highest, count) - regime.bits + 1)


def quantizations(rng: np.random.Generator, regime: Regime) -> tuple[Quantization, Quantization]:
    exponents = rng.uniform(-8, -2, 2)
    if regime.bits:
        exponents = np.rint(exponents)
    greatest = 127 if regime.activation is Activation.NONE else 60
    zero_points = (int(rng.integers(-128, 128)), int(rng.integers(-128, greatest + 1)))
    a, b = (Quantization.of(2.0**e, z) for e, z in zip(exponents, zero_points, strict=True))
    return a, b


def sweeping_inputs(rng: np.random.Generator, column: Column) -> Int64Array:
    """One sample for convolutions; the first input channel of 1x1 layers takes every value."""
    if column.kernel > 1:
        return rng.integers(-128, 128, (1, 18, 18, column.depth))
    rows = np.repeat(rng.integers(-128, 128, (1, column.depth)), 256, axis=0)
    rows[:, 0] = np.arange(-128, 128)
    rows = np.concatenate([rows, rng.integers(-128, 128, (48, column.depth))])
    return rows if column.kind is FullyConnected else rows[None, :, None, :]


def drafted(rng: np.random.Generator, column: Column) -> Linear:
    """A layer without scales and bias. Weights of larger windows are small: sums lie close by."""
    largest = 3 if column.kernel > 1 else (1 << (column.bits - 1)) - 1
    depthwise = column.kind is DepthwiseConv2D
    shape: tuple[int, ...] = (CHANNELS, column.kernel, column.kernel, column.depth)
    if depthwise:
        shape = (1, *shape[1:])
    if column.kind is FullyConnected:
        shape = (CHANNELS, column.depth)
    values = rng.integers(-largest, largest + 1, shape)
    if column.kernel == 1:
        values[..., 0] = 1  # the accumulator follows the first input in steps of 1
    channels = column.depth if depthwise else CHANNELS
    return column.kind(
        name="layer",
        inputs=(0,),
        output=1,
        weights=Weights(values, column.bits),
        bias=np.zeros(channels, np.int32),
    )


def linear_case(rng: np.random.Generator, column: Column, regime: Regime) -> Case:
    source, target = quantizations(rng, regime)
    inputs = sweeping_inputs(rng, column)
    draft = drafted(rng, column)
    channels = draft.channels
    wanted = factors(rng, regime, channels if column.per_channel else 1)
    op = scaled(draft, wanted * float(target.scale) / float(source.scale))
    real = np.float64(source.scale) * op.weights.scale.astype(np.float64) / float(target.scale)
    real = np.broadcast_to(real, channels)

    tensor = Tensor("input", (1, *inputs.shape[1:]), DType.INT8, source)
    sums = accumulate(op, tensor, inputs).reshape(-1, channels)
    weights = np.abs(op.weights.values.astype(np.int64))
    weights = weights.reshape(-1, channels) if weights.shape[0] == 1 else weights.T
    reach = weights.reshape(-1, channels).sum(axis=0) * 255
    # Steps from ``step`` to ``step + 1`` behind the zero point, within the accumulator's limit.
    most = np.floor((LIMIT - 1 - 2 * reach) * real - 0.5).astype(np.int64)
    low = np.maximum(-128 - target.zero_point, -most - 1)
    high = np.minimum(126 - target.zero_point, most)
    if regime.activation is not Activation.NONE:
        # Steps that it leaves visible: 6 is at least 24 levels above the zero point.
        low, high = np.maximum(low, 0), np.minimum(high, 22)
    step = rng.integers(low, high + 1)
    boundary = np.ceil((step + 0.5) / real).astype(np.int64)
    row = 128 if column.kernel == 1 else rng.integers(0, len(sums), channels)
    bias = boundary - sums[row, np.arange(channels)]

    shape = (
        (1, channels) if column.kind is FullyConnected else (1, *_valid(inputs, column), channels)
    )
    final = column.kind(
        name="layer",
        inputs=(0,),
        output=1,
        weights=op.weights,
        bias=bias,
        activation=regime.activation,
    )
    return Case(
        Graph((tensor, Tensor("output", shape, DType.INT8, target)), (final,), 0, 1), inputs
    )


def _valid(inputs: Int64Array, column: Column) -> tuple[int, int]:
    height, width = inputs.shape[1:3]
    return height - column.kernel + 1, width - column.kernel + 1


@cache
def cases(column: Column) -> tuple[Case, ...]:
    seed = COLUMNS.index(column)
    return tuple(
        linear_case(np.random.default_rng([seed, index]), column, regime)
        for index, regime in enumerate(REGIMES)
    )


@cache
def expected(column: Column, profile: str) -> tuple[Int64Array, ...]:
    """Outputs of the column's cases; profiles with the same methods share them."""
    for name in profiles.PROFILES:
        if name != profile and methods(column, name) == methods(column, profile):
            return expected(column, name)
        if name == profile:
            break
    return tuple(execute(case.graph, case.inputs, profile) for case in cases(column))


def methods(column: Column, profile: str) -> tuple[tuple[int, profiles.Method], ...]:
    runtime = profiles.PROFILES[profile]
    found = {profiles.methods(case.graph, case.op, runtime) for case in cases(column)}
    assert len(found) == 1, "one column, one arithmetic"
    return found.pop()


def used(column: Column, profile: str) -> tuple[profiles.Method, ...]:
    """The method of each channel."""
    ends = methods(column, profile)
    channels = ends[-1][0]
    return tuple(next(m for end, m in ends if c < end) for c in range(channels))


def test_linear_layers(peer: Peer) -> None:
    parts = [(case.graph, case.inputs) for column in COLUMNS for case in cases(column)]
    found = iter(runner(peer)(parts))
    for column in COLUMNS:
        outputs = [next(found) for _ in cases(column)]
        for name in profiles.PROFILES:
            pairs = zip(outputs, expected(column, name), strict=True)
            mismatches = sum(int((f.reshape(e.shape) != e).sum()) for f, e in pairs)
            same = used(column, name) == used(column, peer.profile)
            assert (mismatches == 0) is same, f"{column.name}: {mismatches} against {name}"


def test_sweeps_meet_the_steps() -> None:
    """Nearly every channel takes two values at least, and no accumulator is out of bounds."""
    for column in COLUMNS:
        for case, output in zip(cases(column), expected(column, profiles.DEFAULT), strict=True):
            values = output.reshape(-1, output.shape[-1])
            stepping = (values.min(axis=0) < values.max(axis=0)).mean()
            assert stepping > 0.95
            accumulators = accumulate(case.op, case.graph.tensors[0], case.inputs)
            assert abs(accumulators).max() < LIMIT


# ---------------------------------------------------------------------- ADD
def add_graph(a: Quantization, b: Quantization, target: Quantization, width: int) -> Graph:
    """Two operands that are exactly the two channels of the input, and their sum.

    A 1x1 convolution by 64 with an effective factor of 1/64 returns its input whatever the
    rounding, because no product is near a tie.
    """
    tensors = (
        Tensor("input", (1, 1, width, 2), DType.INT8, Quantization.of(1 / 16, 0)),
        Tensor("a", (1, 1, width, 1), DType.INT8, a),
        Tensor("b", (1, 1, width, 1), DType.INT8, b),
        Tensor("sum", (1, 1, width, 1), DType.INT8, target),
    )

    def selection(channel: int, name: str, wanted: Quantization) -> Conv2D:
        values = np.zeros((1, 1, 1, 2), np.int64)
        values[..., channel] = EXACT_IDENTITY
        op = Conv2D(
            name=name,
            inputs=(0,),
            output=1 + channel,
            weights=Weights(values),
            bias=np.array([-EXACT_IDENTITY * wanted.zero_point]),
        )
        return scaled_convolution(op, float(wanted.scale) * 16 / EXACT_IDENTITY)

    add = Add(name="sum", inputs=(1, 2), output=3)
    return Graph(tensors, (selection(0, "a", a), selection(1, "b", b), add), 0, 3)


def scaled_convolution(op: Conv2D, scale: float) -> Conv2D:
    result = scaled(op, np.array([scale]))
    assert isinstance(result, Conv2D)
    return result


# Float32 patterns of two input scales and an output scale, zero points 0, where it matters that
# LiteRT's optimized ADD shifts first. About one triple in 200 is of this kind.
EARLY_SHIFT_SCALES = (
    (1011666670, 1007167390, 1013313599),
    (1014939668, 1016742580, 1023484819),
    (1018750806, 1018624116, 1021078216),
    (1012832932, 1017139945, 1016692612),
)


def early_shift_graphs(width: int) -> list[Graph]:
    return [
        add_graph(*(Quantization(bits, 0) for bits in patterns), width=width)
        for patterns in EARLY_SHIFT_SCALES
    ]


@cache
def add_graphs() -> tuple[Graph, ...]:
    """Equal and different input scales, exact and inexact ratios; then the awkward ones."""
    rng = np.random.default_rng(17)
    graphs: list[Graph] = []
    for index in range(12):
        scale_a, scale_b = 2.0 ** rng.uniform(-7, -2, 2)
        if index % 3 == 0:
            scale_b = scale_a
        if index % 3 == 1:
            scale_a, scale_b = 2.0 ** rng.integers(-7, -2, 2)
        factor = rng.choice([1, 1.5, 2]) if index % 2 else rng.uniform(0.6, 2)
        scale = max(scale_a, scale_b) * factor
        zero_points = rng.integers(-128, 128, 3).tolist()
        ends = (
            Quantization.of(s, z)
            for s, z in zip((scale_a, scale_b, scale), zero_points, strict=True)
        )
        graphs.append(add_graph(*ends, width=1 << 16))
    return (*graphs, *early_shift_graphs(1 << 16))


def all_pairs() -> Int64Array:
    """Every pair of stored integers, [1, 1, 65536, 2]."""
    level = np.arange(-128, 128)
    return np.stack(np.meshgrid(level, level, indexing="ij"), axis=-1).reshape(1, 1, -1, 2)


def sums(graph: Graph, pairs: Int64Array, rounding: AddRounding, early: bool = False) -> Int64Array:
    """The ADD of ``add_graph`` on pairs [..., 2], by a rounding that no profile may have."""
    op = graph.core[-1]
    assert isinstance(op, Add)
    integers = profiles.add_requantization(graph, op, rounding).integers
    a, b = (pairs[..., i] - graph.tensors[1 + i].zero_point for i in (0, 1))
    function = semantics.add_early_shift if early else semantics.ADD[rounding]
    rounded = function(a, b, *integers) + graph.tensors[3].zero_point
    return np.clip(rounded, -128, 127)


def covered(graph: Graph, profile: str) -> bool:
    return profile not in profiles.uncovered(graph)


def test_operands_of_add_are_the_pairs() -> None:
    pairs = all_pairs()
    for graph in add_graphs():
        for name in profiles.PROFILES:
            if covered(graph, name):
                values = execute_all(graph, pairs, name)
                assert np.array_equal(values[1], pairs[..., :1])
                assert np.array_equal(values[2], pairs[..., 1:])


def test_add_on_all_pairs(peer: Peer) -> None:
    pairs = all_pairs()
    outputs = runner(peer)([(graph, pairs) for graph in add_graphs()])
    chosen = profiles.PROFILES[peer.profile].add
    mismatches = {r: 0 for r in AddRounding if r is not AddRounding.INT16}
    compared = 0
    for graph, output in zip(add_graphs(), outputs, strict=True):
        found = output.reshape(1, 1, -1)
        if not covered(graph, peer.profile):
            assert np.array_equal(found, sums(graph, pairs, chosen, early=True))
            assert not np.array_equal(found, sums(graph, pairs, chosen)), "refused without need"
            continue
        compared += 1
        for rounding in mismatches:
            mismatches[rounding] += int((found != sums(graph, pairs, rounding)).sum())
    assert compared >= len(add_graphs()) - len(EARLY_SHIFT_SCALES)
    assert [rounding for rounding, count in mismatches.items() if count == 0] == [chosen]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="measured on x86_64")
@pytest.mark.parametrize("width", [5, 16, 21, 47])
def test_litert_add_depends_on_the_position(width: int) -> None:
    """Why such an ADD is refused: the last ``size % 16`` elements are rounded in another way."""
    optimized = next(peer for peer in RUNTIMES if peer.name == "LiteRT optimized")
    if optimized.absence:
        pytest.skip(optimized.absence)
    parts: list[tuple[Graph, Int64Array]] = []
    values: list[tuple[int, int]] = []
    for graph in early_shift_graphs(width):
        assert not covered(graph, optimized.profile)
        double = sums(graph, all_pairs(), AddRounding.DOUBLE_HALF_AWAY).ravel()
        early = sums(graph, all_pairs(), AddRounding.DOUBLE_HALF_AWAY, early=True).ravel()
        where = np.flatnonzero(double != early)[0]
        parts.append((graph, np.repeat(all_pairs()[:, :, where : where + 1], width, axis=2)))
        values.append((int(early[where]), int(double[where])))
    body = width // 16 * 16
    for output, (early_value, double_value) in zip(runner(optimized)(parts), values, strict=True):
        assert output.ravel().tolist() == [early_value] * body + [double_value] * (width - body)


# ---------------------------------------------------------------------- operators without scales
def plain_graphs() -> list[Graph]:
    """AVERAGE_POOL_2D over odd and even counts, MAX_POOL_2D, PAD and RESHAPE."""
    quantization = Quantization.of(0.1, -7)
    source = Tensor("input", (1, 8, 9, 6), DType.INT8, quantization)
    head = {"name": "layer", "inputs": (0,), "output": 1}
    graphs: list[Graph] = []

    def add(op: object, shape: tuple[int, ...]) -> None:
        target = Tensor("output", shape, DType.INT8, quantization)
        graphs.append(Graph((source, target), (op,), 0, 1))  # type: ignore

    for kind in (AveragePool2D, MaxPool2D):
        for activation in Activation:
            for window in ((2, 2), (3, 3), (1, 3), (2, 4)):
                shape = (1, 8 - window[0] + 1, 9 - window[1] + 1, 6)
                add(kind(**head, window=window, stride=(1, 1), activation=activation), shape)  # type: ignore
                same = {"window": window, "stride": (2, 2), "padding": Padding.SAME}
                add(kind(**head, **same, activation=activation), (1, 4, 5, 6))  # type: ignore
    add(Pad(**head, paddings=((0, 0), (1, 2), (2, 0), (0, 0))), (1, 11, 11, 6))  # type: ignore
    add(Reshape(**head), (1, 8 * 9 * 6))  # type: ignore
    return graphs


def test_pools_pad_and_reshape(peer: Peer) -> None:
    rng = np.random.default_rng(23)
    middle = rng.integers(-60, 61, (8, 1, 1, 6))
    inputs = np.clip(middle + rng.integers(-70, 71, (8, 8, 9, 6)), -128, 127)
    graphs = plain_graphs()
    half_even = 0
    for graph, found in zip(graphs, runner(peer)([(g, inputs) for g in graphs]), strict=True):
        op = graph.core[0]
        wanted = execute(graph, inputs, peer.profile)
        assert np.array_equal(found.reshape(wanted.shape), wanted), f"{op.kind} {op}"
        if isinstance(op, AveragePool2D) and op.window == (2, 2) and op.stride == (1, 1):
            corners = [inputs[:, i : i + 7, j : j + 8] for i in (0, 1) for j in (0, 1)]
            other = np.rint(sum(corners) / 4).clip(*graph.output_range(op))
            half_even += int((found.reshape(wanted.shape) != other).sum())
    assert half_even, "no tie was met"


# ---------------------------------------------------------------------- SAME padding
def padded_graphs() -> list[Graph]:
    rng = np.random.default_rng(29)
    graphs: list[Graph] = []
    for kind in (Conv2D, DepthwiseConv2D):
        for sizes in product((1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2)):
            kernel, stride, dilation = sizes[:2], sizes[2:4], (1, sizes[4])
            shape = (5, *kernel, 4) if kind is Conv2D else (1, *kernel, 4)
            channels = 5 if kind is Conv2D else 4
            draft = kind(
                name="layer",
                inputs=(0,),
                output=1,
                weights=Weights(rng.integers(-9, 10, shape)),
                bias=rng.integers(-99, 100, channels),
                stride=stride,
                dilation=dilation,
                padding=Padding.SAME,
            )
            extents = tuple(-(-extent // s) for extent, s in zip((7, 8), stride, strict=True))
            tensors = (
                Tensor("input", (1, 7, 8, 4), DType.INT8, Quantization.of(0.05, 3)),
                Tensor("output", (1, *extents, channels), DType.INT8, Quantization.of(0.1, -4)),
            )
            graphs.append(Graph(tensors, (scaled(draft, np.array([0.02])),), 0, 1))
    return graphs


def test_same_padding(peer: Peer) -> None:
    """Kernels, strides and dilations; what a profile does not cover is indeed computed wrongly."""
    inputs = np.random.default_rng(37).integers(-128, 128, (2, 7, 8, 4))
    profile = profiles.PROFILES[peer.profile]
    wrong = 0
    graphs = padded_graphs()
    for graph, found in zip(graphs, runner(peer)([(g, inputs) for g in graphs]), strict=True):
        op = graph.core[0]
        assert isinstance(op, Conv2D)
        resolved = replace(op, requantization=profiles.requantization(graph, op, profile))
        wanted = run_operator(graph, resolved, [inputs])
        right = covered(graph, peer.profile)
        wrong += not right
        assert np.array_equal(found, wanted) is right, f"{op.kind} {op.stride} {op.dilation}"
    assert 0 < wrong < len(graphs) / 4 if profile.needs_covering_windows else wrong == 0


@pytest.mark.parametrize(
    ("kind", "channels", "depth", "side", "rounding"),
    [
        (FullyConnected, 4, 8, 1, Rounding.DOUBLE_HALF_UP),
        (FullyConnected, 3, 8, 1, Rounding.DOUBLE_HALF_AWAY),
        (FullyConnected, 4, 7, 1, Rounding.DOUBLE_HALF_AWAY),
        (Conv2D, 4, 8, 1, Rounding.DOUBLE_HALF_UP),
        (Conv2D, 3, 8, 1, Rounding.DOUBLE_HALF_AWAY),
        (Conv2D, 4, 7, 1, Rounding.DOUBLE_HALF_AWAY),
        (Conv2D, 4, 8, 2, Rounding.DOUBLE_HALF_AWAY),
    ],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_arm_has_a_kernel_of_its_own_for_one_vector(
    kind: type[Linear], channels: int, depth: int, side: int, rounding: Rounding, per_channel: bool
) -> None:
    """The limits that a grid of shapes showed on emulated aarch64; the matrix probes them."""
    make = probe_maker(kind, channels=channels, depth=depth, side=side, per_channel=per_channel)
    graph, _ = make(np.random.default_rng(0))
    op = graph.core[0]
    assert isinstance(op, Linear)
    [(end, method)] = profiles.methods(graph, op, profiles.PROFILES["tflite-arm"])
    product = kind is FullyConnected and not per_channel
    assert (end, method.rounding) == (channels, rounding)
    assert (method.scale is ScaleArithmetic.FLOAT32_PRODUCT) is product


# ---------------------------------------------------------------------- whole graphs
def test_random_networks(peer: Peer) -> None:
    parts: list[tuple[Graph, Int64Array]] = []
    for seed in range(24):
        rng = np.random.default_rng([31, seed])
        graph = random_graph(rng, depth=1 + seed % 6)
        if covered(graph, peer.profile):
            parts.append((graph, random_inputs(rng, graph, 12)))
    assert len(parts) > 15
    differing = dict.fromkeys(profiles.PROFILES, 0)
    for (graph, inputs), found in zip(parts, runner(peer)(parts), strict=True):
        for name in set(differing) - set(profiles.uncovered(graph)):
            wanted = execute(graph, inputs, name)
            differing[name] += int((found.reshape(wanted.shape) != wanted).sum())
    assert differing[peer.profile] == 0
    assert max(differing.values()) > 0, "every profile agrees: the networks show nothing"
