"""FULLY_CONNECTED and CONV_2D as C, and what every layer with weights shares.

Accumulators are ``int32_t``. The zero point of the input is folded into the bias, so that the
inner loop multiplies stored integers; padding then has to hold the zero point, not 0. Folding
changes no accumulator, and ``folded_bias`` proves that no partial sum leaves int32.

A convolution copies the windows of a few neighbouring output pixels into a patch, ``[pixels,
taps]``, and multiplies it with the weights, which are thereby read and decoded once for all of
them. Windows that are contiguous in the input (1x1 kernels) are used in place. A row whose width is
no multiple of the number of pixels ends with a tile that overlaps the one before it.
"""

from __future__ import annotations

import numpy as np

from cactus_edge.constraints import stored_range
from cactus_edge.csource import epilogue, inner
from cactus_edge.csource.encoding import Encoding, Layout, encode
from cactus_edge.csource.geometry import Geometry
from cactus_edge.csource.planner import aligned
from cactus_edge.csource.text import LayerText, Needs, block, c_type, function, literal, plus
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import (
    Conv2D,
    FullyConnected,
    Graph,
    Int8Array,
    Int64Array,
    Linear,
    Reshape,
)


def folded_bias(graph: Graph, op: Linear, matrix: Int64Array) -> Int64Array:
    """``bias - zero_point * sum(weights)``, int64 [out], of weights [out, taps].

    Raises:
        InvalidGraphError: a partial sum over stored integers could leave int32.
    """
    zero_point = graph.tensors[op.inputs[0]].zero_point
    bias = op.bias.astype(np.int64) - zero_point * matrix.sum(axis=1)
    largest = max(abs(end) for end in (*stored_range(graph, op.inputs[0]), zero_point))
    worst = np.abs(bias) + largest * np.abs(matrix).sum(axis=1)
    if int(worst.max()) >= 1 << 31:
        raise InvalidGraphError(
            f"{op.kind} '{op.name}', channel {int(worst.argmax())}: partial sums may reach "
            f"{int(worst.max())}, which int32 cannot hold; reduce the weights of this channel"
        )
    return bias


def types(graph: Graph, op: Linear) -> tuple[str, str]:
    """C types of the input's and the output's elements."""
    return c_type(graph.tensors[op.inputs[0]].dtype), c_type(graph.tensors[op.output].dtype)


def layer(
    graph: Graph,
    op: Linear,
    index: int,
    matrix: Int8Array,
    encoding: Encoding,
    lines: list[str],
    needs: Needs,
    bounds: list[str],
    *,
    helper: str = "",
    scratch: int = 0,
    bounds_scratch: int = 0,
) -> LayerText:
    """Tables, ``requantize_<index>``, a helper, ``layer_<index>`` made of ``lines``.

    ``bounds``, if any, are the lines of ``bounds_<index>``.
    """
    assert op.requantization is not None, "graph is not resolved"
    source, target = types(graph, op)
    sparse = encoding.layout.sparse
    weights = needs.table(f"weights_{index}", encoding.values.astype(np.int64))
    if encoding.layout is Layout.INT8:
        weights = weights.replace("static const", "TABLE", 1)
    parts = [
        weights,
        needs.table(f"counts_{index}", encoding.counts, unsigned=True) if sparse else "",
        needs.table(f"bias_{index}", folded_bias(graph, op, matrix.astype(np.int64))),
        epilogue.requantize(
            index,
            op.requantization,
            graph.tensors[op.output].zero_point,
            graph.output_range(op),
            needs,
        ),
        helper,
    ]
    both = ((f"layer_{index}", lines, scratch), (f"bounds_{index}", bounds, bounds_scratch))
    for name, body, patch in both:
        arguments = [f"const {source} *restrict input", f"{target} *restrict output"]
        if patch:
            arguments.append(f"{source} *restrict patch")
        if body:
            parts.append(function(name, arguments, body))
    return LayerText(
        "".join(parts),
        scratch,
        encoding.layout.value,
        encoding.size,
        bool(bounds),
        bounds_scratch,
        encoding,
    )


