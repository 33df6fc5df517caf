"""Files that another converter would hardly write: what runtimes refuse or compute otherwise.

Each is refused by name. The family of files that are read is in ``foreign``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cactus_edge.errors import CactusEdgeError
from cactus_edge.flatbuffer import read_tflite
from tests.foreign_file import CHANNELS, INPUT, File, pattern

HEIGHT = INPUT[1]


def _shuffled(file: File) -> int:
    source = file.input()
    order = file.list_of(1, 0, 2, 3)
    return file.moved("TRANSPOSE", [source, order], (HEIGHT, 1, 5, CHANNELS))


def _rank(file: File) -> int:
    source = file.input()
    return file.moved("TRANSPOSE", [source, file.list_of(0, 1, 2)], INPUT)


def _mean_of_rows(file: File) -> int:
    source = file.input()
    shape = (1, *INPUT[2:])
    axes = file.list_of(1)
    return file.op("MEAN", [source, axes], shape, file.scales[source], {"keep_dims": 0})


def _joined_scales(file: File) -> int:
    source = file.input()
    other = file.unary("QUANTIZE", source, (0.03, 4))
    options = {"axis": 3, "fused_activation_function": 0}
    shape = (*INPUT[:3], 2 * CHANNELS)
    return file.moved("CONCATENATION", [source, other], shape, **options)


def _logistic_scale(file: File) -> int:
    return file.unary("LOGISTIC", file.input(), (1 / 128, -128))


def _outside(file: File) -> int:
    rows = (0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1)
    return file.sliced(file.input(), INPUT, rows)


def _one_element_backwards(file: File) -> int:
    """TFLite's kernel copies nothing then: the output holds what was in memory."""
    rows = (0, 2, 0, 0), (1, 3, 5, CHANNELS), (1, -1, 1, 1)
    return file.dense(file.sliced(file.input(), (1, 5, CHANNELS), rows, shrink_axis_mask=2))


def _squeezed_elsewhere(file: File) -> int:
    pooled = file.pool("AVERAGE_POOL_2D", file.input(), (HEIGHT, 5), padding=1)
    dims = np.array([64513, 2], np.int32)
    return file.dense(file.moved("SQUEEZE", [pooled], (1, CHANNELS), squeeze_dims=dims))


def _squeezed_too_little(file: File) -> int:
    pooled = file.pool("AVERAGE_POOL_2D", file.input(), (HEIGHT, 5), padding=1)
    dims = np.array([1], np.int32)
    return file.dense(file.moved("SQUEEZE", [pooled], (1, CHANNELS), squeeze_dims=dims))


def _expanded_elsewhere(file: File) -> int:
    hidden = file.dense(file.input(), 12)
    axis = file.tensor((), None, "INT32", np.array(4, np.int32))
    return file.dense(file.moved("EXPAND_DIMS", [hidden, axis], (1, 1, 12)))


def _broadcast(file: File) -> int:
    source = file.input()
    column = file.pool("MAX_POOL_2D", source, (1, 5), padding=1)
    return file.combined("MUL", source, column)


def _negative_slope(file: File) -> int:
    return file.unary("LEAKY_RELU", file.input(), alpha=pattern(-0.5))


def _other_padding(file: File) -> int:
    source = file.input(scale=(0.03, 5))
    table = np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32)
    rows = file.tensor((4, 2), None, "INT32", table)
    value = file.tensor((1,), (0.03, 5), data=np.array([6], np.int8))
    return file.moved("PADV2", [source, rows, value], (1, HEIGHT + 2, 7, CHANNELS))


def _unsigned_inside(file: File) -> int:
    return file.conv(file.input(scale=(1 / 255, 3), kind="UINT8"))


def _kept_channels(file: File) -> int:
    layer = file.pool("MAX_POOL_2D", file.input(), (HEIGHT, 5), padding=1)
    return file.dense(layer, keep=True)


def _wide_shape(file: File) -> int:
    return file.op("SHAPE", [file.input()], (4,), None, {"out_type": 4}, "INT64")


def _shape_of_no_type(file: File) -> int:
    return file.op("SHAPE", [file.input()], (4,), None, {"out_type": -1}, "INT32")


REFUSED: list[tuple[Callable[[File], int], str]] = [
    (_shuffled, "the batch must be 1"),
    (_rank, "permutation .* of 4 dimensions"),
    (_mean_of_rows, "supported: height and width"),
    (_joined_scales, "one type, scale and zero point"),
    (_logistic_scale, "LOGISTIC's output has scale 1/256"),
    (_outside, "takes nothing of axis 0"),
    (_one_element_backwards, "takes one element with a stride of -1"),
    (_squeezed_elsewhere, r"SQUEEZE.*removes axes \[64513, 2\] of \[1, 1, 1, 6\]"),
    (_squeezed_too_little, r"its output is \[1, 6\], not \[1, 1, 6\]"),
    (_expanded_elsewhere, r"EXPAND_DIMS.*adds axes \[4\] to \[1, 12\]"),
    (_broadcast, "Operands have the output's shape"),
    (_negative_slope, "alpha that is not a positive"),
    (_other_padding, "a padding other than the zero point"),
    (_unsigned_inside, "uint8 beside int8 weights"),
    (_wide_shape, "SHAPE.*of other than int32 shapes"),
    (_shape_of_no_type, "SHAPE.*of other than int32 shapes"),
    (_kept_channels, "reshape behind the layer"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[b.__name__ for b, _ in REFUSED])
def test_what_runtimes_would_compute_otherwise_is_refused(
    build: Callable[[File], int], message: str
) -> None:
    file = File(np.random.default_rng(0))
    data = file.bytes(build(file))
    with pytest.raises(CactusEdgeError, match=message) as caught:
        read_tflite(data, "file.tflite")
    assert "file.tflite" in str(caught.value) and caught.value.exit_code == 3
