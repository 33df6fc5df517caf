"""Random small graphs over every operator, for whichever module has to agree with another one.

``random_graph`` gives graphs that satisfy ``constraints.validate``, resolve under every rounding
profile and can be written to a file. Scales and biases are fitted to sample inputs, so that
activations spread over the int8 range and not all saturate. Everything follows from the generator
that is passed in::

    graph = random_graph(np.random.default_rng(7), depth=5)
    tiny = random_graph(np.random.default_rng(7), shape=(1, 3), depth=2, classes=2)
    points = enumerate_box(lower, upper)  # each integer point of a box

``graphs(...)`` is the same as a Hypothesis strategy; it shrinks the depth and the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from cactus_edge import profiles, scales, universal
from cactus_edge.execute import accumulate, run_operator
from cactus_edge.graph import (
    Activation,
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    Dequantize,
    DType,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Padding,
    Quantization,
    Quantize,
    Reshape,
    Softmax,
    Tensor,
    Weights,
    window_geometry,
)
from cactus_edge.semantics import AddRounding

CORE_OPERATORS = (
    "CONV_2D",
    "DEPTHWISE_CONV_2D",
    "FULLY_CONNECTED",
    "ADD",
    "AVERAGE_POOL_2D",
    "MAX_POOL_2D",
    "PAD",
    "RESHAPE",
)
EDGES = ("QUANTIZE", "SOFTMAX", "DEQUANTIZE")
TINY_SHAPES = ((1, 3), (1, 2), (1, 1, 3, 1), (1, 1, 2, 1), (1, 1, 1, 2), (1, 3, 1, 1))
_SAMPLES = 24
_LARGEST = 8


def random_graph(
    rng: np.random.Generator,
    *,
    operators: Sequence[str] = CORE_OPERATORS,
    depth: int = 4,
    shape: tuple[int, ...] | None = None,
    classes: int | None = 3,
    channels: int = 9,
    bits: Sequence[int] = (8, 4),
    per_channel: bool | None = None,
    sparsity: float = 0.0,
    universal: bool = False,
    edges: Sequence[str] = (),
    input_type: DType = DType.INT8,
) -> Graph:
    """A graph that is valid, resolvable under every profile and writable.

    Args:
        rng: decides everything.
        operators: the kinds to draw from; ADD brings a branch of its own where it needs one.
        depth: how many operators are drawn before the last layer.
        shape: of the input, with the leading 1; drawn if None. See ``TINY_SHAPES``.
        classes: outputs of a FULLY_CONNECTED layer at the end; None ends without that layer.
        channels: the largest number of channels that a convolution is given.
        bits: weight widths to draw from, 2 to 8.
        per_channel: whether layers have a weight scale for each channel; drawn if None. Int4
            FULLY_CONNECTED is per-tensor in any case, as files cannot hold another one.
        sparsity: the share of weights that are set to 0.
        universal: whether all rounding profiles have to agree on every input.
        edges: any of ``EDGES``, put at the start and at the end.
        input_type: UINT8 gives graphs for our own executors; files cannot hold them.
    """
    if shape is None:
        height, width, depth_in = (int(rng.integers(3, 7)) for _ in range(3))
        flat = rng.random() < 0.15 and not {"FULLY_CONNECTED", "ADD", "RESHAPE"}.isdisjoint(
            operators
        )
        shape = (1, height * 4) if flat else (1, height, width, min(depth_in, 4))
    options = _Options(channels, tuple(bits), per_channel, sparsity, universal)
    builder = _Builder(rng, options, shape, input_type)
    for _ in range(depth):
        applicable = [kind for kind in operators if builder.applies(kind)]
        if applicable:
            # What flattens is drawn less often, or windows would be rare.
            flattens = [0.3 if k in ("FULLY_CONNECTED", "RESHAPE") else 1.0 for k in applicable]
            chance = np.array(flattens) / sum(flattens)
            builder.append(str(rng.choice(applicable, p=chance)), operators)
    if classes is not None:
        builder.fully_connected(classes)
    return builder.finish(edges)


def graphs(
    *, depth: st.SearchStrategy[int] | None = None, **options: object
) -> st.SearchStrategy[Graph]:
    """``random_graph`` as a Hypothesis strategy; ``options`` are its keyword arguments."""

    def build(seed: int, layers: int) -> Graph:
        return random_graph(np.random.default_rng(seed), depth=layers, **options)  # type: ignore

    depths = st.integers(1, 6) if depth is None else depth
    return st.builds(build, st.integers(0, 2**32 - 1), depths)


def random_inputs(rng: np.random.Generator, graph: Graph, count: int) -> Int64Array:
    """Stored integers over the whole range of the input's type, int64 [count, ...]."""
    tensor = graph.tensors[graph.core_input]
    lower, upper = tensor.dtype.range
    return rng.integers(lower, upper + 1, (count, *tensor.shape[1:]))


