"""``<prefix>_predict_certified``: the host's interval propagation and verdict, on the device.

Both ends of every activation go through the network. For the head, the last layer with weights,
the ends of the *accumulators* are kept. A rival is excluded when bounds exclude it, or when its
elided margin does; see ``certify.margin`` for the argument. What is computed is what ``certify``
computes with ``--method interval`` for the label that the model predicts, integer by integer:

- the host reads, for each level of the logits, the least accumulator that reaches it from a table
  over all accumulators; here it is searched within the bounds, which gives the same number there;
- the host takes the greatest needed margin over all levels that matter; levels below the rival's
  least logit are left out here: they ask for less than that logit itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge import decision
from cactus_edge.csource import inner
from cactus_edge.csource.encoding import Encoding, group_units
from cactus_edge.csource.memory import Memory
from cactus_edge.csource.planner import aligned
from cactus_edge.csource.text import (
    LayerText,
    Needs,
    block,
    c_type,
    function,
    join,
    literal,
    plus,
)
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.graph import Graph, Linear, Reshape
from cactus_edge.operators import Lookup

# No two stored bytes are further apart.
_FURTHEST = 512


@dataclass(frozen=True)
class Head:
    """The last layer as ``margin.last_layer`` sees it.

    ``taps`` inputs; ``parts`` are the integers that put accumulators into common units.
    """

    operator: int
    source: int
    taps: int
    parts: tuple[int, ...]

    @staticmethod
    def of(graph: Graph) -> Head | None:
        """Of a resolved graph; None where the logits are no linear map of one tensor."""
        # The certifier compiles kernels when it is imported; plain C does without.
        from cactus_edge.certify.margin import last_layer

        layer = last_layer(graph)
        if layer is None:
            return None
        tensor, index = graph.logits, len(graph.core) - 1
        while graph.core[index].output != tensor or isinstance(graph.core[index], Reshape):
            if graph.core[index].output == tensor:
                tensor = graph.core[index].inputs[0]
            index -= 1
        parts = tuple(int(part) for part in layer.parts)
        return Head(index, layer.source, layer.weights.shape[1], parts)


def require_monotone(graph: Graph) -> None:
    """Both ends of a box may go through every operator of a resolved graph one by one.

    Raises:
        UnsupportedModelError: a table falls somewhere, so that its ends are not those of a range.
    """
    for op in graph.core:
        if not isinstance(op, Lookup):
            continue
        assert op.table is not None, "graph is not resolved"
        if (np.diff(op.table.astype(np.int64), axis=-1) < 0).any():
            raise UnsupportedModelError(
                f"{op.kind} '{op.name}' falls somewhere, which self-certifying firmware does not "
                "propagate; leave --certified out and certify on the host"
            )


def scratch(head: Head | None, texts: list[LayerText]) -> dict[int, int]:
    """Bytes by operator: patches, and two rows of weights of the head."""
    found = {index: text.bounds_scratch for index, text in enumerate(texts)}
    if head is not None:
        found[head.operator] = 2 * head.taps
    return found


def sizes(graph: Graph, head: Head | None) -> dict[int, int]:
    """Bytes of tensors that are not two ends of stored integers: the head's accumulators."""
    if head is None:
        return {}
    output = graph.core[head.operator].output
    return {output: 8 * graph.tensors[output].size}


