"""A resolved graph as a program: steps, packed tables, and the memory that a thread needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int8Array,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Reshape,
    window_geometry,
)
from cactus_edge.kernels import steps as opcodes
from cactus_edge.kernels import tabled
from cactus_edge.kernels.demand import Demand, Layout, TableBuilder
from cactus_edge.kernels.formats.depthwise import as_matrix
from cactus_edge.kernels.pack import pack_linear, window_offsets
from cactus_edge.kernels.place import Placement, byte_offset, lies_inside, padding, place
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.emit import depthwise_wide, wide
from cactus_edge.kernels.simd.pack import Matrix, pack_taps, pack_vector, with_rows
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import Step, table
from cactus_edge.operators import Lookup, Move, Pair

_SLACK = 256
"""Tiles load whole registers, behind the last activation too."""
_EPILOGUE = 8
_FEW_INPUTS = 4
"""A depthwise layer of so many input channels with more outputs is a convolution with zeros."""


@dataclass(frozen=True, eq=False)
class Program:
    """What ``walk`` runs.

    ``operators`` are positions in the graph's core for the first steps, -1 for copying the input;
    the steps behind them copy results. ``sizes`` are the bytes of their packed tables.
    ``results[t]`` is where tensor t begins in a row of results.
    """

    tier: Tier
    steps: npt.NDArray[np.void]
    operators: tuple[int, ...]
    sizes: tuple[int, ...]
    tables: Tables
    block: int
    arena: int
    demand: Demand
    placements: tuple[Placement, ...]
    results: dict[int, int]
    image_bytes: int
    result_bytes: int

    def opcode(self, number: int) -> int:
        """Which kernel computes an operator, by its position in the core."""
        return int(self.steps[self.operators.index(number)]["opcode"])

    def workspace(self) -> Workspace:
        """Memory for one thread, borders filled with zero points."""
        activations = np.zeros(self.arena + _SLACK, np.uint8)
        for placement in self.placements:
            activations[placement.begin : placement.end] = placement.zero
        return Workspace(
            activations,
            np.zeros(self.demand.patches, np.int16),
            np.zeros(self.demand.accumulators, np.int32),
            np.zeros(self.demand.values, np.int8),
            np.zeros(self.demand.rows, np.int32),
            np.zeros(self.demand.rows, np.int64),
            np.zeros(_EPILOGUE, np.int64),
        )


def build(
    graph: Graph,
    wanted: Sequence[int],
    block: int,
    layout: Layout | Mapping[int, Layout],
    tier: Tier,
    *,
    depthwise_tiles: bool = True,
) -> Program:
    """Program of a valid, resolved graph.

    Args:
        graph: resolved and validated.
        wanted: tensors whose values are results.
        block: images that are computed together, layer by layer.
        layout: of the weights of CONV_2D and FULLY_CONNECTED; of all, or by position in the core.
        tier: of the kernels.
        depthwise_tiles: whether DEPTHWISE_CONV_2D runs on vector tiles where the tier has them; the
            interval kernels have none.
    """
    placements, arena = place(graph, block)
    tiles = depthwise_tiles and tier is not Tier.PLAIN
    context = _Context(graph, placements, block, TableBuilder(), tier, tiles, frozenset(wanted))
    steps, operators, sizes = [_load(context)], [-1], [0]
    demand = Demand()
    for number, op in enumerate(graph.core):
        if isinstance(op, Reshape) and _shares(graph, op.output):
            placements[op.output] = placements[op.inputs[0]].reshaped()
            continue
        if isinstance(op, Pad) and lies_inside(graph, op):
            continue
        chosen = layout if isinstance(layout, Layout) else layout.get(number, Layout.DENSE)
        before = context.builder.size
        made, needed = _steps(context, op, chosen)
        steps += made
        operators += [number] * len(made)
        sizes += [context.builder.size - before] + [0] * (len(made) - 1)
        demand = demand.union(needed)
    results: dict[int, int] = {}
    size = 0
    for tensor in wanted:
        results[tensor] = size
        steps.append(_store(context, tensor, size))
        size += graph.tensors[tensor].size
    return Program(
        tier=tier,
        steps=table(steps),
        operators=tuple(operators),
        sizes=tuple(sizes),
        tables=context.builder.build(),
        block=block,
        arena=arena,
        demand=demand,
        placements=tuple(placements.values()),
        results=results,
        image_bytes=graph.tensors[graph.core_input].size,
        result_bytes=size,
    )


def _readers(graph: Graph, tensor: int) -> list[Operator]:
    return [op for op in graph.core if tensor in op.inputs]


def _shares(graph: Graph, tensor: int) -> bool:
    """Whether a reshaped tensor needs no bytes of its own: its readers take any element apart."""
    return all(
        isinstance(op, FullyConnected)
        or _reads_a_pixel(graph, op)
        or (isinstance(op, Reshape) and _shares(graph, op.output))
        for op in _readers(graph, tensor)
    )


def _reads_a_pixel(graph: Graph, op: Operator) -> bool:
    """Whether a convolution is a matrix product of one pixel, as int4 models have them."""
    return (
        isinstance(op, Conv2D)
        and not isinstance(op, DepthwiseConv2D)
        and graph.tensors[op.inputs[0]].shape[1:3] == op.weights.values.shape[1:3] == (1, 1)
    )


def _any_order(graph: Graph, tensor: int, wanted: Collection[int]) -> bool:
    """Whether the channels of a tensor may lie in any order: its readers all look them up."""
    return tensor not in wanted and all(
        (isinstance(op, Linear) and not isinstance(op, DepthwiseConv2D))
        or (isinstance(op, Reshape) and _shares(graph, op.output) and op.output not in wanted)
        for op in _readers(graph, tensor)
    )


@dataclass(frozen=True)
class _Context:
    graph: Graph
    placements: dict[int, Placement]
    block: int
    builder: TableBuilder
    tier: Tier
    depthwise_tiles: bool
    wanted: frozenset[int]


def _load(context: _Context) -> Step:
    index = context.graph.core_input
    target = context.placements[index].offsets()
    return Step(
        opcode=opcodes.LOAD,
        target=context.placements[index].origin,
        target_image=context.placements[index].image,
        flip=byte_offset(context.graph.tensors[index]),
        **context.builder.copy_runs(np.arange(target.size), target),
    )


def _store(context: _Context, index: int, begin: int) -> Step:
    source = context.placements[index].offsets()
    return Step(
        opcode=opcodes.STORE,
        source=context.placements[index].origin,
        source_image=context.placements[index].image,
        target=begin,
        flip=byte_offset(context.graph.tensors[index]),
        **context.builder.copy_runs(source, np.arange(source.size)),
    )


def _steps(context: _Context, op: Operator, layout: Layout) -> tuple[list[Step], Demand]:
    match op:
        case Linear():
            step, demand = _linear(context, op, layout)
        case Add():
            step, demand = _add(context, op), Demand()
        case Pool2D():
            step, demand = _pool(context, op)
        case Pad() | Reshape():
            step, demand = _move(context, op), Demand()
        case Lookup():
            offset = context.placements[op.output].offset
            step = tabled.lookup(op, context.builder, _rows(context, op), offset)
            demand = Demand()
        case Pair():
            ends = [context.placements[index] for index in op.inputs]
            step = tabled.pair(op, context.builder, _rows(context, op), *ends)
            demand = Demand()
        case Move():
            copies = tabled.moves(context.graph, op, context.builder, context.placements)
            return copies, Demand()
        case _:
            raise AssertionError(f"{op.kind} is not part of the integer core")
    return [step], demand


def _common(context: _Context, op: Operator) -> dict[str, int]:
    """The fields that every operator but a copy fills in."""
    source, target = context.placements[op.inputs[0]], context.placements[op.output]
    lower, upper = context.graph.output_range(op)
    return {
        "source": source.origin,
        "source_image": source.image,
        "source_row": source.row,
        "source_zero": source.zero,
        "target": target.origin,
        "target_image": target.image,
        "target_row": target.row,
        "target_zero": target.zero,
        "lower": lower + target.offset,
        "upper": upper + target.offset,
    }


def _rows(context: _Context, op: Operator) -> dict[str, int]:
    """``_common`` of an operator that writes its output row by row, with no pixels."""
    target = context.placements[op.output]
    return {**_common(context, op), "height": target.rows, "channels": target.row_bytes}


def _linear(context: _Context, op: Linear, layout: Layout) -> tuple[Step, Demand]:
    fields = _common(context, op)
    source = context.placements[op.inputs[0]]
    requantization = op.requantization
    assert requantization is not None, "graph is not resolved"
    codes = requantization.rounding
    ends = np.flatnonzero(np.concatenate([np.diff(codes) != 0, [True]])) + 1
    fields |= {
        "channels": op.channels,
        "bias": context.builder.integers(op.bias),
        "rounding": context.builder.integers(np.stack([ends, codes[ends - 1]], axis=1)),
        "round_count": ends.size,
        "multipliers": context.builder.integers(requantization.multiplier, requantization.shift),
    }
    rows = context.block
    if isinstance(op, Conv2D):
        _, height, width, _ = context.graph.tensors[op.output].shape
        channels = context.graph.tensors[op.inputs[0]].shape[3]
        top, left = (padding(context.graph, op, axis)[0] for axis in (0, 1))
        fields |= {
            "height": height,
            "width": width,
            "source": source.origin - top * source.row - left * channels,
            "down": op.stride[0] * source.row,
            "right": op.stride[1] * channels,
        }
        rows *= height * width
    if isinstance(op, DepthwiseConv2D):
        return _depthwise(context, op, fields, rows, layout)
    base = Step(opcode=opcodes.DENSE, **fields)
    if context.tier is not Tier.PLAIN:
        values = op.weights.values.reshape(op.channels, -1)
        return _vector(context, op, values, base, rows, layout)
    return pack_linear(context.builder, op, base, source, rows, layout)


def _vector(
    context: _Context, op: Linear, values: Int8Array, base: Step, rows: int, layout: Layout
) -> tuple[Step, Demand]:
    """A matrix [channels, inputs] on vector tiles; may change the order of the output channels."""
    source = context.placements[op.inputs[0]]
    if isinstance(op, Conv2D):
        channels = context.graph.tensors[op.inputs[0]].shape[3]
        offsets = window_offsets(op, source, channels).reshape(-1)
    else:
        offsets = source.offsets()
    many = rows >= wide(context.tier).pixels
    base = _tiled(context, op, base, wide(context.tier).pixels if many else 1)
    ascending = np.argsort(offsets, kind="stable")
    packed = pack_vector(
        context.builder,
        context.tier,
        op,
        Matrix(values[:, ascending], offsets[ascending], op.weights.bits),
        base,
        layout,
        single=rows == 1,
        any_order=_any_order(context.graph, op.output, context.wanted),
    )
    if packed.order is not None:
        context.placements[op.output] = context.placements[op.output].ordered(packed.order)
    return packed.step, packed.demand


def _tiled(context: _Context, op: Linear, base: Step, pixels: int) -> Step:
    """``base`` for tiles of so many rows."""
    source, target = context.placements[op.inputs[0]], context.placements[op.output]
    return with_rows(context.builder, base, source, target, context.block, pixels)


def _depthwise(
    context: _Context, op: DepthwiseConv2D, fields: dict[str, int], rows: int, layout: Layout
) -> tuple[Step, Demand]:
    channels = context.graph.tensors[op.inputs[0]].shape[3]
    taps = window_offsets(op, context.placements[op.inputs[0]], channels)[..., 0].reshape(-1)
    weights = op.weights.values.reshape(-1, op.channels)
    base = Step(opcode=opcodes.DEPTHWISE, **fields)
    if context.depthwise_tiles:
        if op.channels == channels:
            base = _tiled(context, op, base, depthwise_wide(context.tier).pixels)
            matrix = Matrix(weights.T, taps, op.weights.bits)
            packed = pack_taps(context.builder, context.tier, op, matrix, base)
            return packed.step, packed.demand
        if channels <= _FEW_INPUTS:
            return _vector(context, op, as_matrix(weights, channels), base, rows, layout)
    step = replace(
        base,
        tile=1,
        multiplier=op.channels // channels,
        taps=context.builder.integers(taps),
        tap_count=taps.size,
        weights=context.builder.weights(op.weights.values),
    )
    return step, Demand(accumulators=op.channels)


def _add(context: _Context, op: Add) -> Step:
    requantization = op.requantization
    assert requantization is not None, "graph is not resolved"
    other = context.placements[op.inputs[1]]
    return Step(
        opcode=opcodes.ADD,
        other=other.origin,
        other_image=other.image,
        other_row=other.row,
        other_zero=other.zero,
        rounding=context.builder.integers(requantization.integers),
        round_count=int(requantization.rounding),
        **_rows(context, op),
    )


def _pool(context: _Context, op: Pool2D) -> tuple[Step, Demand]:
    source = context.graph.tensors[op.inputs[0]].shape
    _, height, width, channels = context.graph.tensors[op.output].shape
    before = [
        window_geometry(source[1 + a], op.window[a], op.stride[a], 1, op.padding)[1] for a in (0, 1)
    ]
    fields = _common(context, op)
    # The pools compute with stored integers and not with distances from the zero point.
    fields["source_zero"] = context.placements[op.inputs[0]].offset
    step = Step(
        opcode=opcodes.AVERAGE if isinstance(op, AveragePool2D) else opcodes.MAXIMUM,
        height=height,
        width=width,
        channels=channels,
        pool=context.builder.integers(op.window, op.stride, before, source[1:3]),
        **fields,
    )
    return step, Demand(accumulators=channels)


def _move(context: _Context, op: Pad | Reshape) -> Step:
    source, target = context.placements[op.inputs[0]], context.placements[op.output]
    written = target.offsets()
    if isinstance(op, Pad):
        # The padding holds the zero point already, like the borders.
        _, height, width, _ = context.graph.tensors[op.inputs[0]].shape
        (top, _), (left, _) = op.paddings[1], op.paddings[2]
        grid = written.reshape(context.graph.tensors[op.output].shape[1:])
        written = grid[top : top + height, left : left + width].reshape(-1)
    return Step(
        opcode=opcodes.COPY,
        source=source.origin,
        source_image=source.image,
        target=target.origin,
        target_image=target.image,
        **context.builder.copy_runs(source.offsets(), written),
    )
