"""From accumulator to stored integer: the C function that ends every channel of a layer.

Only the semantics functions that the layer uses are called. Channels whose rounding differs (the
vector part and the tail of a depthwise layer, say) become runs of channels inside one function.
"""

from __future__ import annotations

import numpy as np

from cactus_edge import semantics
from cactus_edge.csource.syntax import Width
from cactus_edge.csource.text import Needs, block, join, literal, plus
from cactus_edge.graph import Requantization
from cactus_edge.semantics import Rounding

# The largest shift for which `1 << shift` and the mask below it are int32.
_NARROW_SHIFT = 30
_DOUBLE = (Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP)


def requantize(
    index: int,
    parameters: Requantization,
    zero_point: int,
    limits: tuple[int, int],
    needs: Needs,
) -> str:
    """Tables and ``static int32_t requantize_<index>(int32_t sum, int32_t channel)``."""
    multiplier, m = needs.constant_or_table(f"multiplier_{index}", parameters.multiplier, "channel")
    shift, s = needs.constant_or_table(f"shift_{index}", parameters.shift, "channel", unsigned=True)
    lines: list[str] = []
    runs = _runs(parameters)
    for start, end in runs:
        rounding = Rounding(int(parameters.rounding[start]))
        narrow = rounding in _DOUBLE and int(parameters.shift[start:end].max()) <= _NARROW_SHIFT
        width: Width = 32 if narrow else 64
        rounded = needs.call(semantics.REQUANTIZE[rounding], width, "sum", m, s)
        result = clamped(rounded, zero_point, limits, width, needs)
        if (start, end) == runs[-1]:
            lines.append(f"return {result};")
        else:
            lines += block(f"if (channel < {end})", f"return {result};")
    if "channel" not in "".join(lines):
        lines.insert(0, "(void)channel;")
    head = f"static int32_t requantize_{index}(int32_t sum, int32_t channel)\n"
    return f"{multiplier}{shift}{head}{{\n{join(f'  {line}' for line in lines)}}}\n"


def clamped(
    expression: str, zero_point: int, limits: tuple[int, int], width: Width, needs: Needs
) -> str:
    """``semantics.clamp`` of an expression plus the zero point, as int32_t."""
    shifted = f"{expression}{plus(zero_point)}"
    bounds = (literal(limit) for limit in limits)
    call = needs.call(semantics.clamp, width, shifted, *bounds)
    return call if width == 32 else f"(int32_t){call}"


def _runs(parameters: Requantization) -> list[tuple[int, int]]:
    """Runs ``(start, end)`` of channels of one rounding."""
    changes = np.flatnonzero(np.diff(parameters.rounding)) + 1
    bounds = [0, *changes.tolist(), parameters.rounding.size]
    return list(zip(bounds[:-1], bounds[1:], strict=True))