def by_pairs(graph: Graph, op: Linear, encoding: Encoding) -> bool:
    """Whether a layer can have the instructions of the DSP extension.

    Sums of nibbles are 16 times as large until the end, and have to fit as well.
    """
    if not encoding.layout.packed:
        return True
    weights = op.weights.values.reshape(op.channels, -1).astype(np.int64)
    largest = max(abs(end) for end in stored_range(graph, op.inputs[0]))
    return 16 * largest * int(np.abs(weights).sum(axis=1).max()) < 1 << 31


def halves(graph: Graph, op: Linear) -> tuple[int, int]:
    """How far the upper ends lie behind the lower ones: of the input's elements, the output's."""
    return aligned(graph.tensors[op.inputs[0]].size), aligned(graph.tensors[op.output].size)


def fully_connected(
    graph: Graph, op: FullyConnected, index: int, layout: Layout, needs: Needs
) -> LayerText:
    """A single pixel whose window is the whole input."""
    source, target = types(graph, op)
    matrix = op.weights.values
    encoding = encode(matrix, layout, inner.block_of(1), where=f"{op.kind} '{op.name}'")
    pairs = by_pairs(graph, op, encoding)
    kernel = inner.Kernel(
        index, encoding, source, target, matrix.shape[1], op.channels, pairs=pairs
    )
    places = [f"const {source} *const window = input;", f"{target} *const target = output;"]
    lines = [*places, *inner.loops(kernel)]
    bounds: list[str] = []
    if needs.bounds and index != needs.head:
        half, step = halves(graph, op)
        bounds = [*places, *inner.loops(kernel.of_ends(half, step))]
    return layer(graph, op, index, matrix, encoding, lines, needs, bounds)


def convolution(graph: Graph, op: Conv2D, index: int, layout: Layout, needs: Needs) -> LayerText:
    """Tiles of a few output pixels, row by row."""
    source, target = types(graph, op)
    geometry = Geometry.of(graph, op)
    matrix = op.weights.values.reshape(op.channels, -1)
    taps = matrix.shape[1]
    rows, columns = geometry.output
    block_width = inner.block_of(columns)
    encoding = encode(matrix, layout, block_width, where=f"{op.kind} '{op.name}'")
    pixels = inner.pixels_at_once(columns, encoding.layout)
    in_place = geometry.contiguous
    stride = geometry.stride[1] * geometry.channels if in_place else taps
    kernel = inner.Kernel(
        index,
        encoding,
        source,
        target,
        taps,
        op.channels,
        pixels,
        stride,
        op.channels,
        pairs=by_pairs(graph, op, encoding),
    )
    if in_place:
        first = geometry.element(geometry.top(), geometry.left())
        windows = [f"const {source} *const window = input + {first};"]
    else:
        left = geometry.left("(column + pixel)")
        gather = f"gather_{index}(input, {geometry.top()}, {left}, patch + pixel * {taps});"
        windows = block(f"for (int32_t pixel = 0; pixel < {pixels}; pixel++)", gather)
        windows.append(f"const {source} *const window = patch;")
    begin = "begin" if columns % pixels else "column"
    tile = [
        f"{target} *const target = output + (row * {columns} + column) * {op.channels};",
        *windows,
        *inner.loops(kernel),
    ]
    if columns % pixels:
        last = columns - pixels
        tile.insert(0, f"const int32_t column = begin < {last} ? begin : {last};")
    head = f"for (int32_t {begin} = 0; {begin} < {columns}; {begin} += {pixels})"
    lines = block(f"for (int32_t row = 0; row < {rows}; row++)", *block(head, *tile))
    bounds: list[str] = []
    if needs.bounds and index != needs.head:
        bounds = _bounds(graph, op, kernel, geometry)
    return layer(
        graph,
        op,
        index,
        matrix,
        encoding,
        lines,
        needs,
        bounds,
        helper="" if in_place else _gather(graph, op, index, geometry, needs),
        scratch=0 if in_place else pixels * taps,
        bounds_scratch=0 if in_place else 2 * taps,
    )


