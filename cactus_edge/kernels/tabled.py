"""Steps of operators that look up their results, and of those that move elements."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cactus_edge.graph import Graph
from cactus_edge.kernels.demand import TableBuilder
from cactus_edge.kernels.place import Placement
from cactus_edge.kernels.steps import COPY, LOOKUP, PAIR, Step
from cactus_edge.operators import Lookup, Move, Pair, sources

Fields = Mapping[str, int]


def lookup(op: Lookup, builder: TableBuilder, fields: Fields, offset: int) -> Step:
    """The table by stored bytes; ``offset`` makes a byte of a stored output."""
    assert op.table is not None, "graph is not resolved"
    return Step(
        opcode=LOOKUP,
        weights=builder.bytes((op.table + offset).astype(np.uint8)),
        kinds=len(op.table),
        monotone=int((np.diff(op.table, axis=1) >= 0).all()),
        **fields,
    )


def pair(op: Pair, builder: TableBuilder, fields: Fields, a: Placement, b: Placement) -> Step:
    """The input that may repeat comes second; one of a single pixel has one row."""
    assert op.table is not None, "graph is not resolved"
    turned = a.rows * a.row_bytes < b.rows * b.row_bytes
    first, other = (b, a) if turned else (a, b)
    placed = {
        "source": first.origin,
        "source_image": first.image,
        "source_row": first.row,
        "source_zero": first.zero,
        "other": other.origin,
        "other_image": other.image,
        "other_row": other.row if other.rows == fields["height"] else 0,
        "other_width": other.row_bytes,
    }
    entries = (op.table.T if turned else op.table) + 128
    return Step(
        opcode=PAIR, weights=builder.bytes(entries.astype(np.uint8)), **{**fields, **placed}
    )


def moves(
    graph: Graph, op: Move, builder: TableBuilder, placements: Mapping[int, Placement]
) -> list[Step]:
    """A copy from each input."""
    target = placements[op.output]
    steps: list[Step] = []
    for index, (read, written) in zip(op.inputs, sources(graph, op), strict=True):
        source = placements[index]
        runs = builder.copy_runs(source.offsets()[read], target.offsets()[written])
        steps.append(
            Step(
                opcode=COPY,
                source=source.origin,
                source_image=source.image,
                target=target.origin,
                target_image=target.image,
                **runs,
            )
        )
    return steps
