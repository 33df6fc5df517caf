"""A graph as a C library: freestanding C99, no library, no heap, no float.

Every operator becomes one static function with its constants in it; ``<prefix>_run`` calls them in
order. Activations live in one static arena, planned by lifetime; a RESHAPE shares its input's
place; the first layer reads the caller's input and the last one writes the caller's output.
Compiled with ``-D<PREFIX>_TRACE``, the caller defines ``<prefix>_trace`` and gets every activation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cactus_edge import constraints, files, profiles
from cactus_edge.csource import (
    console,
    elementwise,
    integrity,
    library,
    linear,
    pairs,
    tabled,
    vectors,
    verdict,
)
from cactus_edge.csource.depthwise import depthwise
from cactus_edge.csource.encoding import Layout
from cactus_edge.csource.header import Facts, header, run_signature
from cactus_edge.csource.memory import Memory, plan_bounds, plan_run
from cactus_edge.csource.syntax import translate_all
from cactus_edge.csource.text import HELPERS, LayerText, Needs, c_type, join
from cactus_edge.errors import InvalidGraphError, UsageError
from cactus_edge.graph import (
    Add,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Operator,
    Pad,
    Pool2D,
    Reshape,
)
from cactus_edge.operators import Lookup, Move, Pair

# Indices and the sums of average pools are int32_t, with a factor of 256 to spare.
_MAX_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class CLayer:
    """What became of one operator; ``layout`` is empty and ``weight_bytes`` 0 without weights.

    ``table_bytes`` are all its constants in flash, weights included; ``live_bytes`` what it needs
    of the arena: its input and output, what later layers still read, and its patch.
    """

    index: int
    name: str
    kind: str
    layout: str
    weight_bytes: int
    table_bytes: int
    output: int
    output_bytes: int
    live_bytes: int


@dataclass(frozen=True)
class CSource:
    """The C of one model, and the sizes that a caller has to know.

    ``files`` are header and source; ``surroundings`` make a library folder of them. ``tables`` are
    the constants by name, as the bytes in flash that ``crc32`` is about. ``arena_lower_bound`` is
    what is alive at once at the busiest layer.
    """

    files: Mapping[str, str]
    surroundings: Mapping[str, str]
    prefix: str
    entry: str
    arena_bytes: int
    arena_lower_bound: int
    input_bytes: int
    output_bytes: int
    layers: tuple[CLayer, ...]
    tables: Mapping[str, bytes]
    crc32: int
    certified: bool

    @property
    def table_bytes(self) -> int:
        """Weights and tables in flash."""
        return sum(map(len, self.tables.values()))

    def write(self, folder: Path, *, force: bool = False) -> None:
        """The library in ``folder``.

        Raises:
            OutputError: a file of it exists and ``force`` is not given, or cannot be written.
        """
        contents = {**self.files, **self.surroundings}
        for name in contents:
            files.refuse_existing(folder / name, force)
        for name, text in contents.items():
            files.write(folder / name, text.encode(), force=force)


def generate(
    graph: Graph,
    profile: str = profiles.DEFAULT,
    *,
    layout: Layout = Layout.AUTO,
    prefix: str = "cactus_edge",
    certified: bool = False,
    serial: bool = False,
) -> CSource:
    """The C of ``graph``; a function of its arguments alone, byte by byte.

    Args:
        graph: resolved, or else resolved here under ``profile``.
        profile: name of a rounding profile, ignored by operators that are resolved already.
        layout: of all weights; AUTO takes the smallest for each layer.
        prefix: of everything with external linkage and, in capitals, of every macro.
        certified: add ``<prefix>_predict_certified``.
        serial: add a console for a serial line, see ``console``.

    Raises:
        InvalidGraphError: the graph breaks a constraint, a size or sum does not fit int32,
            logits are wider than int8, or SUB or MUL has two activations.
        UnsupportedModelError: ``certified``, and an operator is not monotone.
        UsageError: no such profile, a prefix that C does not allow, or a layout that cannot hold
            the weights.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", prefix):
        raise UsageError(f"prefix '{prefix}' is not a C identifier; use letters, digits and _")
    if prefix.lower() == "main":
        raise UsageError(f"prefix '{prefix}': main.c is the example's; choose another one")
    resolved = profiles.resolve(graph, profile)
    constraints.validate(resolved)
    _check_sizes(resolved)
    if certified:
        verdict.require_monotone(resolved)
    head = verdict.Head.of(resolved) if certified else None
    needs = Needs(bounds=certified, head=-1 if head is None else head.operator)
    texts: list[LayerText] = []
    table_bytes: list[int] = []
    for index, op in enumerate(resolved.core):
        before = len(needs.tables)
        texts.append(_layer(resolved, op, index, layout, needs))
        table_bytes.append(sum(map(len, list(needs.tables.values())[before:])))
    memory = plan_run(resolved, {index: text.scratch for index, text in enumerate(texts)})
    plans = [memory]
    proof, entry = "", ""
    if certified:
        plans.append(
            plan_bounds(resolved, verdict.scratch(head, texts), verdict.sizes(resolved, head))
        )
        if head is not None:
            encoding = texts[head.operator].encoding
            assert encoding is not None, "the head has weights"
            proof = verdict.functions(resolved, head, encoding, needs)
        entry = verdict.entry(resolved, prefix, head, texts, plans[1])
    layers = tuple(
        CLayer(
            index,
            op.name,
            op.kind,
            text.layout,
            text.weight_bytes,
            table_bytes[index],
            op.output,
            resolved.tensors[op.output].size,
            max(plan.live[index] for plan in plans),
        )
        for index, (op, text) in enumerate(zip(resolved.core, texts, strict=True))
    )
    arena_bytes = max(plan.arena_bytes for plan in plans)
    crc = integrity.crc32(needs.tables)
    facts = Facts(
        arena_bytes,
        max(plan.lower_bound for plan in plans),
        sum(map(len, needs.tables.values())),
        crc,
        [_row(layer) for layer in layers],
        certified,
    )
    body = [
        *_layers(resolved, texts),
        proof,
        integrity.functions(prefix, needs.tables),
        f"static uint32_t arena[{arena_bytes // 4}];\n" if arena_bytes else "",
        _run(resolved, prefix, texts, memory),
        entry,
    ]
    return CSource(
        MappingProxyType(
            {
                f"{prefix}.h": header(resolved, prefix, facts),
                f"{prefix}.c": "\n".join(
                    filter(None, [*_start(resolved, prefix, profile, needs), *body])
                ),
            }
        ),
        MappingProxyType(
            {
                **library.surroundings(
                    resolved, prefix, profile, certified=certified, serial=serial
                ),
                **(console.files(resolved, prefix, profile) if serial else {}),
            }
        ),
        prefix,
        f"{prefix}_run",
        arena_bytes,
        facts.arena_lower_bound,
        resolved.tensors[resolved.core_input].size,
        resolved.tensors[resolved.logits].size,
        layers,
        MappingProxyType(dict(needs.tables)),
        crc,
        certified,
    )


