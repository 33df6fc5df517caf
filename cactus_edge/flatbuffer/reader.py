"""From the bytes of a ``.tflite`` to a graph: strict, and safe on any bytes.

Whatever is not understood is refused by name, and so is everything that stock runtimes would
compute differently from the graph. Nothing but errors of ``cactus_edge.errors`` leaves this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cactus_edge import constraints, scales
from cactus_edge.errors import InvalidGraphError, UnsupportedModelError
from cactus_edge.flatbuffer import folding, schema, storable
from cactus_edge.flatbuffer.imported import Split
from cactus_edge.flatbuffer.node import Constant, Node
from cactus_edge.flatbuffer.operators import decode, with_edge
from cactus_edge.flatbuffer.packing import packed_size
from cactus_edge.flatbuffer.wire import Place, Table, open_root
from cactus_edge.graph import DType, Graph, Linear, Operator, Quantization, Tensor

_ACTIVATION_TYPES = {kind.name: kind for kind in DType}
# The operators of which either operand may be a constant, or any number are activations.
_TWO, _ANY = ("ADD", "SUB", "MUL"), ("CONCATENATION",)
_CONSTANT_BYTES = {"INT8": 1, "INT32": 4, "INT64": 8}
_FIXED_BATCH = (
    "a fixed batch of 1 (keras.Input(shape, batch_size=1)) makes TensorFlow's converter write "
    "convolutions with dilation instead"
)
_REMEDIES: dict[str, str] = dict.fromkeys(("SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND"), _FIXED_BATCH)


def read_tflite(data: bytes, name: str = "model") -> Graph:
    """The graph in the bytes of a ``.tflite`` file; ``name`` stands for the file in messages.

    Raises:
        MalformedModelError: the bytes are not a well-formed model.
        UnsupportedModelError: the model uses what is not supported.
        InvalidGraphError: the model breaks a constraint.
    """
    model = open_root(bytes(data), name)
    graph = _graph(model)
    try:
        constraints.validate(graph)
        storable.check(graph)
    except InvalidGraphError as error:
        raise InvalidGraphError(model.place.at("").message(str(error))) from None
    except UnsupportedModelError as error:
        raise model.place.at("").unsupported(str(error)) from None
    return graph


def _graph(model: Table) -> Graph:
    place = Place(model.place.file)
    version = model.integer("version")
    if version != schema.VERSION:
        raise place.malformed(f"schema version {version}; only {schema.VERSION} exists")
    _refuse(model, "external_buffer_groups", "external_buffers")
    subgraphs = model.tables("subgraphs", "subgraph")
    if len(subgraphs) != 1:
        raise place.unsupported(f"{len(subgraphs)} subgraphs; exactly one is supported")
    subgraph = subgraphs[0]
    buffers = [_buffer(table) for table in model.tables("buffers", "buffer")]
    if not buffers or len(buffers[0]):
        raise place.malformed("buffer 0 is missing or not empty")
    tensors = [_tensor(table, buffers) for table in subgraph.tables("tensors", "tensor")]
    operators = subgraph.tables("operators", "operator")
    if len(operators) > storable.MOST_OPERATORS:
        raise place.unsupported(
            f"{len(operators)} operators; up to {storable.MOST_OPERATORS} are supported"
        )
    codes = model.tables("operator_codes", "operator code")
    kinds = [_kind_or_error(code) for code in codes]
    tensors, computing = _without_shapes(tensors, operators, kinds)
    computing = folding.read_ones(computing, operators, kinds, subgraph.integers("outputs"))
    lookup = _Lookup(place, tensors, kinds)
    metadata = _metadata(model, buffers)
    decoded, extras = _flattened(
        [lookup.operator(index, operators[index]) for index in computing],
        len(lookup.activations),
    )
    widths = [value for entry, value in metadata if entry == storable.BITS_ENTRY]
    return Graph(
        tensors=(*lookup.activations, *extras),
        operators=_with_widths(with_edge(decoded), widths, place),
        input=lookup.edge(subgraph, "inputs"),
        output=lookup.edge(subgraph, "outputs"),
        metadata=tuple(entry for entry in metadata if entry[0] != storable.BITS_ENTRY),
    )


def _flattened(
    decoded: Sequence[Operator | Split], count: int
) -> tuple[list[Operator], list[Tensor]]:
    """The operators, and the tensors that they need behind the first ``count``."""
    operators: list[Operator] = []
    extras: list[Tensor] = []
    for op in decoded:
        if isinstance(op, Split):
            operators += op.numbered(count + len(extras))
            extras += op.extras
        else:
            operators.append(op)
    return operators, extras


def _refuse(table: Table, *names: str) -> None:
    for name in names:
        if table.present(name):
            raise table.place.unsupported(f"uses '{name}', which is not supported")


# ------------------------------------------------------------------------------------------ tensors
def _buffer(table: Table) -> npt.NDArray[np.uint8]:
    """The bytes of a buffer, which may lie behind the flatbuffer, at an offset of the file."""
    offset, size = table.integer("offset"), table.integer("size")
    inside = table.array("data")
    if offset < 2:  # 0 and 1 stand for none
        if size:
            raise table.place.malformed(f"{size} bytes at no offset")
        return inside
    whole = table.file.data
    if len(inside) or offset + size > len(whole):
        raise table.place.malformed(
            f"{size} bytes at offset {offset} of {len(whole)}, and {len(inside)} in the table"
        )
    table.file.spend(size, table.place)
    return np.frombuffer(whole, np.uint8, size, offset)


@dataclass(frozen=True, eq=False)
class _Entry:
    """A tensor of the file: an activation, or else a constant."""

    place: Place
    activation: Tensor | None
    constant: Constant | None


def _tensor(table: Table, buffers: Sequence[npt.NDArray[np.uint8]]) -> _Entry:
    name = table.text("name")
    table.file.keep(3 * len(name), table.place)
    place = table.place.at(f"{table.place.where} '{name}'")
    _refuse(table, "sparsity", "variant_tensors")
    if table.integer("is_variable") or table.integer("external_buffer"):
        raise place.unsupported("variable and external tensors are not supported")
    index = table.integer("buffer")
    if index >= len(buffers):
        raise place.malformed(f"buffer {index} does not exist, there are {len(buffers)}")
    data = buffers[index] if index else buffers[0]
    code = table.integer("type")
    scalar = len(data) > 0 or code == schema.TYPE_CODES["INT32"]
    shape = _shape(table, place, scalar=scalar)
    if code not in schema.TYPE_NAMES:
        raise place.unsupported(f"tensor type {code} is unknown")
    kind = schema.TYPE_NAMES[code]
    scale_bits, zero_points, dimension = _quantization(table, place, len(shape))
    if len(data):
        constant = Constant(name, kind, shape, data, scale_bits, zero_points, dimension)
        _check_size(constant, place)
        return _Entry(place, None, constant)
    if kind not in _ACTIVATION_TYPES:
        raise place.unsupported(
            f"activations are {kind}; supported: {', '.join(_ACTIVATION_TYPES)}"
        )
    quantization = None
    if scale_bits.size:
        if scale_bits.size != 1:
            raise place.unsupported(
                f"an activation with {scale_bits.size} scales; one is supported"
            )
        quantization = Quantization(int(scale_bits[0]), int(zero_points[0]))
    return _Entry(place, Tensor(name, shape, _ACTIVATION_TYPES[kind], quantization), None)


def _shape(table: Table, place: Place, *, scalar: bool) -> tuple[int, ...]:
    """The extents; none at all only where a ``scalar`` is allowed."""
    shape = table.integers("shape")
    if scalar and not shape:
        return shape
    if len(shape) < 1 or len(shape) > 8 or min(shape) < 1:
        raise place.malformed(
            f"shape {list(shape[:9])}; 1 to 8 extents of at least 1 are supported"
        )
    signature = table.integers("shape_signature")
    # A free batch is no contradiction: it is 1 wherever the file does not say otherwise.
    if signature and signature not in (shape, (-1, *shape[1:])):
        raise place.unsupported(
            f"dynamic shape {list(signature[:9])}; only the batch, as first extent, may be -1"
        )
    if signature and signature != shape and shape[0] != 1:
        raise place.unsupported(f"dynamic batch beside shape {list(shape)}; it must be 1")
    return shape


def _quantization(
    table: Table, place: Place, rank: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], int]:
    """``(scale patterns, zero points, dimension)``, the arrays of one length, empty without any."""
    quantization = table.table("quantization")
    if quantization is None:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64), 0
    if quantization.integer("details_type"):
        raise place.unsupported("custom quantization")
    scale_bits, zero_points = quantization.array("scale"), quantization.array("zero_point")
    if scale_bits.size != zero_points.size:
        raise place.malformed(f"{scale_bits.size} scales, {zero_points.size} zero points")
    dimension = quantization.integer("quantized_dimension")
    if not 0 <= dimension < max(rank, 1):
        raise place.malformed(f"quantized dimension {dimension} of a tensor with {rank}")
    try:
        for bits in np.unique(scale_bits).tolist():
            scales.decode_float32(bits)
    except InvalidGraphError as error:
        raise place.malformed(str(error)) from None
    if zero_points.size and not -128 <= int(zero_points.min()) <= int(zero_points.max()) <= 255:
        raise place.malformed(f"zero points {zero_points.min()}..{zero_points.max()} are no int8")
    return scale_bits, zero_points, dimension


def _check_size(constant: Constant, place: Place) -> None:
    if constant.type == "INT4":
        expected = packed_size(constant.size)
    elif constant.type in _CONSTANT_BYTES:
        expected = constant.size * _CONSTANT_BYTES[constant.type]
    else:
        raise place.unsupported(
            f"constants of type {constant.type}; supported: INT8, INT4, INT32, INT64"
        )
    if len(constant.data) != expected:
        raise place.malformed(
            f"{len(constant.data)} bytes of data instead of {expected} for "
            f"{constant.type} {list(constant.shape)}"
        )


# ---------------------------------------------------------------------------------------- operators
def _kind_or_error(table: Table) -> schema.Kind | UnsupportedModelError:
    """The operator kind of a code; what is unsupported is an error only where it is used."""
    old, new = table.integer("deprecated_builtin_code"), table.integer("builtin_code")
    if old > 0 and new > 0 and old != min(new, 127):
        raise table.place.malformed(f"gives two different operators, {old} and {new}")
    version = table.integer("version")
    if version < 1:
        raise table.place.malformed(f"operator version {version}")
    code = max(old, new)
    if code in schema.KIND_OF_CODE:
        kind = schema.KIND_OF_CODE[code]
        if version > kind.newest or (kind.name, version) in schema.DIVERGENT_VERSIONS:
            return UnsupportedModelError(
                f"version {version} of {kind.name} is not supported; write version {kind.version}"
            )
        return kind
    name = schema.OPERATOR_NAMES.get(code, f"of code {code}")
    if name == "CUSTOM":
        name = f"CUSTOM '{table.text('custom_code')}'"
    remedy = _REMEDIES.get(name, f"supported: {', '.join(schema.KINDS)}")
    return UnsupportedModelError(f"operator {name} is not supported; {remedy}")


def _without_shapes(
    entries: Sequence[_Entry],
    operators: Sequence[Table],
    kinds: Sequence[schema.Kind | UnsupportedModelError],
) -> tuple[list[_Entry], list[int]]:
    """The tensors with shapes that are computed as constants, and the operators that are left."""
    found, left = list(entries), list[int]()
    for index, table in enumerate(operators):
        code = table.integer("opcode_index")
        kind = kinds[code] if code < len(kinds) else None
        inputs, outputs = table.integers("inputs"), table.integers("outputs")
        known = all(0 <= i < len(found) for i in (*inputs, *outputs)) and len(outputs) == 1
        if not isinstance(kind, schema.Kind) or kind.name not in folding.FOLDED or not known:
            left.append(index)
            continue
        place = table.place.at(f"operator {index} ({kind.name})")
        given = [found[i] for i in inputs]
        shapes = [(e.activation or e.constant).shape for e in given]  # pyright: ignore
        constants = [entry.constant for entry in given]
        values = folding.folded(kind.name, _options(table, kind, place), shapes, constants)
        target = found[outputs[0]]
        if values is None or target.activation is None or target.activation.dtype != DType.INT32:
            left.append(index)
            continue
        name, wanted = target.activation.name, target.activation.shape
        if wanted != values.shape:
            raise place.malformed(f"gives {list(values.shape)}, its output is {list(wanted)}")
        data = np.frombuffer(values.astype("<i4").tobytes(), np.uint8)
        none = np.zeros(0, np.uint32), np.zeros(0, np.int64)
        constant = Constant(name, "INT32", values.shape, data, *none)
        found[outputs[0]] = _Entry(target.place, None, constant)
    return found, left


class _Lookup:
    """Translates the file's tensor indices to those of the graph, which holds activations alone."""

    def __init__(
        self,
        place: Place,
        entries: Sequence[_Entry],
        kinds: Sequence[schema.Kind | UnsupportedModelError],
    ) -> None:
        """Number the activations in the order of the file."""
        self._place = place
        self._entries = entries
        self._kinds = kinds
        activations: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        for index, entry in enumerate(entries):
            if entry.activation is not None:
                self._numbers[index] = len(activations)
                activations.append(entry.activation)
        self.activations = tuple(activations)

    def _activation(self, index: int, place: Place, what: str) -> int:
        self._check(index, place)
        if index not in self._numbers:
            name = self._entries[index].place.where
            raise place.unsupported(f"{what} is {name}, a constant")
        return self._numbers[index]

    def _check(self, index: int, place: Place) -> None:
        if not 0 <= index < len(self._entries):
            raise place.malformed(f"tensor {index} does not exist, there are {len(self._entries)}")

    def _constant(self, index: int, place: Place, position: int) -> Constant | None:
        if index == -1:
            return None
        self._check(index, place)
        entry = self._entries[index]
        if entry.constant is None:
            raise place.unsupported(f"input {position} is {entry.place.where}, which has no data")
        # Decoded anew for each operator that uses it.
        return entry.constant

    def edge(self, subgraph: Table, name: str) -> int:
        """The single input or output of the model."""
        indices = subgraph.integers(name)
        if len(indices) != 1:
            raise self._place.unsupported(f"{len(indices)} {name}; exactly one is supported")
        return self._activation(indices[0], self._place, f"the model's {name.removesuffix('s')}")

    def operator(self, index: int, table: Table) -> Operator | Split:
        """The operator, or two, that a table of the file stands for."""
        opcode = table.integer("opcode_index")
        if opcode >= len(self._kinds):
            raise table.place.malformed(
                f"operator code {opcode} does not exist, there are {len(self._kinds)}"
            )
        kind = self._kinds[opcode]
        if isinstance(kind, UnsupportedModelError):
            raise table.place.unsupported(str(kind))
        place = table.place.at(f"operator {index} ({kind.name})")
        _refuse(table, "builtin_options_2")
        extras = (table.array("custom_options"), table.array("intermediates"))
        changed = table.array("mutating_variable_inputs").any()
        sizes = ("large_custom_options_offset", "large_custom_options_size")
        if any(map(len, extras)) or changed or any(map(table.integer, sizes)):
            raise place.unsupported("custom options, intermediates and variables are not supported")
        inputs, outputs = table.integers("inputs"), table.integers("outputs")
        if not inputs or len(outputs) != 1:
            raise place.malformed(f"has {len(inputs)} inputs and {len(outputs)} outputs")
        count = len(inputs) if kind.name in _ANY else 1
        first = False
        if kind.name in _TWO:
            given = [self._has_data(i, place) for i in inputs]
            first = given[:1] == [True] and len(inputs) == 2 and not given[1]
            inputs = inputs[::-1] if first else inputs
            count = 2 - any(given[:2])
        constants = [self._constant(i, place, count + k) for k, i in enumerate(inputs[count:])]
        for constant in filter(None, constants):
            table.file.spend(len(constant.data), place)
            table.file.keep(len(constant.data), place)
        return decode(
            Node(
                place=place,
                kind=kind,
                options=_options(table, kind, place),
                inputs=tuple(self._activation(i, place, "its input") for i in inputs[:count]),
                constants=constants,
                output=self._activation(outputs[0], place, "its output"),
                tensors=self.activations,
                constant_first=first,
            )
        )

    def _has_data(self, index: int, place: Place) -> bool:
        self._check(index, place)
        return self._entries[index].constant is not None