def random_box(
    rng: np.random.Generator, graph: Graph, radius: int
) -> tuple[Int64Array, Int64Array]:
    """Lower and upper ends, int64 [...], at most ``radius`` from one point, inside the type."""
    lower, upper = graph.tensors[graph.core_input].dtype.range
    center = random_inputs(rng, graph, 1)[0]
    below, above = (rng.integers(0, radius + 1, center.shape) for _ in range(2))
    return np.maximum(center - below, lower), np.minimum(center + above, upper)


def enumerate_box(lower: Int64Array, upper: Int64Array) -> Int64Array:
    """Every integer point between ``lower`` and ``upper``, int64 [points, ...]."""
    extents = (upper - lower + 1).reshape(-1)
    count = int(np.prod(extents))
    assert count <= 1 << 24, f"a box of {count} points is too large to enumerate"
    places = np.cumprod(np.append(1, extents[:0:-1]))[::-1]  # np.unravel_index has 32 axes
    offsets = np.arange(count)[:, None] // places % extents
    return offsets.reshape(count, *lower.shape).astype(np.int64) + lower


@dataclass(frozen=True)
class _Options:
    channels: int
    bits: tuple[int, ...]
    per_channel: bool | None
    sparsity: float
    universal: bool


@dataclass
class _Builder:
    """A graph that grows at ``current``; ``samples`` hold each tensor's values on some inputs."""

    rng: np.random.Generator
    options: _Options
    input_shape: tuple[int, ...]
    input_type: DType
    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    samples: list[Int64Array] = field(default_factory=list)
    current: int = 0

    def __post_init__(self) -> None:
        lower, upper = self.input_type.range
        quantization = Quantization.of(1 / 255, lower)
        if self.rng.random() < 0.5:
            quantization = Quantization.of(self.draw_scale(), self.integer(lower, upper))
        self.tensors.append(Tensor("input", self.input_shape, self.input_type, quantization))
        self.samples.append(self.rng.integers(lower, upper + 1, (_SAMPLES, *self.input_shape[1:])))

    def integer(self, lowest: int, highest: int) -> int:
        return int(self.rng.integers(lowest, highest + 1))

    def draw_scale(self) -> float:
        """Within a factor of 16, so that any two tensors can be added."""
        return float(10 ** self.rng.uniform(-2.2, -1.0))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors[self.current].shape

    def applies(self, kind: str) -> bool:
        if kind == "PAD":
            return len(self.shape) == 4 and max(self.shape[1:3]) < _LARGEST - 1
        return len(self.shape) == 4 or kind in ("FULLY_CONNECTED", "ADD", "RESHAPE")

    def append(self, kind: str, allowed: Sequence[str]) -> None:
        match kind:
            case "CONV_2D":
                self.convolution(depthwise=False)
            case "DEPTHWISE_CONV_2D":
                self.convolution(depthwise=True)
            case "FULLY_CONNECTED":
                self.fully_connected(self.integer(1, 2 * self.options.channels))
            case "ADD":
                self.add(allowed)
            case "AVERAGE_POOL_2D" | "MAX_POOL_2D":
                self.pool(AveragePool2D if kind == "AVERAGE_POOL_2D" else MaxPool2D)
            case "PAD":
                self.pad()
            case "RESHAPE":
                self.reshape()
            case _:
                raise ValueError(f"no operator {kind}")

    def emit(self, op: Operator, output: Tensor, values: Int64Array | None = None) -> None:
        """Append ``op``, whose output is the tensor after the last one, and run the samples."""
        self.tensors.append(output)
        self.operators.append(op)
        if values is None:
            inputs = [self.samples[i] for i in op.inputs]
            values = run_operator(self.graph(), self.resolved(op), inputs)
        self.samples.append(values)
        self.current = op.output

    def graph(self) -> Graph:
        return Graph(tuple(self.tensors), tuple(self.operators), 0, len(self.tensors) - 1)

    def resolved(self, op: Operator) -> Operator:
        profile = profiles.PROFILES[profiles.DEFAULT]
        if isinstance(op, Linear):
            return replace(op, requantization=profiles.requantization(self.graph(), op, profile))
        if isinstance(op, Add):
            integers = profiles.add_requantization(self.graph(), op, profile.add)
            return replace(op, requantization=integers)
        return op

    def head(self, kind: str, *others: int) -> dict[str, object]:
        """The fields that every operator has."""
        name = f"{kind.lower()}_{len(self.operators)}"
        return {"name": name, "inputs": (self.current, *others), "output": len(self.tensors)}

    def activation(self, quantization: Quantization) -> Activation:
        """One that leaves at least two levels, which XNNPACK asks for."""
        choice = (Activation.NONE, Activation.RELU, Activation.RELU6)[self.integer(0, 2)]
        six = 6 / float(quantization.scale)
        if choice is Activation.RELU6 and six < 2:
            return Activation.NONE
        return Activation.NONE if quantization.zero_point > 100 else choice

    # ------------------------------------------------------------------ linear layers
    def convolution(self, *, depthwise: bool, keep_shape: bool = False, scale: float = 0.0) -> None:
        """A random geometry that fits the input; stride 1, SAME and equal channels to keep it."""
        _, *extents, source = self.shape
        limit = self.options.channels
        if depthwise:
            multiplier = 1 if keep_shape else self.integer(1, max(1, min(3, 18 // source)))
            target = source * multiplier
        else:
            target = source if keep_shape else self.integer(1, limit)
        while True:
            kernel = (self.integer(1, 3), self.integer(1, 3))
            stride = (1, 1) if keep_shape else (self.integer(1, 2), self.integer(1, 2))
            dilation = (self.integer(1, 2), self.integer(1, 2))
            padding = Padding.SAME if keep_shape or self.rng.random() < 0.5 else Padding.VALID
            output = tuple(
                window_geometry(extents[a], kernel[a], stride[a], dilation[a], padding)[0]
                for a in (0, 1)
            )
            covering = all(
                (output[a] - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1 >= extents[a]
                for a in (0, 1)
            )
            # Other SAME windows are not covered by every profile, see ``profiles.Profile``.
            fits = padding is Padding.VALID or kernel == (1, 1) or covering
            if min(output) >= 1 and fits:
                break
        shape = (1, *kernel, target) if depthwise else (target, *kernel, source)
        kind = DepthwiseConv2D if depthwise else Conv2D
        draft = kind(
            **self.head("DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"),  # type: ignore
            weights=self.weights(shape),
            bias=np.zeros(target, np.int32),
            stride=stride,
            dilation=dilation,
            padding=padding,
        )
        per_channel = self.granularity()
        self.fit(draft, (1, *output, target), per_channel=per_channel, scale=scale)

    def fully_connected(self, outputs: int, scale: float = 0.0) -> None:
        weights = self.weights((outputs, self.tensors[self.current].size))
        draft = FullyConnected(
            **self.head("FULLY_CONNECTED"),  # type: ignore
            weights=weights,
            bias=np.zeros(outputs, np.int32),
        )
        per_channel = self.granularity() and weights.bits > 4
        self.fit(draft, (1, outputs), per_channel=per_channel, scale=scale)

    def granularity(self) -> bool:
        chosen = self.options.per_channel
        return bool(self.rng.random() < 0.5) if chosen is None else chosen

    def weights(self, shape: tuple[int, ...]) -> Weights:
        bits = int(self.rng.choice(self.options.bits))
        largest = (1 << (bits - 1)) - 1
        values = self.rng.integers(-largest, largest + 1, shape)
        values[self.rng.random(shape) < self.options.sparsity] = 0
        if self.rng.random() < 0.15:  # the one value without a positive twin
            values.flat[self.integer(0, values.size - 1)] = -largest - 1
        return Weights(values, bits)

    def fit(
        self, draft: Linear, shape: tuple[int, ...], *, per_channel: bool, scale: float
    ) -> None:
        """Scales and bias under which the samples spread over the output's range."""
        rng = self.rng
        source = self.tensors[self.current]
        channels = draft.channels
        sums = accumulate(draft, source, self.samples[self.current]).reshape(-1, channels)
        low, high = sums.min(axis=0), sums.max(axis=0)
        spread = high - low if per_channel else np.array([(high - low).max()])
        gain = 255 * 2 ** rng.uniform(-1, 1, spread.shape)
        most = 0.48 if self.options.universal else 0.9
        targets = np.clip(gain / np.maximum(spread, 1), 2**-11, most)
        output_scale = scale or self.draw_scale()
        low_zero = self.options.universal or rng.random() < 0.4
        zero_point = -128 if low_zero else self.integer(-128, 127)
        quantization = Quantization.of(output_scale, zero_point)
        middle = rng.uniform(-70, 70, channels) - zero_point
        bias = np.rint(middle / targets - (low + high) / 2).astype(np.int64)
        self.tensors.append(Tensor(draft.name, shape, DType.INT8, quantization))
        activation = self.activation(quantization)
        op = replace(draft, bias=bias.astype(np.int32), activation=activation)
        ratio = float(quantization.scale) / float(source.quantization.scale)  # type: ignore
        op = (
            self.snapped(op, targets, ratio)
            if self.options.universal
            else scaled(op, targets * ratio)
        )
        output = self.tensors.pop()
        self.emit(op, output)

    def snapped(self, op: Linear, targets: np.ndarray, ratio: float) -> Linear:
        """Multipliers just above the reciprocals of even integers, where all profiles agree."""
        rng = self.rng
        halves = np.maximum(np.rint(0.5 / targets), 1)
        chosen = np.empty(targets.shape)
        bad = np.ones(targets.shape, bool)
        for attempt in range(400):
            excess = 10 ** rng.uniform(-4.0, -2.6, targets.shape)
            wanted = halves + rng.integers(-(attempt // 20) - 1, attempt // 20 + 2, halves.shape)
            chosen = np.where(bad, 1 / (2 * np.maximum(wanted, 1) - excess), chosen)
            candidate = scaled(op, chosen * ratio)
            disagreeing = universal.disagreeing_channels(self.graph(), candidate)
            if not disagreeing:
                return candidate
            bad[:] = False
            bad[list(disagreeing) if bad.size > 1 else [0]] = True
        raise AssertionError(f"no universal scale found for {op.kind} of targets {targets}")

    # ------------------------------------------------------------------ the others
    def add(self, allowed: Sequence[str]) -> None:
        """With an earlier tensor of this shape, or with a new branch, or with itself."""
        here = self.tensors[self.current]
        # TFLite overwrites what a RESHAPE has read, see ``storable``.
        dead = {self.current} | {op.inputs[0] for op in self.operators if isinstance(op, Reshape)}
        others = [
            index
            for index, tensor in enumerate(self.tensors)
            if tensor.shape == here.shape and index not in dead and self.addable(tensor, here)
        ]
        other = self.current
        if others and self.rng.random() < 0.6:
            other = int(self.rng.choice(others))
        else:
            scale = float(here.quantization.scale) if self.options.universal else 0.0  # type: ignore
            branches = [k for k in ("CONV_2D", "DEPTHWISE_CONV_2D") if k in allowed]
            if len(self.shape) == 4 and branches:
                depthwise = str(self.rng.choice(branches)) == "DEPTHWISE_CONV_2D"
                self.convolution(depthwise=depthwise, keep_shape=True, scale=scale)
            elif len(self.shape) == 2 and "FULLY_CONNECTED" in allowed:
                self.fully_connected(self.shape[1], scale=scale)
        a, b = (self.tensors[i].quantization for i in (self.current, other))
        assert a is not None and b is not None
        for _ in range(50):
            factor = self.rng.choice([1, 3 / 2, 5 / 3, 7 / 5])
            if not self.options.universal:
                factor = self.rng.uniform(0.6, 1.8)
            scale = max(float(a.scale), float(b.scale)) * float(factor)
            quantization = Quantization.of(scale, self.integer(-128, 100))
            ends = [scales.decode_float32(q.scale_bits) for q in (a, b, quantization)]
            integers = scales.add_parameters(AddRounding.DOUBLE_HALF_AWAY, *ends)
            # Others are not covered by every profile, see ``semantics.add_early_shift``.
            if profiles.early_shift_agrees(integers, -128 - a.zero_point, -128 - b.zero_point):
                break
        else:
            return
        head = self.head("ADD", other)
        op = Add(**head, activation=self.activation(quantization))  # type: ignore
        self.emit(op, Tensor(op.name, self.shape, DType.INT8, quantization))

    def addable(self, a: Tensor, b: Tensor) -> bool:
        assert a.quantization is not None and b.quantization is not None
        return not self.options.universal or a.quantization.scale_bits == b.quantization.scale_bits

    def pool(self, kind: type[AveragePool2D] | type[MaxPool2D]) -> None:
        _, *extents, channels = self.shape
        while True:
            window = (self.integer(1, 3), self.integer(1, 3))
            stride = (self.integer(1, 2), self.integer(1, 2))
            padding = Padding.SAME if self.rng.random() < 0.5 else Padding.VALID
            output = tuple(
                window_geometry(extents[a], window[a], stride[a], 1, padding)[0] for a in (0, 1)
            )
            if min(output) >= 1:
                break
        source = self.tensors[self.current]
        assert source.quantization is not None
        label = "AVERAGE_POOL_2D" if kind is AveragePool2D else "MAX_POOL_2D"
        op = kind(
            **self.head(label),  # type: ignore
            window=window,
            stride=stride,
            padding=padding,
            activation=self.activation(source.quantization),
        )
        self.emit(op, replace(source, name=op.name, shape=(1, *output, channels)))

    def pad(self) -> None:
        pairs = tuple((self.integer(0, 1), self.integer(0, 2)) for _ in range(2))
        op = Pad(**self.head("PAD"), paddings=((0, 0), *pairs, (0, 0)))  # type: ignore
        shape = tuple(e + b + a for e, (b, a) in zip(self.shape, op.paddings, strict=True))
        self.emit(op, replace(self.tensors[self.current], name=op.name, shape=shape))

    def reshape(self, *, flat: bool = False) -> None:
        size = self.tensors[self.current].size
        divisor = int(self.rng.choice([d for d in range(1, size + 1) if size % d == 0]))
        rest = size // divisor
        second = int(self.rng.choice([d for d in range(1, rest + 1) if rest % d == 0]))
        spatial = (1, divisor, second, rest // second)
        fits = max(divisor, second) <= _LARGEST and spatial[3] <= 2 * self.options.channels
        shape = spatial if fits and not flat and self.rng.random() < 0.6 else (1, size)
        op = Reshape(**self.head("RESHAPE"))  # type: ignore
        self.emit(op, replace(self.tensors[self.current], name=op.name, shape=shape))

    # ------------------------------------------------------------------ edges
    def finish(self, edges: Sequence[str]) -> Graph:
        unknown = set(edges) - set(EDGES)
        assert not unknown, f"no edges {unknown}"
        if "SOFTMAX" in edges:
            if len(self.shape) == 4:
                self.reshape(flat=True)
            op = Softmax(**self.head("SOFTMAX"))  # type: ignore
            output = Tensor(op.name, self.shape, DType.INT8, Quantization.of(1 / 256, -128))
            self.emit(op, output, self.samples[self.current])
        if "DEQUANTIZE" in edges:
            op = Dequantize(**self.head("DEQUANTIZE"))  # type: ignore
            output = Tensor(op.name, self.shape, DType.FLOAT32)
            self.emit(op, output, self.samples[self.current])
        if not self.operators:
            self.reshape()
        start = 0
        if "QUANTIZE" in edges:
            start = len(self.tensors)
            self.tensors.append(Tensor("real_input", self.input_shape, DType.FLOAT32))
            self.operators.insert(0, Quantize(name="input", inputs=(start,), output=0))
        return Graph(tuple(self.tensors), tuple(self.operators), start, self.current)


def scaled(op: Linear, weight_scale: np.ndarray) -> Linear:
    """``op`` with these weight scales, rounded to float32."""
    bits = weight_scale.astype(np.float32).view(np.uint32)
    return replace(op, weights=Weights(op.weights.values, op.weights.bits, bits))
