"""A graph as two C files: freestanding C99, no library, no heap, no float.

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
from cactus_edge.csource import elementwise, linear
from cactus_edge.csource.depthwise import depthwise
from cactus_edge.csource.encoding import Layout
from cactus_edge.csource.planner import Buffer, plan
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

# Indices and the sums of average pools are int32_t, with a factor of 256 to spare.
_MAX_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class CLayer:
    """What became of one operator; ``layout`` is empty and ``weight_bytes`` 0 without weights."""

    index: int
    name: str
    kind: str
    layout: str
    weight_bytes: int
    output: int
    output_bytes: int


@dataclass(frozen=True)
class CSource:
    """The C files of one model, and the sizes that a caller has to know."""

    files: Mapping[str, str]
    prefix: str
    entry: str
    arena_bytes: int
    input_bytes: int
    output_bytes: int
    layers: tuple[CLayer, ...]

    def write(self, folder: Path, *, force: bool = False) -> None:
        """The files in ``folder``.

        Raises:
            OutputError: one of them exists and ``force`` is not given, or cannot be written.
        """
        for name in self.files:
            files.refuse_existing(folder / name, force)
        for name, text in self.files.items():
            files.write(folder / name, text.encode(), force=force)


def generate(
    graph: Graph,
    profile: str = profiles.DEFAULT,
    *,
    layout: Layout = Layout.AUTO,
    prefix: str = "cactus_edge",
) -> CSource:
    """The C of ``graph``; a function of its arguments alone, byte by byte.

    Args:
        graph: resolved, or else resolved here under ``profile``.
        profile: name of a rounding profile, ignored by operators that are resolved already.
        layout: of all weights; AUTO takes the smallest for each layer.
        prefix: of everything with external linkage and, in capitals, of every macro.

    Raises:
        InvalidGraphError: the graph breaks a constraint, a size or sum does not fit int32, or
            logits are wider than int8.
        UsageError: no such profile, a prefix that C does not allow, or a layout that cannot hold
            the weights.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", prefix):
        raise UsageError(f"prefix '{prefix}' is not a C identifier; use letters, digits and _")
    resolved = profiles.resolve(graph, profile)
    constraints.validate(resolved)
    _check_sizes(resolved)
    needs = Needs()
    texts = [_layer(resolved, op, index, layout, needs) for index, op in enumerate(resolved.core)]
    memory = _Memory.of(resolved, texts)
    layers = tuple(
        CLayer(
            index,
            op.name,
            op.kind,
            text.layout,
            text.weight_bytes,
            op.output,
            resolved.tensors[op.output].size,
        )
        for index, (op, text) in enumerate(zip(resolved.core, texts, strict=True))
    )
    sizes = (resolved.tensors[i].size for i in (resolved.core_input, resolved.logits))
    input_bytes, output_bytes = sizes
    contents = {
        "model.h": _header(resolved, prefix, memory.arena_bytes),
        "model.c": _source(resolved, prefix, profile, texts, memory, needs),
    }
    return CSource(
        MappingProxyType(contents),
        prefix,
        f"{prefix}_run",
        memory.arena_bytes,
        input_bytes,
        output_bytes,
        layers,
    )


