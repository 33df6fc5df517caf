"""Tables of one input, and moved elements, as C."""

from __future__ import annotations

import numpy as np

from cactus_edge.csource.text import LayerText, Needs, block, c_type, function
from cactus_edge.graph import Graph
from cactus_edge.operators import Lookup, Move, PadAxes, sources


def lookup(graph: Graph, op: Lookup, index: int, needs: Needs) -> LayerText:
    """``layer_<index>(input, output)``; a table without a cycle of kinds needs no counter."""
    assert op.table is not None, "graph is not resolved"
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    kinds, least = len(op.table), source.dtype.range[0]
    row = "" if kinds == 1 else f"(n % {kinds}) * 256 + "
    entry = f"entries_{index}[{row}input[n] - ({least})]"
    lines = block(f"for (int32_t n = 0; n < {target.size}; n++)", f"output[n] = {entry};")
    kind, given = c_type(target.dtype), c_type(source.dtype)
    arguments = [f"const {given} *restrict input", f"{kind} *restrict output"]
    text = needs.table(f"entries_{index}", op.table, unsigned=kind == "uint8_t")
    return LayerText(f"{text}{function(f'layer_{index}', arguments, lines)}", 0, "", op.table.size)


def move(graph: Graph, op: Move, index: int, needs: Needs) -> LayerText:
    """``layer_<index>(input_0, ..., output)``: runs of (read, written, length) of each input."""
    target = graph.tensors[op.output]
    kind = c_type(target.dtype)
    text, lines = "", list[str]()
    if isinstance(op, PadAxes):
        lines.append(needs.helper("fill_bytes", "output", target.zero_point, target.size))
    for number, (read, written) in enumerate(sources(graph, op)):
        broken = (np.diff(read) != 1) | (np.diff(written) != 1)
        starts = np.flatnonzero(np.concatenate([[True], broken]))
        lengths = np.diff(np.concatenate([starts, [read.size]]))
        runs = np.stack([read[starts], written[starts], lengths], axis=1).astype(np.int64)
        name = f"runs_{index}_{number}"
        text += needs.table(name, runs, unsigned=True)
        lines += block(
            f"for (int32_t run = 0; run < {3 * len(runs)}; run += 3)",
            *block(
                f"for (int32_t n = 0; n < (int32_t){name}[run + 2]; n++)",
                f"output[{name}[run + 1] + n] = input_{number}[{name}[run] + n];",
            ),
        )
    arguments = [f"const {kind} *restrict input_{n}" for n in range(len(op.inputs))]
    arguments.append(f"{kind} *restrict output")
    return LayerText(text + function(f"layer_{index}", arguments, lines))
