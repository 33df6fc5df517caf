"""DEPTHWISE_CONV_2D as C: one window per channel, read where it lies.

Windows inside the input are loops with constant bounds, which compilers unroll; only those that
reach over the border ask for each tap whether it is there, and count the zero point if not.
"""

from __future__ import annotations

from cactus_edge.csource import inner
from cactus_edge.csource.encoding import Layout, encode
from cactus_edge.csource.geometry import Geometry
from cactus_edge.csource.linear import layer, types
from cactus_edge.csource.text import LayerText, Needs, block, literal, times
from cactus_edge.graph import DepthwiseConv2D, Graph


def depthwise(
    graph: Graph, op: DepthwiseConv2D, index: int, layout: Layout, needs: Needs
) -> LayerText:
    """Tables and ``layer_<index>(input, output)``; sparse layouts become dense ones."""
    source, target = types(graph, op)
    geometry = Geometry.of(graph, op)
    taps = geometry.window[0] * geometry.window[1]
    matrix = op.weights.values.reshape(taps, op.channels).T
    encoding = encode(matrix, layout, 1, where=f"{op.kind} '{op.name}'", sparse=False)
    packed = encoding.layout.packed
    weight = "weight[tap]"
    if packed:
        low = inner.low_nibble("weight[tap / 2]")
        weight = f"((tap & 1) ? weight[tap / 2] >> 4 : {low})"
    repeats = op.channels // geometry.channels
    channel = "channel" if repeats == 1 else f"channel / {repeats}"
    rows, columns = geometry.dilation
    offset = geometry.element(times("y", rows), times("x", columns))
    inside = [
        f"const {source} *const corner = input + {geometry.element('top', 'left')} + {channel};",
        *_taps(
            geometry,
            f"const int32_t value = corner[{offset}];",
            f"sum += value * {weight};",
        ),
    ]
    border = _taps(
        geometry,
        f"const int32_t row_in = top + {times('y', rows)};",
        f"const int32_t column_in = left + {times('x', columns)};",
        f"const int present = row_in >= 0 && row_in < {geometry.extent[0]}"
        f" && column_in >= 0 && column_in < {geometry.extent[1]};",
        f"const int32_t value = present ? input[{geometry.element('row_in', 'column_in')}"
        f" + {channel}] : {literal(graph.tensors[op.inputs[0]].zero_point)};",
        f"sum += value * {weight};",
    )
    row_bytes = (taps + 1) // 2 if packed else taps

    def channels(lines: list[str]) -> list[str]:
        return block(
            f"for (int32_t channel = 0; channel < {op.channels}; channel++)",
            f"const int8_t *const weight = weights_{index} + channel * {row_bytes};",
            f"int32_t sum = bias_{index}[channel];",
            *lines,
            f"target[channel] = ({target})requantize_{index}(sum, channel);",
        )

    body = channels(inside)
    if geometry.padded:
        body = [
            *block(f"if ({geometry.inside('top', 'left')})", *body),
            *block("else", *channels(border)),
        ]
    out_rows, out_columns = geometry.output
    position = f"(row * {out_columns} + column) * {op.channels}"
    pixel = [
        f"const int32_t top = {geometry.top()};",
        f"const int32_t left = {geometry.left()};",
        f"{target} *const target = output + {position};",
        *body,
    ]
    lines = block(
        f"for (int32_t row = 0; row < {out_rows}; row++)",
        *block(f"for (int32_t column = 0; column < {out_columns}; column++)", *pixel),
    )
    return layer(graph, op, index, matrix, encoding, lines, needs)


def _taps(geometry: Geometry, *lines: str) -> list[str]:
    rows, columns = geometry.window
    return block(
        f"for (int32_t y = 0; y < {rows}; y++)",
        *block(
            f"for (int32_t x = 0; x < {columns}; x++)",
            f"const int32_t tap = y * {columns} + x;",
            *lines,
        ),
    )