def _check_sizes(graph: Graph) -> None:
    core = {graph.core_input, *(op.output for op in graph.core)}
    for tensor in (graph.tensors[index] for index in sorted(core)):
        if tensor.size >= _MAX_ELEMENTS:
            raise InvalidGraphError(
                f"tensor '{tensor.name}' has {tensor.size} elements; generated C takes fewer "
                f"than {_MAX_ELEMENTS}"
            )
        if tensor.dtype.is_wide:
            raise InvalidGraphError(
                f"tensor '{tensor.name}' is {tensor.dtype.value}; generated C stores single bytes: "
                "quantize to int8"
            )
    if graph.logits == graph.core_input:
        raise InvalidGraphError("the logits are the input itself; there is nothing to generate")


def _layer(graph: Graph, op: Operator, index: int, layout: Layout, needs: Needs) -> LayerText:
    match op:
        case DepthwiseConv2D():
            return depthwise(graph, op, index, layout, needs)
        case Conv2D():
            return linear.convolution(graph, op, index, layout, needs)
        case FullyConnected():
            return linear.fully_connected(graph, op, index, layout, needs)
        case Add():
            return elementwise.add(graph, op, index, needs)
        case Pool2D():
            return elementwise.pool(graph, op, index, needs)
        case Pad():
            return elementwise.pad(graph, op, index, needs)
        case Reshape() if op.output == graph.logits:
            return elementwise.copy(graph, op, index, needs)
        case Reshape():
            return LayerText("")
        case Lookup():
            return tabled.lookup(graph, op, index, needs)
        case Move():
            return tabled.move(graph, op, index, needs)
        case Pair():
            raise InvalidGraphError(
                f"{op.kind} '{op.name}': two activations take a table of 65,536 entries, which "
                "generated C does not hold; leave the operator out, or run the file elsewhere"
            )
        case _:
            raise AssertionError(f"{op.kind} is not part of the integer core")