def _check_sizes(graph: Graph) -> None:
    for tensor in graph.tensors:
        if tensor.size >= _MAX_ELEMENTS:
            raise InvalidGraphError(
                f"tensor '{tensor.name}' has {tensor.size} elements; generated C takes fewer "
                f"than {_MAX_ELEMENTS}"
            )
        if tensor.dtype.is_wide:
            raise InvalidGraphError(
                f"tensor '{tensor.name}' is {tensor.dtype.value}; generated C stores single bytes: "
                "give the last layer an int8 output"
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
        case _:
            raise AssertionError(f"{op.kind} is not part of the integer core")


@dataclass(frozen=True)
class _Memory:
    """``places``: for each tensor its C expression; ``scratch``: the same for each operator."""

    places: dict[int, str]
    scratch: dict[int, str]
    arena_bytes: int

    @staticmethod
    def of(graph: Graph, texts: list[LayerText]) -> _Memory:
        roots = {graph.core_input: graph.core_input}
        for op in graph.core:
            shares = isinstance(op, Reshape) and op.output != graph.logits
            roots[op.output] = roots[op.inputs[0]] if shares else op.output
        lifetimes: dict[int, Buffer] = {}
        for index, op in enumerate(graph.core):
            for tensor in (*op.inputs, op.output):
                root = roots[tensor]
                first = lifetimes[root].first if root in lifetimes else index
                lifetimes[root] = Buffer(graph.tensors[root].size, first, index)
        places = {graph.core_input: "input", graph.logits: "output"}
        planned = [root for root in lifetimes if root not in places]
        patches = [index for index, text in enumerate(texts) if text.scratch]
        buffers = [lifetimes[root] for root in planned]
        buffers += [Buffer(texts[index].scratch, index, index) for index in patches]
        offsets, size = plan(buffers)
        where = [f"memory + {offset}" for offset in offsets]
        places |= dict(zip(planned, where[: len(planned)], strict=True))
        scratch = dict(zip(patches, where[len(planned) :], strict=True))
        return _Memory({t: places[root] for t, root in roots.items()}, scratch, size)


def _header(graph: Graph, prefix: str, arena_bytes: int) -> str:
    upper = prefix.upper()
    given, result = (graph.tensors[i] for i in (graph.core_input, graph.logits))
    run = _signature(graph, prefix)
    return f"""\
/* Generated by cactus_edge from graph {graph.fingerprint()}. */
#ifndef {upper}_MODEL_H
#define {upper}_MODEL_H

#include <stdint.h>

#define {upper}_INPUT_BYTES {given.size}
#define {upper}_OUTPUT_BYTES {result.size}
#define {upper}_ARENA_BYTES {arena_bytes}

#ifdef __cplusplus
extern "C" {{
#endif

/* Input {list(given.shape[1:])} and output {list(result.shape[1:])} must not overlap. Not
   reentrant: all calls share one static arena. */
{run};

#ifdef {upper}_TRACE
/* To be defined by the caller; called behind each operator with its output. */
void {prefix}_trace(int32_t layer, const void *data, int32_t bytes);
#endif

#ifdef __cplusplus
}}
#endif

#endif
"""


def _signature(graph: Graph, prefix: str) -> str:
    given, result = (c_type(graph.tensors[i].dtype) for i in (graph.core_input, graph.logits))
    return f"void {prefix}_run(const {given} *input, {result} *output)"


def _source(
    graph: Graph,
    prefix: str,
    profile: str,
    texts: list[LayerText],
    memory: _Memory,
    needs: Needs,
) -> str:
    upper = prefix.upper()
    parts = [
        f"""\
/* Generated by cactus_edge from graph {graph.fingerprint()},
   rounding profile {profile} where the graph does not say otherwise. */
#include "model.h"

/* The rounding functions shift negative numbers to the right. */
typedef char {prefix}_arithmetic_shift[(-1 >> 1) == -1 ? 1 : -1];

#ifdef {upper}_TRACE
#define TRACE(layer, data, bytes) {prefix}_trace(layer, data, bytes)
#else
#define TRACE(layer, data, bytes) ((void)0)
#endif
""",
        translate_all(needs.functions),
        *(HELPERS[name] for name in HELPERS if name in needs.helpers),
    ]
    for index, (op, text) in enumerate(zip(graph.core, texts, strict=True)):
        if text.text:
            parts.append(f"/* {_comment(graph, op, index, text)} */\n{text.text}")
    if memory.arena_bytes:
        parts.append(f"static uint32_t arena[{memory.arena_bytes // 4}];\n")
    parts.append(_run(graph, prefix, texts, memory))
    return "\n".join(parts)


def _comment(graph: Graph, op: Operator, index: int, text: LayerText) -> str:
    # A name comes from a file and could end the comment.
    name = re.sub(r"[^A-Za-z0-9_./:;-]", "_", op.name)
    shapes = [list(graph.tensors[i].shape[1:]) for i in (op.inputs[0], op.output)]
    layout = f", {text.layout} weights" if text.layout else ""
    return f"{index}: {op.kind} {name}, {shapes[0]} -> {shapes[1]}{layout}"


def _run(graph: Graph, prefix: str, texts: list[LayerText], memory: _Memory) -> str:
    lines: list[str] = []
    if memory.arena_bytes:
        lines.append("uint8_t *const memory = (uint8_t *)arena;")
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
    return f"{_signature(graph, prefix)}\n{{\n{join(f'  {line}' for line in lines)}}}\n"
