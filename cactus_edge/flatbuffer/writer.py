"""From a graph to the bytes of a plain, dense ``.tflite`` that stock runtimes load.

Tensors are the graph's activations in their order, then each operator's constants. Nothing depends
on time, version or hash seed: the same graph gives the same bytes. Sparse tensors are never
written, because stock runtimes silently read them wrong; constants are never shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from cactus_edge import constraints
from cactus_edge.flatbuffer import schema, storable
from cactus_edge.flatbuffer.node import Constant
from cactus_edge.flatbuffer.operators import encode
from cactus_edge.flatbuffer.wire import Values, serialize
from cactus_edge.graph import DType, Graph, Linear, Operator, Reshape, Tensor
from cactus_edge.operators import Mean, WithConstant


def write_tflite(graph: Graph) -> bytes:
    """The file that holds ``graph``.

    Raises:
        InvalidGraphError: the graph breaks a constraint.
        UnsupportedModelError: a file cannot hold it (see ``storable``).
    """
    constraints.validate(graph)
    storable.check(graph)
    return serialize(model_values(graph))


def model_values(graph: Graph) -> dict[str, object]:
    """The ``Model`` table of a graph that has been checked, before it becomes bytes."""
    graph = _flattened(graph)
    draft = _Draft()
    for tensor in graph.tensors:
        draft.add_activation(tensor)
    for op in graph.operators:
        draft.add_operator(graph, op)
    entries = list(graph.metadata)
    if widths := _unusual_widths(graph):
        entries.append((storable.BITS_ENTRY, widths))
    metadata = [{"name": name, "buffer": draft.add_buffer(data)} for name, data in entries]
    subgraph: Values = {
        "tensors": draft.tensors,
        "inputs": [graph.input],
        "outputs": [graph.output],
        "operators": draft.operators,
        "name": "main",
    }
    model: dict[str, object] = {
        "version": schema.VERSION,
        "operator_codes": [_operator_code(*code) for code in draft.codes],
        "subgraphs": [subgraph],
        "description": "cactus_edge",
        "buffers": draft.buffers,
    }
    if metadata:
        model["metadata"] = metadata
    return model


def _flattened(graph: Graph) -> Graph:
    """With MEANs that keep no dimensions as a file has them: of two, without a RESHAPE behind."""
    readers = [index for op in graph.operators for index in op.inputs] + [graph.output]
    tensors, merged = list(graph.tensors), dict[int, int]()
    for op in graph.operators:
        if not isinstance(op, Mean) or op.keeps:
            continue
        shape = (1, op.channels)
        tensors[op.output] = replace(tensors[op.output], shape=shape)
        for behind in graph.operators:
            alone = behind.inputs == (op.output,) and readers.count(op.output) == 1
            if isinstance(behind, Reshape) and alone and tensors[behind.output].shape == shape:
                merged[op.output] = behind.output
    kept = [index for index in range(len(tensors)) if index not in merged]
    place = {index: kept.index(merged.get(index, index)) for index in range(len(tensors))}
    operators = tuple(
        replace(op, inputs=tuple(place[i] for i in op.inputs), output=place[op.output])
        for op in graph.operators
        if op.inputs[0] not in merged
    )
    ends = {"input": place[graph.input], "output": place[graph.output]}
    return replace(graph, tensors=tuple(tensors[i] for i in kept), operators=operators, **ends)


def _operator_code(kind: schema.Kind, version: int) -> Values:
    # Readers older than 2020 know the first field only; every code that is written fits it.
    code = {"deprecated_builtin_code": kind.code, "builtin_code": kind.code}
    return {**code, "version": version}


def _unusual_widths(graph: Graph) -> bytes:
    """One byte for each linear operator, or nothing where the tensor types say all of it."""
    widths = [op.weights.bits for op in graph.operators if isinstance(op, Linear)]
    return b"" if set(widths) <= {4, 8} else bytes(widths)


@dataclass
class _Draft:
    """The file's tables as they grow. Buffer 0 stays empty: it stands for no data."""

    tensors: list[Values] = field(default_factory=list)
    operators: list[Values] = field(default_factory=list)
    codes: list[tuple[schema.Kind, int]] = field(default_factory=list)
    buffers: list[Values] = field(default_factory=lambda: [{}])

    def add_buffer(self, data: bytes) -> int:
        """The index of a new buffer."""
        self.buffers.append({"data": data})
        return len(self.buffers) - 1

    def add_activation(self, tensor: Tensor) -> None:
        """A tensor without data."""
        values: dict[str, object] = {
            "shape": tensor.shape,
            "type": schema.TYPE_CODES[tensor.dtype.name],
            "name": tensor.name,
        }
        if tensor.quantization is not None:
            values["quantization"] = {
                "scale": [tensor.quantization.scale_bits],
                "zero_point": [tensor.quantization.zero_point],
            }
        self.tensors.append(values)

    def add_constant(self, constant: Constant) -> int:
        """The index of a new tensor with data."""
        values: dict[str, object] = {
            "shape": constant.shape,
            "type": schema.TYPE_CODES[constant.type],
            "buffer": self.add_buffer(constant.data.tobytes()),
            "name": constant.name,
        }
        if constant.scale_bits.size:
            values["quantization"] = {
                "scale": constant.scale_bits,
                "zero_point": constant.zero_points,
                "quantized_dimension": constant.quantized_dimension,
            }
        self.tensors.append(values)
        return len(self.tensors) - 1

    def add_operator(self, graph: Graph, op: Operator) -> None:
        """An operator with its constants."""
        kind = schema.KINDS[op.kind]
        wide = any(graph.tensors[i].dtype is DType.INT16 for i in (*op.inputs, op.output))
        version = schema.INT16_VERSIONS.get(kind.name, kind.version) if wide else kind.version
        if (kind, version) not in self.codes:
            self.codes.append((kind, version))
        options, constants = encode(graph, op)
        inputs = [*op.inputs, *map(self.add_constant, constants)]
        if isinstance(op, WithConstant) and op.first:
            inputs.reverse()
        values: dict[str, object] = {
            "opcode_index": self.codes.index((kind, version)),
            "inputs": np.array(inputs, np.int32),
            "outputs": [op.output],
        }
        if options is not None:
            values["builtin_options_type"] = kind.options_type
            values["builtin_options"] = (kind.options, options)
        self.operators.append(values)
