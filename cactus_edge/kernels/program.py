"""A resolved graph as a program: steps, packed tables, and the memory that a thread needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    Graph,
    Int64Array,
    Linear,
    Operator,
    Pad,
    Pool2D,
    Reshape,
    window_geometry,
)
from cactus_edge.kernels import steps as opcodes
from cactus_edge.kernels.demand import Demand, Layout, TableBuilder
from cactus_edge.kernels.pack import pack_linear, window_offsets
from cactus_edge.kernels.place import Placement, byte_offset, padding, place
from cactus_edge.kernels.rows import Tables, Workspace
from cactus_edge.kernels.simd.emit import wide
from cactus_edge.kernels.simd.pack import Matrix, pack_vector
from cactus_edge.kernels.simd.tiers import Tier
from cactus_edge.kernels.steps import Step, table

_SLACK = 256
"""Tiles load whole registers, behind the last activation too."""
_EPILOGUE = 8


@dataclass(frozen=True, eq=False)
class Program:
    """What ``walk`` runs. ``results[t]`` is where tensor t begins in a row of results."""

    tier: Tier
    steps: npt.NDArray[np.void]
    tables: Tables
    block: int
    arena: int
    demand: Demand
    placements: tuple[Placement, ...]
    results: dict[int, int]
    image_bytes: int
    result_bytes: int

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


def build(graph: Graph, wanted: Sequence[int], block: int, layout: Layout, tier: Tier) -> Program:
    """Program of a valid, resolved graph.

    Args:
        graph: resolved and validated.
        wanted: tensors whose values are results.
        block: images that are computed together, layer by layer.
        layout: of the weights of CONV_2D and FULLY_CONNECTED.
        tier: of the kernels.
    """
    placements, arena = place(graph, block)
    context = _Context(graph, placements, block, layout, TableBuilder(), tier)
    steps = [_load(context)]
    demand = Demand()
    for op in graph.core:
        step, needed = _step(context, op)
        steps.append(step)
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
        tables=context.builder.build(),
        block=block,
        arena=arena,
        demand=demand,
        placements=tuple(placements.values()),
        results=results,
        image_bytes=graph.tensors[graph.core_input].size,
        result_bytes=size,
    )


@dataclass(frozen=True)
class _Context:
    graph: Graph
    placements: dict[int, Placement]
    block: int
    layout: Layout
    builder: TableBuilder
    tier: Tier


def _copy_runs(context: _Context, source: Int64Array, target: Int64Array) -> dict[str, int]:
    """The fields that describe copying elements at one set of offsets to another."""
    broken = (np.diff(source) != 1) | (np.diff(target) != 1)
    starts = np.flatnonzero(np.concatenate([[True], broken]))
    lengths = np.diff(np.concatenate([starts, [source.size]]))
    runs = np.stack([source[starts], target[starts], lengths], axis=1)
    return {"taps": context.builder.integers(runs), "tap_count": len(runs)}


def _load(context: _Context) -> Step:
    index = context.graph.core_input
    target = context.placements[index].offsets()
    return Step(
        opcode=opcodes.LOAD,
        target=context.placements[index].origin,
        target_image=context.placements[index].image,
        flip=byte_offset(context.graph.tensors[index]),
        **_copy_runs(context, np.arange(target.size), target),
    )


def _store(context: _Context, index: int, begin: int) -> Step:
    source = context.placements[index].offsets()
    return Step(
        opcode=opcodes.STORE,
        source=context.placements[index].origin,
        source_image=context.placements[index].image,
        target=begin,
        flip=byte_offset(context.graph.tensors[index]),
        **_copy_runs(context, source, np.arange(source.size)),
    )


def _step(context: _Context, op: Operator) -> tuple[Step, Demand]:
    match op:
        case Linear():
            return _linear(context, op)
        case Add():
            return _add(context, op), Demand()
        case Pool2D():
            return _pool(context, op)
        case Pad() | Reshape():
            return _move(context, op), Demand()
        case _:
            raise AssertionError(f"{op.kind} is not part of the integer core")


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


def _linear(context: _Context, op: Linear) -> tuple[Step, Demand]:
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
        return _depthwise(context, op, fields)
    base = Step(opcode=opcodes.DENSE, **fields)
    if context.tier is not Tier.PLAIN:
        return _vector(context, op, base, rows)
    return pack_linear(context.builder, op, base, source, rows, context.layout)


def _vector(context: _Context, op: Linear, base: Step, rows: int) -> tuple[Step, Demand]:
    source, target = context.placements[op.inputs[0]], context.placements[op.output]
    if isinstance(op, Conv2D):
        offsets = window_offsets(op, source, op.weights.values.shape[3]).reshape(-1)
    else:
        offsets = source.offsets()
    image, y, x = (
        axis.reshape(-1) for axis in np.indices((context.block, base.height, base.width))
    )
    windows = base.source + image * source.image + y * base.down + x * base.right
    targets = target.origin + image * target.image + y * target.row + x * base.channels
    # A tile has more rows than there may be; those compute the last row again.
    most = wide(context.tier).pixels
    windows, targets = (
        np.pad(t, (0, max(0, most - len(t))), mode="edge") for t in (windows, targets)
    )
    base = replace(
        base,
        windows=context.builder.integers(windows),
        targets=context.builder.integers(targets),
    )
    matrix = Matrix(op.weights.values.reshape(op.channels, -1), offsets, op.weights.bits)
    return pack_vector(context.builder, context.tier, op, matrix, base, rows, context.layout)


def _depthwise(
    context: _Context, op: DepthwiseConv2D, fields: dict[str, int]
) -> tuple[Step, Demand]:
    channels = context.graph.tensors[op.inputs[0]].shape[3]
    taps = window_offsets(op, context.placements[op.inputs[0]], channels)[..., 0]
    step = Step(
        opcode=opcodes.DEPTHWISE,
        tile=1,
        multiplier=op.channels // channels,
        taps=context.builder.integers(taps),
        tap_count=taps.size,
        weights=context.builder.weights(op.weights.values),
        **fields,
    )
    return step, Demand(accumulators=op.channels)


def _add(context: _Context, op: Add) -> Step:
    requantization = op.requantization
    assert requantization is not None, "graph is not resolved"
    other, target = context.placements[op.inputs[1]], context.placements[op.output]
    return Step(
        opcode=opcodes.ADD,
        other=other.origin,
        other_image=other.image,
        other_row=other.row,
        other_zero=other.zero,
        height=target.rows,
        channels=target.row_bytes,
        rounding=context.builder.integers(requantization.integers),
        round_count=int(requantization.rounding),
        **_common(context, op),
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
        **_copy_runs(context, source.offsets(), written),
    )
