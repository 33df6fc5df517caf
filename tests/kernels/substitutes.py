"""Every tier on every CPU: instructions that it lacks are replaced by plain code.

What is compiled is the tier's own code, with its tables, its order of loops and its addresses; only
the named instructions are others. A process that calls ``install`` has to keep compiled code in a
folder of its own (``NUMBA_CACHE_DIR``), for keys do not tell the two kinds apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from cactus_edge.kernels.simd import tiers
from cactus_edge.kernels.simd.emit import I8, I32, I64, Emitter, Value
from cactus_edge.kernels.simd.tiers import Tier

REPLACED = (Tier.AVX512, Tier.AVXVNNI, Tier.DOTPROD, Tier.NEON)
"""Tiers of which some instruction is replaced; the others run as they are."""

Body = Callable[[Any, Sequence[Value], Any], Value]


def install() -> None:
    """Replace instructions in what this process compiles, and offer it all tiers."""
    tiers._NEEDS.update(dict.fromkeys(REPLACED, (frozenset(),)))
    Emitter.call = _call  # type: ignore[method-assign]
    Emitter.expand = _expand  # type: ignore[method-assign]


def _call(emitter: Emitter, name: str, result: ir.Type, arguments: Sequence[Value]) -> Value:
    """``Emitter.call``, with a function of our own where there is one."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    for pattern, body in _BODIES:
        if re.fullmatch(pattern, name):
            return emitter.builder.call(_function(emitter, name, kind, body), arguments)
    function = cgutils.get_or_insert_function(emitter.builder.module, kind, name)
    return emitter.builder.call(function, arguments)


def _expand(emitter: Emitter, address: Value, mask: Value) -> Value:
    """``Emitter.expand``."""
    kind = ir.FunctionType(emitter.bytes, [I64, I64])
    function = _function(emitter, "expand", kind, _expanded)
    return emitter.builder.call(function, [address, mask])


def _function(emitter: Emitter, name: str, kind: ir.FunctionType, body: Body) -> Any:
    """A function of the module, made at its first use."""
    module: Any = emitter.builder.module
    function: Any = cgutils.get_or_insert_function(module, kind, f"substitute.{name}")
    if not function.blocks:
        function.linkage = "linkonce_odr"
        builder: Any = ir.IRBuilder(function.append_basic_block())
        builder.ret(body(builder, function.args, kind.return_type))
    return function


def _dot(signed: bool, swapped: bool = False) -> Body:
    """Sums of four products each: VPDPBUSD (unsigned by signed), SDOT (signed by signed)."""

    def body(b: Any, arguments: Sequence[Value], sums: Any) -> Value:
        total, activations, weights = arguments
        if swapped:
            activations, weights = weights, activations
        count = 4 * sums.count
        narrow, wide = ir.VectorType(I8, count), ir.VectorType(I32, count)
        activations, weights = (b.bitcast(x, narrow) for x in (activations, weights))
        extend = b.sext if signed else b.zext
        products = b.mul(extend(activations, wide), b.sext(weights, wide))
        return _grouped(b, products, 4, total)

    return body


def _pairs(b: Any, arguments: Sequence[Value], sums: Any) -> Value:
    """SADDLP: neighbours added, as int32."""
    (values,) = arguments
    wide = b.sext(values, ir.VectorType(I32, values.type.count))
    return _grouped(b, wide, 2, ir.Constant(sums, [0] * sums.count))


def _grouped(b: Any, values: Value, group: int, total: Value) -> Value:
    """``total`` plus the sums of each ``group`` neighbours."""
    nothing = ir.Constant(values.type, ir.Undefined)
    for first in range(group):
        numbers = list(range(first, values.type.count, group))
        chosen = ir.Constant(ir.VectorType(I32, len(numbers)), numbers)
        total = b.add(total, b.shuffle_vector(values, nothing, chosen))
    return total


def _chosen(b: Any, arguments: Sequence[Value], kind: Any) -> Value:
    """VPERMB and VPERMI2B: each index chooses among the bytes of one vector or of two."""
    first, indices, *second = arguments
    sources = (first, *second)
    table = cgutils.alloca_once(b, ir.ArrayType(kind, len(sources)))
    for number, source in enumerate(sources):
        b.store(source, b.gep(table, [I32(0), I32(number)]))
    start = b.bitcast(table, I8.as_pointer())
    last = kind.count * len(sources) - 1
    found = ir.Constant(kind, ir.Undefined)
    for lane in range(kind.count):
        index = b.and_(b.zext(b.extract_element(indices, I32(lane)), I64), I64(last))
        found = b.insert_element(found, b.load(b.gep(start, [index])), I32(lane))
    return found


def _looked_up(b: Any, arguments: Sequence[Value], kind: Any) -> Value:
    """TBL: bytes of a table of 16; 0 for an index beyond."""
    values, indices = arguments
    table = cgutils.alloca_once(b, values.type)
    b.store(values, table)
    start = b.bitcast(table, I8.as_pointer())
    found = ir.Constant(kind, ir.Undefined)
    for lane in range(kind.count):
        index = b.zext(b.extract_element(indices, I32(lane)), I64)
        value = b.load(b.gep(start, [b.and_(index, I64(15))]))
        value = b.select(b.icmp_unsigned("<", index, I64(16)), value, I8(0))
        found = b.insert_element(found, value, I32(lane))
    return found


def _expanded(b: Any, arguments: Sequence[Value], kind: Any) -> Value:
    """VPEXPANDB: consecutive bytes to where the mask has a bit, zeros elsewhere."""
    address, mask = arguments
    found = ir.Constant(kind, [0] * kind.count)
    for lane in range(kind.count):
        bit = b.and_(b.lshr(mask, I64(lane)), I64(1))
        value = b.load(b.inttoptr(address, I8.as_pointer()))
        value = b.select(b.trunc(bit, ir.IntType(1)), value, I8(0))
        found = b.insert_element(found, value, I32(lane))
        address = b.add(address, bit)
    return found


_BODIES: tuple[tuple[str, Body], ...] = (
    (r"llvm\.x86\.avx512\.vpdpbusd\.\d+", _dot(signed=False)),
    (r"llvm\.x86\.avx512\.(permvar|vpermi2var)\.qi\.512", _chosen),
    (r"llvm\.aarch64\.neon\.sdot\..*", _dot(signed=True, swapped=True)),
    (r"llvm\.aarch64\.neon\.saddlp\..*", _pairs),
    (r"llvm\.aarch64\.neon\.tbl1\..*", _looked_up),
)