def _options(table: Table, kind: schema.Kind, place: Place) -> Table | None:
    """The operator's options table, None where there is none to read."""
    given = table.integer("builtin_options_type")
    if given != kind.options_type and (given or table.present("builtin_options")):
        raise place.malformed(f"has options of another operator (type {given})")
    if kind.options is None or not given:
        return None
    return table.table("builtin_options", kind.options)


# ----------------------------------------------------------------------------------------- metadata
def _metadata(
    model: Table, buffers: Sequence[npt.NDArray[np.uint8]]
) -> tuple[tuple[str, bytes], ...]:
    entries: list[tuple[str, bytes]] = []
    for table in model.tables("metadata", "metadata entry"):
        index = table.integer("buffer")
        if index >= len(buffers):
            raise table.place.malformed(f"buffer {index} does not exist, there are {len(buffers)}")
        table.file.spend(buffers[index].size, table.place)
        table.file.keep(buffers[index].size, table.place)
        entries.append((table.text("name"), buffers[index].tobytes()))
    return tuple(entries)


def _with_widths(
    operators: Sequence[Operator], entries: Sequence[bytes], place: Place
) -> tuple[Operator, ...]:
    """The operators with the widths of their weights, where the file gives more than the types."""
    if not entries:
        return tuple(operators)
    where = place.at(f"metadata entry '{storable.BITS_ENTRY}'")
    linear = [op for op in operators if isinstance(op, Linear)]
    if len(entries) > 1 or len(entries[0]) != len(linear):
        raise where.malformed(f"must hold one byte for each of {len(linear)} linear operators")
    remaining = iter(entries[0])
    return tuple(
        _with_width(op, next(remaining), where) if isinstance(op, Linear) else op
        for op in operators
    )


def _with_width(op: Linear, bits: int, where: Place) -> Linear:
    if not 2 <= bits <= 8 or (bits <= 4) != (op.weights.bits == 4):
        raise where.malformed(f"'{op.name}' has {bits} bits in tensors of {op.weights.bits} bits")
    return replace(op, weights=replace(op.weights, bits=bits))
