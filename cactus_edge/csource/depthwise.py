"""DEPTHWISE_CONV_2D as C: one window per channel, read where it lies.

Windows inside the input are loops with constant bounds, which compilers unroll; only those that
reach over the border ask for each tap whether it is there, and count the zero point if not.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.csource import inner
from cactus_edge.csource.encoding import Layout, encode
from cactus_edge.csource.geometry import Geometry
from cactus_edge.csource.linear import halves, layer, types
from cactus_edge.csource.text import LayerText, Needs, block, literal, plus, times
from cactus_edge.graph import DepthwiseConv2D, Graph


def depthwise(
    graph: Graph, op: DepthwiseConv2D, index: int, layout: Layout, needs: Needs
) -> LayerText:
    """Tables and ``layer_<index>(input, output)``; sparse layouts become dense ones."""
    geometry = Geometry.of(graph, op)
    taps = geometry.window[0] * geometry.window[1]
    matrix = op.weights.values.reshape(taps, op.channels).T
    encoding = encode(matrix, layout, 1, where=f"{op.kind} '{op.name}'", sparse=False)
    packed = encoding.layout.packed
    weight = "weight[tap]"
    if packed:
        low = inner.low_nibble("weight[tap / 2]")
        weight = f"((tap & 1) ? weight[tap / 2] >> 4 : {low})"
    body = _Body(graph, op, index, geometry, (taps + 1) // 2 if packed else taps, weight)
    bounds: list[str] = []
    if needs.bounds and index != needs.head:
        bounds = body.lines((0, halves(graph, op)[0]), (0, halves(graph, op)[1]))
    return layer(graph, op, index, matrix, encoding, body.lines((0,), (0,)), needs, bounds)


@dataclass(frozen=True)
class _Body:
    """``weight`` is the C expression of one weight; a channel's weights take ``row_bytes``."""

    graph: Graph
    op: DepthwiseConv2D
    index: int
    geometry: Geometry
    row_bytes: int
    weight: str

    def lines(self, sources: tuple[int, ...], targets: tuple[int, ...]) -> list[str]:
        """All pixels, of one input and output, or of both ends at these offsets."""
        geometry, channels = self.geometry, self.op.channels
        repeats = channels // geometry.channels
        channel = "channel" if repeats == 1 else f"channel / {repeats}"
        rows, columns = geometry.dilation
        kind, _ = types(self.graph, self.op)
        offset = geometry.element(times("y", rows), times("x", columns))
        corner = f"input + {geometry.element('top', 'left')} + {channel}"
        inside = [
            f"const {kind} *const corner = {corner};",
            *_taps(geometry, *self.products([f"corner[{offset}{plus(s)}]" for s in sources])),
        ]
        element = f"{geometry.element('row_in', 'column_in')} + {channel}"
        zero_point = literal(self.graph.tensors[self.op.inputs[0]].zero_point)
        border = _taps(
            geometry,
            f"const int32_t row_in = top + {times('y', rows)};",
            f"const int32_t column_in = left + {times('x', columns)};",
            f"const int present = row_in >= 0 && row_in < {geometry.extent[0]}"
            f" && column_in >= 0 && column_in < {geometry.extent[1]};",
            *self.products(
                [f"present ? input[{element}{plus(s)}] : {zero_point}" for s in sources]
            ),
        )
        body = self.channels(inside, targets)
        if geometry.padded:
            body = [
                *block(f"if ({geometry.inside('top', 'left')})", *body),
                *block("else", *self.channels(border, targets)),
            ]
        out_rows, out_columns = geometry.output
        _, target = types(self.graph, self.op)
        position = f"(row * {out_columns} + column) * {channels}"
        pixel = [
            f"const int32_t top = {geometry.top()};",
            f"const int32_t left = {geometry.left()};",
            f"{target} *const target = output + {position};",
            *body,
        ]
        return block(
            f"for (int32_t row = 0; row < {out_rows}; row++)",
            *block(f"for (int32_t column = 0; column < {out_columns}; column++)", *pixel),
        )

    def products(self, values: list[str]) -> list[str]:
        """One tap: its weight times each value; a negative weight takes the other end."""
        lines = [f"const int32_t value_{i} = {value};" for i, value in enumerate(values)]
        lines.append(f"const int32_t factor = {self.weight};")
        if len(values) == 1:
            return [*lines, "sum_0 += value_0 * factor;"]
        return [*lines, *inner.both_ends("factor", "value_0", "value_1", ["sum_0", "sum_1"])]

    def channels(self, lines: list[str], targets: tuple[int, ...]) -> list[str]:
        """All channels of a pixel."""
        _, kind = types(self.graph, self.op)
        index = self.index
        return block(
            f"for (int32_t channel = 0; channel < {self.op.channels}; channel++)",
            f"const int8_t *const weight = weights_{index} + channel * {self.row_bytes};",
            *(f"int32_t sum_{i} = bias_{index}[channel];" for i in range(len(targets))),
            *lines,
            *(
                f"target[channel{plus(t)}] = ({kind})requantize_{index}(sum_{i}, channel);"
                for i, t in enumerate(targets)
            ),
        )


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
