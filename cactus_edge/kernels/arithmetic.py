"""The functions of ``semantics``, compiled, and the loops that apply them to accumulators.

There is no arithmetic here: each loop calls one function of ``semantics`` and its clamp. A loop is
made for each rounding, so that the choice is taken once for a run of elements and LLVM vectorises
what is inside.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cactus_edge import semantics
from cactus_edge.kernels.jit import kernel, register
from cactus_edge.kernels.steps import Step
from cactus_edge.semantics import AddRounding, Rounding

ByteArray = npt.NDArray[np.uint8]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

register(semantics)

_HALF_AWAY = int(Rounding.DOUBLE_HALF_AWAY)
_HALF_UP = int(Rounding.DOUBLE_HALF_UP)
_SINGLE = int(Rounding.SINGLE)
_FLOAT32 = int(Rounding.FLOAT32)
_ADD_HALF_AWAY = int(AddRounding.DOUBLE_HALF_AWAY)
_ADD_SINGLE = int(AddRounding.SINGLE)

_clamp = semantics.clamp

_Loop = Callable[[Int32Array, Int64Array, Int64Array, int, int, int, ByteArray], None]
_AddLoop = Callable[[Step, ByteArray, ByteArray, Int64Array, ByteArray], None]


def _requantize_loop(requantize: Callable[[int, int, int], int]) -> _Loop:
    """A loop over channels, each with a factor of its own."""

    @kernel
    def loop(
        accumulators: Int32Array,
        multipliers: Int64Array,
        shifts: Int64Array,
        zero_point: int,
        lower: int,
        upper: int,
        stored: ByteArray,
    ) -> None:
        for i in range(len(stored)):
            rounded = requantize(np.int64(accumulators[i]), multipliers[i], shifts[i])  # pyright: ignore
            stored[i] = np.uint8(_clamp(rounded + zero_point, lower, upper))

    return loop


_requantize_half_away = _requantize_loop(semantics.requantize_double_half_away)
_requantize_half_up = _requantize_loop(semantics.requantize_double_half_up)
_requantize_single = _requantize_loop(semantics.requantize_single)
_requantize_float32 = _requantize_loop(semantics.requantize_float32)
_requantize_float64 = _requantize_loop(semantics.requantize_float64)


@kernel
def requantize_channels(
    step: Step, integers: Int64Array, accumulators: Int32Array, stored: ByteArray, first: int
) -> None:
    """Bytes [n] from the accumulators [n] of n channels of one pixel, the first of them given."""
    channels = step.channels
    last = first + len(stored)
    multipliers = integers[step.multipliers : step.multipliers + channels]
    shifts = integers[step.multipliers + channels : step.multipliers + 2 * channels]
    zero, low, high = step.target_zero, step.lower, step.upper
    start = 0
    for i in range(step.round_count):
        end = integers[step.rounding + 2 * i]
        code = integers[step.rounding + 2 * i + 1]
        begin, stop = max(start, first), min(end, last)
        start = end
        if begin >= stop:
            continue
        m, s = multipliers[begin:stop], shifts[begin:stop]
        a, o = accumulators[begin - first : stop - first], stored[begin - first : stop - first]
        if code == _HALF_AWAY:
            _requantize_half_away(a, m, s, zero, low, high, o)
        elif code == _HALF_UP:
            _requantize_half_up(a, m, s, zero, low, high, o)
        elif code == _SINGLE:
            _requantize_single(a, m, s, zero, low, high, o)
        elif code == _FLOAT32:
            _requantize_float32(a, m, s, zero, low, high, o)
        else:
            _requantize_float64(a, m, s, zero, low, high, o)


def _add_loop(function: Callable[..., int]) -> _AddLoop:
    @kernel
    def loop(step: Step, a: ByteArray, b: ByteArray, six: Int64Array, stored: ByteArray) -> None:
        m_a, s_a, m_b, s_b, m_o, s_o = six[0], six[1], six[2], six[3], six[4], six[5]
        zero_a, zero_b, zero = step.source_zero, step.other_zero, step.target_zero
        low, high = step.lower, step.upper
        for i in range(len(stored)):
            x, y = np.int64(a[i]) - zero_a, np.int64(b[i]) - zero_b
            rounded = function(x, y, m_a, s_a, m_b, s_b, m_o, s_o)
            stored[i] = np.uint8(_clamp(rounded + zero, low, high))

    return loop


_add_half_away = _add_loop(semantics.add_double_half_away)
_add_single = _add_loop(semantics.add_single)
_add_fixed_point = _add_loop(semantics.add_fixed_point)


@kernel
def add_bytes(step: Step, a: ByteArray, b: ByteArray, six: Int64Array, stored: ByteArray) -> None:
    """ADD of two runs of bytes."""
    if step.round_count == _ADD_HALF_AWAY:
        _add_half_away(step, a, b, six, stored)
    elif step.round_count == _ADD_SINGLE:
        _add_single(step, a, b, six, stored)
    else:
        _add_fixed_point(step, a, b, six, stored)
