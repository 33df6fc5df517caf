"""ADD, the two pools, PAD and RESHAPE as C."""

from __future__ import annotations

from cactus_edge import semantics
from cactus_edge.csource.epilogue import clamped
from cactus_edge.csource.geometry import Geometry
from cactus_edge.csource.syntax import Width
from cactus_edge.csource.text import LayerText, Needs, block, c_type, function, plus
from cactus_edge.graph import Add, AveragePool2D, Graph, Operator, Pad, Pool2D
from cactus_edge.semantics import AddRounding

# `1 << shift` and the mask below it are int32 up to here; operands are below 2**29 throughout.
_NARROW_SHIFT = 30


def add(graph: Graph, op: Add, index: int, needs: Needs) -> LayerText:
    """``layer_<index>(input, other, output)``."""
    assert op.requantization is not None, "graph is not resolved"
    integers = op.requantization.integers
    double = op.requantization.rounding is AddRounding.DOUBLE_HALF_AWAY
    width: Width = 32 if double and max(integers[1::2]) <= _NARROW_SHIFT else 64
    a, b = (graph.tensors[i] for i in op.inputs)
    target = graph.tensors[op.output]
    total = needs.call(semantics.ADD[op.requantization.rounding], width, "a", "b", *integers)
    result = clamped(total, target.zero_point, graph.output_range(op), width, needs)
    arguments = [
        f"const {c_type(a.dtype)} *input",
        f"const {c_type(b.dtype)} *other",
        f"{c_type(target.dtype)} *restrict output",
    ]
    lines = block(
        f"for (int32_t n = 0; n < {target.size}; n++)",
        f"const int32_t a = input[n]{plus(-a.zero_point)};",
        f"const int32_t b = other[n]{plus(-b.zero_point)};",
        f"output[n] = ({c_type(target.dtype)}){result};",
    )
    return LayerText(function(f"layer_{index}", arguments, lines))


def pool(graph: Graph, op: Pool2D, index: int, needs: Needs) -> LayerText:
    """``layer_<index>(input, output)``; a window counts where it lies inside the input."""
    geometry = Geometry.of(graph, op)
    kind = c_type(graph.tensors[op.output].dtype)
    lowest, _ = graph.tensors[op.inputs[0]].dtype.range
    bounds: list[str] = []
    for first, end, corner, window, extent in (
        ("top", "bottom", geometry.top(), geometry.window[0], geometry.extent[0]),
        ("left", "right", geometry.left(), geometry.window[1], geometry.extent[1]),
    ):
        bounds.append(f"const int32_t {first}_full = {corner};")
        if geometry.padded:
            bounds += [
                f"const int32_t {end}_full = {first}_full + {window};",
                f"const int32_t {first} = {first}_full < 0 ? 0 : {first}_full;",
                f"const int32_t {end} = {end}_full > {extent} ? {extent} : {end}_full;",
            ]
    if geometry.padded:
        rows, columns = ("top", "bottom"), ("left", "right")
        y, x, count = "y", "x", "(bottom - top) * (right - left)"
    else:
        rows, columns = ("0", str(geometry.window[0])), ("0", str(geometry.window[1]))
        y, x = "(top_full + y)", "left_full + x"
        count = str(geometry.window[0] * geometry.window[1])
    value = f"input[{geometry.element(y, x)} + channel]"
    if isinstance(op, AveragePool2D):
        start, update = 0, f"total += {value};"
        mean = needs.call(semantics.average, 32, "total", count)
        result = clamped(mean, 0, graph.output_range(op), 32, needs)
    else:
        start, update = lowest, f"if ({value} > total) total = {value};"
        result = clamped("total", 0, graph.output_range(op), 32, needs)
    channels = block(
        f"for (int32_t channel = 0; channel < {geometry.channels}; channel++)",
        f"int32_t total = {start};",
        *block(
            f"for (int32_t y = {rows[0]}; y < {rows[1]}; y++)",
            *block(f"for (int32_t x = {columns[0]}; x < {columns[1]}; x++)", update),
        ),
        f"*output++ = ({kind}){result};",
    )
    lines = block(
        f"for (int32_t row = 0; row < {geometry.output[0]}; row++)",
        *block(
            f"for (int32_t column = 0; column < {geometry.output[1]}; column++)",
            *bounds,
            *channels,
        ),
    )
    arguments = [f"const {kind} *restrict input", f"{kind} *restrict output"]
    return LayerText(function(f"layer_{index}", arguments, lines))


def pad(graph: Graph, op: Pad, index: int, needs: Needs) -> LayerText:
    """``layer_<index>(input, output)``: all zero points, then the rows of the input."""
    source, target = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    _, height, width, channels = source.shape
    (_, (top, _), (left, _), _) = op.paddings
    row, pitch = width * channels, target.shape[2] * channels
    first = top * pitch + left * channels
    lines = [
        needs.helper("fill_bytes", "output", source.zero_point, target.size),
        *block(
            f"for (int32_t row = 0; row < {height}; row++)",
            needs.helper(
                "copy_bytes", f"output + {first} + row * {pitch}", f"input + row * {row}", row
            ),
        ),
    ]
    return _bytes(graph, op, index, lines)


def copy(graph: Graph, op: Operator, index: int, needs: Needs) -> LayerText:
    """``layer_<index>(input, output)`` of a RESHAPE that cannot share its input's place."""
    size = graph.tensors[op.output].size
    return _bytes(graph, op, index, [needs.helper("copy_bytes", "output", "input", size)])


def _bytes(graph: Graph, op: Operator, index: int, lines: list[str]) -> LayerText:
    kind = c_type(graph.tensors[op.output].dtype)
    arguments = [f"const {kind} *restrict input", f"{kind} *restrict output"]
    return LayerText(function(f"layer_{index}", arguments, lines))
