"""Windows over an activation, as numbers and as C expressions."""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.csource.text import plus, times
from cactus_edge.graph import Conv2D, Graph, Pool2D, window_geometry


@dataclass(frozen=True)
class Geometry:
    """Pairs are (height, width); ``before`` is the padding above and to the left."""

    extent: tuple[int, int]
    channels: int
    output: tuple[int, int]
    window: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @staticmethod
    def of(graph: Graph, op: Conv2D | Pool2D) -> Geometry:
        """The geometry of a convolution or a pool."""
        _, height, width, channels = graph.tensors[op.inputs[0]].shape
        is_convolution = isinstance(op, Conv2D)
        window = op.weights.values.shape[1:3] if is_convolution else op.window
        dilation = op.dilation if is_convolution else (1, 1)
        (rows, top, bottom), (columns, left, right) = (
            window_geometry(extent, window[a], op.stride[a], dilation[a], op.padding)
            for a, extent in enumerate((height, width))
        )
        return Geometry(
            (height, width),
            channels,
            (rows, columns),
            (window[0], window[1]),
            op.stride,
            dilation,
            (top, left),
            (bottom, right),
        )

    @property
    def padded(self) -> bool:
        """Whether some window reaches over the border."""
        return any((*self.before, *self.after))

    @property
    def reach(self) -> tuple[int, int]:
        """Extent of a window in the input, dilation included."""
        rows, columns = ((k - 1) * d + 1 for k, d in zip(self.window, self.dilation, strict=True))
        return rows, columns

    @property
    def contiguous(self) -> bool:
        """Whether each window is inside the input and one run of it."""
        columns, dilation = self.window[1], self.dilation[1]
        return not self.padded and self.window[0] == 1 and (columns == 1 or dilation == 1)

    @property
    def dense_rows(self) -> bool:
        """Whether each row of a window is one run of the input."""
        return self.window[1] == 1 or self.dilation[1] == 1

    def top(self, row: str = "row") -> str:
        """First input row of the window at output row ``row``."""
        return f"{times(row, self.stride[0])}{plus(-self.before[0])}"

    def left(self, column: str = "column") -> str:
        """First input column of the window at output column ``column``."""
        return f"{times(column, self.stride[1])}{plus(-self.before[1])}"

    def element(self, row: str, column: str) -> str:
        """Index of the first channel of an input pixel."""
        return f"({times(row, self.extent[1])} + {column}) * {self.channels}"

    def inside(self, row: str, column: str) -> str:
        """The condition that the window whose first pixel is (row, column) is inside the input."""
        rows, columns = (e - r for e, r in zip(self.extent, self.reach, strict=True))
        return f"{row} >= 0 && {row} <= {rows} && {column} >= 0 && {column} <= {columns}"
