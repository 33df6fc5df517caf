"""Shapes that a file computes although they are known: SHAPE, STRIDED_SLICE and PACK of int32.

Converters write them before a RESHAPE where the batch was free. Every extent is given here, so they
are computed once, as runtimes do for each input, and their results stand for constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.flatbuffer import schema
from cactus_edge.flatbuffer.node import Constant
from cactus_edge.flatbuffer.wire import Table

FOLDED = ("SHAPE", "STRIDED_SLICE", "PACK")
RESHAPES = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
_Values = npt.NDArray[np.int32]


def folded(
    kind: str,
    options: Table | None,
    shapes: Sequence[tuple[int, ...]],
    constants: Sequence[Constant | None],
) -> _Values | None:
    """The result of an operator on shapes; None where it is not one, or not of these forms.

    Args:
        kind: one of ``FOLDED``.
        options: the operator's table.
        shapes: of all its inputs.
        constants: the same inputs, None where one holds no constant.
    """
    if kind == "SHAPE":
        if options is None or schema.TYPE_NAMES.get(options.integer("out_type")) != "INT32":
            return None
        return np.array(shapes[0], np.int32) if len(shapes) == 1 else None
    values: list[_Values] = []
    for constant in constants:
        if constant is None or constant.type != "INT32":
            return None
        values.append(constant.values())
    if kind == "PACK":
        if options is None or options.integer("axis") or any(v.shape for v in values):
            return None
        return np.array([int(v) for v in values], np.int32)
    return _sliced(options, values)


def _sliced(options: Table | None, values: Sequence[_Values]) -> _Values | None:
    """A part of a list, or one of its elements."""
    if options is None or len(values) != 4 or any(v.ndim != 1 for v in values):
        return None
    given, ends = values[0], values[1:]
    if any(end.size != 1 for end in ends) or not ends[2][0]:
        return None
    if any(options.integer(n) for n in ("ellipsis_mask", "new_axis_mask", "offset")):
        return None
    begin, end, stride = (int(v[0]) for v in ends)
    if options.integer("shrink_axis_mask") & 1:
        inside = -given.size <= begin < given.size and not options.integer("begin_mask")
        return np.array(given[begin], np.int32) if inside else None
    opened, closed = (options.integer(name) & 1 for name in ("begin_mask", "end_mask"))
    return given[slice(None if opened else begin, None if closed else end, stride)]


def read_ones(
    computing: Sequence[int],
    operators: Sequence[Table],
    kinds: Sequence[schema.Kind | UnsupportedModelError],
    ends: Sequence[int],
) -> list[int]:
    """The operators without reshapes of which at most the shape was read, which is known now.

    They have no effect: runtimes give a reshape's output the memory of its input.
    """
    left = list(computing)
    while True:
        read = {i for index in left for i in operators[index].integers("inputs")} | set(ends)
        kept = [
            index
            for index in left
            if not _reshapes(operators[index], kinds)
            or read & set(operators[index].integers("outputs"))
        ]
        if len(kept) == len(left):
            return left
        left = kept


def _reshapes(operator: Table, kinds: Sequence[schema.Kind | UnsupportedModelError]) -> bool:
    code = operator.integer("opcode_index")
    kind = kinds[code] if code < len(kinds) else None
    return isinstance(kind, schema.Kind) and kind.name in RESHAPES