def _row(layer: CLayer) -> str:
    """One line of the header's table."""
    weights = f", {layer.layout} {layer.weight_bytes}" if layer.layout else ""
    return f"{layer.index} {layer.kind} {_printable(layer.name)}, {layer.output_bytes}{weights}"


def _printable(name: str) -> str:
    """A name comes from a file and could end the comment that it stands in."""
    return re.sub(r"[^A-Za-z0-9_./:;-]", "_", name)


def _start(graph: Graph, prefix: str, profile: str, needs: Needs) -> list[str]:
    upper = prefix.upper()
    return [
        f"""\
/* Generated by cactus_edge from graph {graph.fingerprint()},
   rounding profile {profile} where the graph does not say otherwise. */
#include "{prefix}.h"

/* The rounding functions shift negative numbers to the right. */
typedef char {prefix}_arithmetic_shift[(-1 >> 1) == -1 ? 1 : -1];

/* The CRC is one of little-endian tables. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "{prefix}: this code is for little-endian processors"
#endif

/* Layers as functions of their own can be measured one by one; inlined they are faster. */
#if defined({upper}_LAYERS) && defined(__GNUC__)
#define LAYER __attribute__((noinline)) static
#else
#define LAYER static
#endif

{pairs.guard(upper)}
{vectors.guard()}
#ifdef {upper}_TRACE
#define TRACE(layer, data, bytes) {prefix}_trace(layer, data, bytes)
#else
#define TRACE(layer, data, bytes) ((void)0)
#endif
""",
        translate_all(needs.functions),
        *(HELPERS[name] for name in HELPERS if name in needs.helpers),
    ]


def _layers(graph: Graph, texts: list[LayerText]) -> list[str]:
    return [
        f"/* {_comment(graph, op, index, text)} */\n{text.text}"
        for index, (op, text) in enumerate(zip(graph.core, texts, strict=True))
        if text.text
    ]


def _comment(graph: Graph, op: Operator, index: int, text: LayerText) -> str:
    shapes = [list(graph.tensors[i].shape[1:]) for i in (op.inputs[0], op.output)]
    layout = f", {text.layout} weights" if text.layout else ""
    return f"{index}: {op.kind} {_printable(op.name)}, {shapes[0]} -> {shapes[1]}{layout}"


def _run(graph: Graph, prefix: str, texts: list[LayerText], memory: Memory) -> str:
    upper = prefix.upper()
    lines: list[str] = []
    if memory.arena_bytes:
        lines.append("uint8_t *const memory = (uint8_t *)arena;")
    lines.append(f"if (checked != CHECKED) return {upper}_ERROR_NOT_READY;")
    for index, op in enumerate(graph.core):
        target = graph.tensors[op.output]
        if texts[index].text:
            arguments = [
                f"(const {c_type(graph.tensors[i].dtype)} *)({memory.places[i]})" for i in op.inputs
            ]
            arguments.append(f"({c_type(target.dtype)} *)({memory.places[op.output]})")
            if index in memory.scratch:
                kind = c_type(graph.tensors[op.inputs[0]].dtype)
                arguments.append(f"({kind} *)({memory.scratch[index]})")
            lines.append(f"layer_{index}({', '.join(arguments)});")
        lines.append(f"TRACE({index}, {memory.places[op.output]}, {target.size});")
    lines.append(f"return {upper}_OK;")
    return f"{run_signature(graph, prefix)}\n{{\n{join(f'  {line}' for line in lines)}}}\n"