def functions(graph: Graph, head: Head, encoding: Encoding, needs: Needs) -> str:
    """Tables and static functions of the head."""
    op = graph.core[head.operator]
    assert isinstance(op, Linear)
    index, classes = head.operator, op.channels
    kind = c_type(graph.tensors[head.source].dtype)
    half = aligned(graph.tensors[head.source].size)
    plain = inner.Kernel(index, encoding, kind, "int32_t", head.taps, classes)
    loops = inner.loops(plain.of_ends(half, classes, raw=True))
    sums = function(
        f"sums_{index}",
        [f"const {kind} *restrict input", "int32_t *restrict target"],
        [f"const {kind} *const window = input;", *loops],
    )
    row = function(f"row_{index}", ["int32_t channel", "int8_t *row"], _row(head, encoding))
    parts = np.array(head.parts, np.int64)
    table, part = needs.constant_or_table("parts", parts, "channel")
    own, other = (part.replace("channel", name) for name in ("label", "rival"))
    return f"""\
{table}/* Both ends of the last layer's sums. */
{sums}
/* The weights of one channel. */
{row}
/* The least sum in [low, high] whose logit reaches a level; high + 1 where none does. */
static int32_t least_sum(int32_t level, int32_t channel, int32_t low, int32_t high)
{{
  int32_t end = high + 1;
  while (low < end) {{
    const int32_t middle = low + (end - low) / 2;
    if (requantize_{index}(middle, channel) >= level) end = middle;
    else low = middle + 1;
  }}
  return low;
}}

/* By how much the elided margin of label and rival exceeds what is needed. */
static int64_t elided_margin(const {kind} *input, const int32_t *sums, int8_t *rows, int32_t label,
                             int32_t rival, int32_t gap)
{{
  const int64_t own = {own}, other = {other};
  const int32_t own_low = sums[label], own_high = sums[label + {classes}];
  const int32_t low = sums[rival], high = sums[rival + {classes}];
  const int64_t apart = own * own_low - other * high;
  const int32_t last = requantize_{index}(high, rival);
  int32_t level = requantize_{index}(low, rival);
  const int32_t beyond = requantize_{index}(own_low, label) - gap + 1;
  int64_t margin = own * bias_{index}[label] - other * bias_{index}[rival];
  int64_t needed = INT64_MIN;
  row_{index}(label, rows);
  row_{index}(rival, rows + {head.taps});
  for (int32_t n = 0; n < {head.taps}; n++) {{
    const int32_t factor = (int32_t)own * rows[n] - (int32_t)other * rows[n + {head.taps}];
    margin += (int64_t)factor * input[factor < 0 ? n + {half} : n];
  }}
  if (margin < apart) margin = apart;
  if (level < beyond) level = beyond;
  for (; level <= last; level++) {{
    const int64_t reached = least_sum(level + gap, label, own_low, own_high) - 1;
    const int64_t value = own * reached - other * least_sum(level, rival, low, high) + 1;
    if (needed < value) needed = value;
  }}
  return margin - needed;
}}
"""


def _row(head: Head, encoding: Encoding) -> list[str]:
    index, taps = head.operator, head.taps
    channels = len(head.parts)
    if encoding.layout.sparse:
        decode = ["position += (uint8_t)weight[0];", "const int32_t value = weight[1];"]
        if encoding.layout.packed:
            decode = ["position += *weight & 15;", "const int32_t value = *weight >> 4;"]
        step = 1 if encoding.layout.packed else 2
        return [
            f"const int8_t *weight = weights_{index};",
            "int32_t position = 0;",
            f"for (int32_t n = 0; n < channel; n++) weight += {step} * counts_{index}[n];",
            f"for (int32_t n = 0; n < {taps}; n++) row[n] = 0;",
            *block(
                f"for (int32_t entry = counts_{index}[channel]; entry > 0; entry--)",
                *decode,
                "row[position] = (int8_t)(row[position] + value);",
                f"weight += {step};",
            ),
        ]
    width, (full, rest) = encoding.block, divmod(channels, encoding.block)
    full *= width
    first, columns = f"channel / {width} * {width}", str(width)
    if not full:
        first, columns = "0", str(rest)
    elif rest:
        first = f"channel < {full} ? {first} : {full}"
        columns = f"channel < {full} ? {width} : {rest}"
    packed = encoding.layout.packed
    units = group_units(encoding.layout)
    length = (taps + 1) // 2 if packed else taps
    grouped = taps // 4 * units
    byte = "n / 2" if packed else "n"
    at = "own * 4 + unit % 4"
    if packed:
        at = "(columns % 2 ? unit % 2 * columns + own : own / 2 * 4 + unit % 2 * 2 + own % 2)"
    value = "weight[at]"
    if packed:
        value = f"(int8_t)((n & 1) ? weight[at] >> 4 : {inner.low_nibble('weight[at]')})"
    return [
        f"const int32_t columns = {columns};",
        f"const int32_t first = {first}, own = channel - first;",
        f"const int8_t *const weight = weights_{index} + first * {length};",
        *block(
            f"for (int32_t n = 0; n < {taps}; n++)",
            f"const int32_t unit = {byte}, group = unit / {units} * {units} * columns;",
            f"const int32_t at = unit < {grouped} ? group + {at} : unit * columns + own;",
            f"row[n] = {value};",
        ),
    ]


