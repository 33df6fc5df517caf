"""Where each activation lies in a thread's memory.

Every tensor has a buffer of its own for a block of images. One that a convolution pads (SAME) has
a border of its zero point around each image; kernels write only inside, so the border is filled
once, and no kernel tests whether a tap is inside the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cactus_edge.graph import Conv2D, DType, Graph, Int64Array, Pad, Tensor, window_geometry

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Placement:
    """A tensor's bytes: ``rows`` of ``row_bytes`` for each image, the first of them at ``origin``.

    ``image`` and ``row`` are distances in bytes; [``begin``, ``end``) is the whole buffer. The
    stored integer x of the tensor is the byte ``x + offset``. Where the channels of a pixel do not
    lie in order, ``positions`` [channels] says where each lies; and where the tensor shares the
    memory of the one that it reshapes, ``elements`` [elements] says it for each element.
    """

    begin: int
    end: int
    origin: int
    image: int
    row: int
    rows: int
    row_bytes: int
    offset: int
    zero: int
    positions: Int64Array | None = None
    elements: Int64Array | None = None

    def offsets(self) -> Int64Array:
        """Distance in bytes of each element from ``origin``, int64 [elements]."""
        if self.elements is not None:
            return self.elements
        within = np.arange(self.row_bytes, dtype=np.int64)
        if self.positions is not None:
            pixels = within.reshape(-1, len(self.positions))
            within = (pixels[:, :1] + self.positions).reshape(-1)
        rows = np.arange(self.rows, dtype=np.int64)[:, None] * self.row
        return (rows + within).reshape(-1)

    def ordered(self, order: Int64Array) -> Placement:
        """The same with channel ``order[p]`` at position p of each pixel."""
        return replace(self, positions=np.argsort(order))

    def reshaped(self) -> Placement:
        """The same bytes for a tensor of another shape."""
        return replace(self, elements=self.offsets())


def byte_offset(tensor: Tensor) -> int:
    """What is added to a stored integer to make a byte: 128 for int8."""
    return 128 if tensor.dtype is DType.INT8 else 0


def core_tensors(graph: Graph) -> list[int]:
    """The integer activations, input first."""
    return [graph.core_input, *(op.output for op in graph.core)]


def image_bytes(graph: Graph) -> int:
    """Memory of all activations of one image."""
    return sum(_buffer(graph, index)[0] for index in core_tensors(graph))


def place(graph: Graph, block: int) -> tuple[dict[int, Placement], int]:
    """Placement of every integer activation for a block of images, and the bytes in all."""
    placements: dict[int, Placement] = {}
    begin = 0
    for index in core_tensors(graph):
        tensor = graph.tensors[index]
        image, origin, row, rows, row_bytes = _buffer(graph, index)
        offset = byte_offset(tensor)
        placements[index] = Placement(
            begin=begin,
            end=begin + image * block,
            origin=begin + origin,
            image=image,
            row=row,
            rows=rows,
            row_bytes=row_bytes,
            offset=offset,
            zero=tensor.zero_point + offset,
        )
        begin += -(-image * block // _ALIGNMENT) * _ALIGNMENT
    for op in reversed(graph.core):
        if isinstance(op, Pad) and lies_inside(graph, op):
            source, target = placements[op.inputs[0]], placements[op.output]
            channels = graph.tensors[op.output].shape[3]
            (top, _), (left, _) = op.paddings[1], op.paddings[2]
            placements[op.inputs[0]] = replace(
                source,
                begin=target.begin,
                end=target.end,
                origin=target.origin + top * target.row + left * channels,
                image=target.image,
                row=target.row,
            )
    return placements, begin


def lies_inside(graph: Graph, op: Pad) -> bool:
    """Whether a PAD's input is written to its place in the output, so that nothing is copied.

    The padding around it is filled once, like the borders.
    """
    source = op.inputs[0]
    readers = [other for other in graph.core if source in other.inputs]
    channels = graph.tensors[source].shape[3] == graph.tensors[op.output].shape[3]
    return channels and len(readers) == 1


def _buffer(graph: Graph, index: int) -> tuple[int, int, int, int, int]:
    """(bytes of an image, origin in it, distance of rows, rows, bytes of a row)."""
    tensor = graph.tensors[index]
    if len(tensor.shape) != 4:
        return tensor.size, 0, tensor.size, 1, tensor.size
    _, height, width, channels = tensor.shape
    top, bottom, left, right = _borders(graph, index)
    row = (left + width + right) * channels
    image = (top + height + bottom) * row
    return image, top * row + left * channels, row, height, width * channels


def _borders(graph: Graph, index: int) -> tuple[int, int, int, int]:
    """Pixels above, below, left and right that any convolution reads outside the tensor."""
    borders = np.zeros(4, np.int64)
    for op in graph.core:
        if isinstance(op, Conv2D) and op.inputs[0] == index:
            borders = np.maximum(borders, [p for axis in (0, 1) for p in padding(graph, op, axis)])
    top, bottom, left, right = borders.tolist()
    return top, bottom, left, right


def padding(graph: Graph, op: Conv2D, axis: int) -> tuple[int, int]:
    """Pixels before and after the input that a convolution reads; axis 0 is the height."""
    extent = graph.tensors[op.inputs[0]].shape[1 + axis]
    kernel = op.weights.values.shape[1 + axis]
    _, before, after = window_geometry(
        extent, kernel, op.stride[axis], op.dilation[axis], op.padding
    )
    return before, after