def _bounds(graph: Graph, op: Conv2D, kernel: inner.Kernel, geometry: Geometry) -> list[str]:
    """Pixel by pixel, the windows of both ends at once."""
    half, step = halves(graph, op)
    rows, columns = geometry.output
    taps, source, target = kernel.taps, kernel.source_type, kernel.target_type
    top, left = geometry.top(), geometry.left()
    if geometry.contiguous:
        windows = [f"const {source} *const window = input + {geometry.element(top, left)};"]
    else:
        windows = [
            f"gather_{kernel.index}(input{plus(end * half)}, {top}, {left}, patch"
            f"{plus(end * taps)});"
            for end in (0, 1)
        ]
        windows.append(f"const {source} *const window = patch;")
    distance = half if geometry.contiguous else taps
    pixel = [
        f"{target} *const target = output + (row * {columns} + column) * {op.channels};",
        *windows,
        *inner.loops(kernel.of_ends(distance, step)),
    ]
    return block(
        f"for (int32_t row = 0; row < {rows}; row++)",
        *block(f"for (int32_t column = 0; column < {columns}; column++)", *pixel),
    )


def reads_input(graph: Graph, op: Linear) -> bool:
    """Whether an operator reads the caller's input, perhaps under another shape."""
    renamed = {r.output: r.inputs[0] for r in graph.core if isinstance(r, Reshape)}
    tensor = op.inputs[0]
    while tensor in renamed:
        tensor = renamed[tensor]
    return tensor == graph.core_input


def _gather(graph: Graph, op: Conv2D, index: int, geometry: Geometry, needs: Needs) -> str:
    """``gather_<index>``: one window, padded with the zero point, as [taps]."""
    tensor = graph.tensors[op.inputs[0]]
    channels, (height, width) = geometry.channels, geometry.extent
    run = geometry.window[1] * channels
    # The caller's input may lie anywhere; the arena and everything in it is aligned to words.
    unit = "bytes" if reads_input(graph, op) or channels % 4 else "words"
    zero_point = literal(tensor.zero_point)

    def fill(count: int) -> str:
        return needs.helper(f"fill_{unit}", "patch", zero_point, count)

    def copy(column: str, count: int) -> str:
        return needs.helper(
            f"copy_{unit}", "patch", f"input + {geometry.element('y', column)}", count
        )

    by_pixel = [f"const int32_t x = left + column * {geometry.dilation[1]};"]
    if geometry.padded:
        by_pixel += [
            f"if (y >= 0 && y < {height} && x >= 0 && x < {width}) {copy('x', channels)}",
            f"else {fill(channels)}",
        ]
    else:
        by_pixel.append(copy("x", channels))
    head = f"for (int32_t column = 0; column < {geometry.window[1]}; column++)"
    pixelwise = block(head, *by_pixel, f"patch += {channels};")
    if not geometry.dense_rows:
        row = pixelwise
    elif not geometry.padded:
        row = [copy("left", run), f"patch += {run};"]
    else:
        row = [
            *block(f"if (y < 0 || y >= {height})", fill(run), f"patch += {run};"),
            *block(
                f"else if (left >= 0 && left <= {width - geometry.reach[1]})",
                copy("left", run),
                f"patch += {run};",
            ),
            *block("else", *pixelwise),
        ]
    lines = block(
        f"for (int32_t row = 0; row < {geometry.window[0]}; row++)",
        f"const int32_t y = top + row * {geometry.dilation[0]};",
        *row,
    )
    kind = c_type(tensor.dtype)
    arguments = [
        f"const {kind} *restrict input",
        "int32_t top",
        "int32_t left",
        f"{kind} *restrict patch",
    ]
    return function(f"gather_{index}", arguments, lines)
