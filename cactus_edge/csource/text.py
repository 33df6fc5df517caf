"""Small pieces of C text that every layer is made of."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cactus_edge.csource.encoding import Encoding
from cactus_edge.csource.syntax import SemanticsFunction, Width, c_name
from cactus_edge.graph import DType, Int64Array

_COLUMNS = 20
_SIGNED = ((8, "int8_t"), (16, "int16_t"), (32, "int32_t"), (64, "int64_t"))
_UNSIGNED = ((8, "uint8_t"), (16, "uint16_t"), (32, "uint32_t"))


@dataclass
class Needs:
    """What the layers use and the file has to define: semantics functions and copy helpers.

    ``tables`` are the constant arrays by name, as their little-endian bytes: what the CRC covers.
    ``bounds``: whether layers need a function for both ends of a box; ``head`` is the operator that
    has one of its own, see ``verdict``.
    """

    functions: set[tuple[SemanticsFunction, Width]] = field(default_factory=set)
    helpers: set[str] = field(default_factory=set)
    tables: dict[str, bytes] = field(default_factory=dict)
    bounds: bool = False
    head: int = -1

    def call(self, function: SemanticsFunction, width: Width, *arguments: object) -> str:
        """The text of a call, noted as needed."""
        self.functions.add((function, width))
        return f"{c_name(function.__name__, width)}({', '.join(map(str, arguments))})"

    def helper(self, name: str, *arguments: object) -> str:
        """The same for one of ``HELPERS``."""
        self.helpers.add(name)
        return f"{name}({', '.join(map(str, arguments))});"

    def table(self, name: str, values: Int64Array, *, unsigned: bool = False) -> str:
        """A constant array of the narrowest type that holds the values, noted as a table."""
        numbers = [int(v) for v in values.ravel()] or [0]
        lowest, highest = min(numbers), max(numbers)
        bits, kind = next(
            (bits, text)
            for bits, text in (_UNSIGNED if unsigned else _SIGNED)
            if (unsigned and highest < 1 << bits)
            or (not unsigned and -(1 << (bits - 1)) <= lowest and highest < 1 << (bits - 1))
        )
        size = bits // 8
        self.tables[name] = b"".join(n.to_bytes(size, "little", signed=n < 0) for n in numbers)
        suffix = "LL" if kind == "int64_t" else ""
        rows = [
            ", ".join(f"{number}{suffix}" for number in numbers[start : start + _COLUMNS])
            for start in range(0, len(numbers), _COLUMNS)
        ]
        body = ",\n".join(f"  {row}" for row in rows)
        return f"static const {kind} {name}[{len(numbers)}] = {{\n{body}\n}};\n"

    def constant_or_table(
        self, name: str, values: Int64Array, index: str, *, unsigned: bool = False
    ) -> tuple[str, str]:
        """``(definition, operand)``: a literal where all are one, else a table and its read."""
        distinct = {int(v) for v in values}
        if len(distinct) == 1:
            value = distinct.pop()
            return "", f"INT64_C({value})" if value >= 1 << 31 else literal(value)
        return self.table(name, values, unsigned=unsigned), f"{name}[{index}]"


@dataclass(frozen=True)
class LayerText:
    """One operator: tables and functions, the scratch it needs, layout and bytes of its weights.

    ``bounds``: whether there is a ``bounds_<index>``, with ``bounds_scratch``; where there is none,
    ``layer_<index>`` on both ends of the input gives both ends of the output. ``encoding`` of a
    layer with weights.
    """

    text: str
    scratch: int = 0
    layout: str = ""
    weight_bytes: int = 0
    bounds: bool = False
    bounds_scratch: int = 0
    encoding: Encoding | None = None


HELPERS = {
    "copy_bytes": """\
static inline void copy_bytes(void *to, const void *from, int32_t count)
{
  uint8_t *target = (uint8_t *)to;
  const uint8_t *source = (const uint8_t *)from;
  for (int32_t n = 0; n < count; n++) target[n] = source[n];
}
""",
    "fill_bytes": """\
static inline void fill_bytes(void *to, int32_t value, int32_t count)
{
  uint8_t *target = (uint8_t *)to;
  for (int32_t n = 0; n < count; n++) target[n] = (uint8_t)value;
}
""",
    # The arena is an array of uint32_t and every offset a multiple of 4: words are well defined.
    "copy_words": """\
static inline void copy_words(void *to, const void *from, int32_t count)
{
  uint32_t *target = (uint32_t *)to;
  const uint32_t *source = (const uint32_t *)from;
  for (int32_t n = 0; n < count / 4; n++) target[n] = source[n];
}
""",
    "fill_words": """\
static inline void fill_words(void *to, int32_t value, int32_t count)
{
  uint32_t *target = (uint32_t *)to;
  for (int32_t n = 0; n < count / 4; n++) target[n] = 0x01010101u * (uint8_t)value;
}
""",
}


def c_type(dtype: DType) -> str:
    """The C type of a stored integer."""
    return "uint8_t" if dtype is DType.UINT8 else "int8_t"


def literal(value: int) -> str:
    """An integer as an operand."""
    return f"({value})" if value < 0 else str(value)


def plus(value: int) -> str:
    """`` + value`` or `` - value``, nothing for 0."""
    return f" {'-' if value < 0 else '+'} {abs(value)}" if value else ""


def times(operand: str, factor: int) -> str:
    """The operand times a factor; a sum is put in brackets."""
    if factor == 1:
        return operand
    is_sum = (" + " in operand or " - " in operand) and not operand.startswith("(")
    return f"({operand}) * {factor}" if is_sum else f"{operand} * {factor}"


def block(head: str, *lines: str) -> list[str]:
    """``head { lines }``, indented; without a head a scope of its own."""
    return [f"{head} {{" if head else "{", *(f"  {line}" for line in lines), "}"]


def join(lines: Iterable[str]) -> str:
    """Lines as a text that ends with a line feed."""
    return "".join(f"{line}\n" for line in lines)


def function(name: str, arguments: Sequence[str], lines: Iterable[str]) -> str:
    """A static function without result; that of a layer can be kept from being inlined."""
    kind = "LAYER" if name.startswith(("layer_", "bounds_", "sums_")) else "static"
    return (
        f"{kind} void {name}({', '.join(arguments)})\n{{\n{textwrap.indent(join(lines), '  ')}}}\n"
    )