def entry(
    graph: Graph, prefix: str, head: Head | None, texts: list[LayerText], memory: Memory
) -> str:
    """C text of ``<prefix>_predict_certified``."""
    upper = prefix.upper()
    given, logits = (graph.tensors[i] for i in (graph.core_input, graph.logits))
    lower, greatest = given.dtype.range
    kind, half = c_type(given.dtype), aligned(given.size)
    lines = [
        "uint8_t *const memory = (uint8_t *)arena;",
        f"{kind} *const box = ({kind} *)({memory.places[graph.core_input]});",
        "result->certified = 0;",
        "result->label = -1;",
        f"if (levels < 0 || levels > 255) return {upper}_ERROR_LEVELS;",
        f"const int32_t status = {prefix}_run(input, result->logits);",
        f"if (status != {upper}_OK) return status;",
        "int32_t label = 0;",
        *block(
            f"for (int32_t n = 1; n < {logits.size}; n++)",
            "if (result->logits[n] > result->logits[label]) label = n;",
        ),
        *block(
            f"for (int32_t n = 0; n < {given.size}; n++)",
            "const int32_t low = input[n] - levels, high = input[n] + levels;",
            f"box[n] = ({kind})(low < {literal(lower)} ? {literal(lower)} : low);",
            f"box[n + {half}] = ({kind})(high > {greatest} ? {greatest} : high);",
        ),
        *_propagate(graph, head, texts, memory),
        *_decide(graph, head, memory),
        f"return {upper}_OK;",
    ]
    return f"{signature(graph, prefix)}\n{{\n{join(f'  {line}' for line in lines)}}}\n"


def signature(graph: Graph, prefix: str) -> str:
    """The head of the function, without a semicolon."""
    kind = c_type(graph.tensors[graph.core_input].dtype)
    arguments = f"const {kind} *input, int32_t levels, {prefix}_result *result"
    return f"int32_t {prefix}_predict_certified({arguments})"


def _propagate(
    graph: Graph, head: Head | None, texts: list[LayerText], memory: Memory
) -> list[str]:
    lines: list[str] = []
    for index, (op, text) in enumerate(zip(graph.core, texts, strict=True)):
        if isinstance(op, Reshape):
            continue
        sources = [
            (f"(const {c_type(graph.tensors[i].dtype)} *)({{}})", memory.places[i], i)
            for i in op.inputs
        ]
        target = f"({c_type(graph.tensors[op.output].dtype)} *)({{}})"
        place = memory.places[op.output]
        if head is not None and index == head.operator:
            source = sources[0][0].format(sources[0][1])
            lines.append(f"sums_{index}({source}, (int32_t *)(void *)({place}));")
            break
        if text.bounds:
            arguments = [kind.format(where) for kind, where, _ in sources]
            arguments.append(target.format(place))
            if index in memory.scratch:
                patch = c_type(graph.tensors[op.inputs[0]].dtype)
                arguments.append(f"({patch} *)({memory.scratch[index]})")
            lines.append(f"bounds_{index}({', '.join(arguments)});")
            continue
        for end in (0, 1):
            arguments = [
                kind.format(f"{where}{plus(end * aligned(graph.tensors[i].size))}")
                for kind, where, i in sources
            ]
            step = aligned(graph.tensors[op.output].size)
            arguments.append(target.format(f"{place}{plus(end * step)}"))
            lines.append(f"layer_{index}({', '.join(arguments)});")
    return lines


def _decide(graph: Graph, head: Head | None, memory: Memory) -> list[str]:
    logits = graph.tensors[graph.logits]
    classes, kind = logits.size, c_type(logits.dtype)
    lines: list[str] = []
    margin = "INT64_MIN"
    low, high = "ends[n]", f"ends[n + {aligned(classes)}]"
    if head is None:
        place = memory.places[graph.logits]
        lines.append(f"const {kind} *const ends = (const {kind} *)({place});")
    else:
        index = head.operator
        place, source = memory.places[graph.core[index].output], memory.places[head.source]
        source_kind = c_type(graph.tensors[head.source].dtype)
        lines.append(f"const int32_t *const sums = (const int32_t *)(const void *)({place});")
        low = f"({kind})requantize_{index}(sums[n], n)"
        high = f"({kind})requantize_{index}(sums[n + {classes}], n)"
        given = f"(const {source_kind} *)({source}), sums, (int8_t *)({memory.scratch[index]})"
        margin = f"elided_margin({given}, label, n, gap)"
    lines += block(
        f"for (int32_t n = 0; n < {classes}; n++)",
        f"result->lower[n] = {low};",
        f"result->upper[n] = {high};",
    )
    lead = min(decision.lead(graph), _FURTHEST)
    lines += [
        "int32_t certified = 1;",
        *block(
            f"for (int32_t n = 0; n < {classes}; n++)",
            f"const int32_t gap = n < label ? {lead} : 0;",
            "result->margins[n] = 0;",
            "result->leads[n] = n == label ? 0 : result->lower[label] - result->upper[n] - gap;",
            "if (result->leads[n] >= 0) continue;",
            f"result->margins[n] = {margin};",
            "if (result->margins[n] < 0) certified = 0;",
        ),
        "result->label = label;",
        "result->certified = certified;",
    ]
    return lines
