"""Padding and extents of convolutions and pools."""

from __future__ import annotations

from cactus_edge.lowering.stages import Pads
from cactus_edge.onnx_io.reading import Node


def windows(
    node: Node,
    extents: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    outer: Pads,
) -> tuple[Pads, tuple[int, int]]:
    """The padding of an operator, with what a Pad before it adds, and the extents it yields."""
    pads, sizes = list[tuple[int, int]](), list[int]()
    auto, given = node.get("auto_pad", "NOTSET"), node.get("pads", (0, 0, 0, 0))
    if min(*kernel, *stride, *dilation) < 1 or len(given) != 4:
        raise node.error(f"kernel {kernel}, strides {stride}, dilations {dilation}, pads {given}")
    for axis in (0, 1):
        reach, extent = (kernel[axis] - 1) * dilation[axis] + 1, extents[axis] + sum(outer[axis])
        before, after = given[axis], given[axis + 2]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max((-(-extent // stride[axis]) - 1) * stride[axis] + reach - extent, 0)
            small, large = total // 2, total - total // 2
            before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
        elif auto not in ("NOTSET", "VALID"):
            raise node.error(f"auto_pad '{auto}' is unknown")
        size = (extent + before + after - reach) // stride[axis] + 1
        if size < 1 or min(before, after) < 0:
            raise node.error(f"its window of {reach} does not fit into {extent}")
        pads.append((outer[axis][0] + before, outer[axis][1] + after))
        sizes.append(size)
    return (pads[0], pads[1]), (sizes[0], sizes[1])
