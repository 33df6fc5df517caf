"""An ONNX file as nodes and constants, with everything that does not depend on the input folded.

Exporters leave sub-graphs behind that compute shapes from the input's own; samples being taken one
by one, the input's shape is known, and what follows from it is evaluated here (``fold``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.errors import (
    MalformedModelError,
    MissingExtraError,
    UnsupportedModelError,
    shortened,
)

try:
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator
except ImportError:
    raise MissingExtraError("onnx", "onnx", "reading ONNX files") from None

Array = npt.NDArray[Any]
RUNTIME_DOMAIN = "com.microsoft"
RUNTIME_KINDS = frozenset({"QGemm", "QLinearAdd"})
"""ONNX Runtime's own operators that are read."""

# What exporters leave behind; none of them takes much more time than its outputs have elements.
_FOLDED = frozenset(
    (
        "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat",
        "Constant", "ConstantOfShape", "DequantizeLinear", "Div", "Equal", "Exp", "Expand",
        "Flatten", "Floor", "Gather", "Gemm", "Greater", "GreaterOrEqual", "Identity", "Less",
        "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad",
        "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceMax", "ReduceMean",
        "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round", "Shape",
        "Sigmoid", "Sign", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh",
        "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
    )
)  # fmt: skip
_MOST_NODES = 1 << 12
_SMALL = 1 << 20  # elements
_GROWTH = 4


@dataclass(frozen=True, eq=False)
class Node:
    """``attributes`` hold integers, floats, strings, arrays or tuples of these."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: onnx.NodeProto

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0]

    def error(self, problem: str, remedy: str = "") -> UnsupportedModelError:
        """An error that names the node."""
        hint = f"; {remedy}" if remedy else ""
        return UnsupportedModelError(f"node '{self.name}' ({self.kind}): {problem}{hint}")

    def get(self, attribute: str, default: Any) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(attribute, default)


@contextmanager
def fitting(node: Node) -> Generator[None]:
    """Name the node whose attributes, inputs and shapes do not fit each other.

    ONNX's checker compares none of these, and there are too many ways to be wrong to name each.

    Raises:
        MalformedModelError: with what NumPy or Python said.
    """
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise MalformedModelError(
            f"node '{shortened(node.name)}' ({node.kind}): its attributes, inputs and shapes do "
            f"not fit each other: {shortened(error)}"
        ) from error


@dataclass(frozen=True, eq=False)
class File:
    """A model with one input and one output.

    ``shape`` is the input's with batch 1, ``batch`` the one that the file declares, or 0 where it
    leaves it open. ``nodes`` are those that the output depends on, in order.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    batch: int
    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    proto: onnx.ModelProto


def read(content: bytes) -> File:
    """Parse and check.

    Raises:
        MalformedModelError: not a well-formed ONNX model.
        UnsupportedModelError: several inputs or outputs, external data, an input of unknown shape.
    """
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's classes of errors have no public root
        raise MalformedModelError(f"not an ONNX file: {shortened(error)}") from None
    graph = model.graph
    _refuse_other_files(graph)
    if len(graph.node) > _MOST_NODES:
        raise UnsupportedModelError(
            f"{len(graph.node)} nodes; files of up to {_MOST_NODES} are supported"
        )
    if not graph.node:
        raise MalformedModelError("not an ONNX model: it has no nodes")
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise MalformedModelError(f"not a valid ONNX model: {shortened(error)}") from None
    known = {(RUNTIME_DOMAIN, kind) for kind in RUNTIME_KINDS}
    foreign = [n for n in graph.node if n.domain not in ("", "ai.onnx")]
    foreign = [n for n in foreign if (n.domain, n.op_type) not in known]
    if foreign:
        node = foreign[0]
        raise UnsupportedModelError(
            f"node '{node.name or node.output[0]}' ({node.op_type}): domain '{node.domain}' is not "
            "ONNX's own; export without custom operators"
        )
    constants = {tensor.name: _values(tensor) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        names = ", ".join(value.name for value in (*inputs, *graph.output))
        raise UnsupportedModelError(
            f"{len(inputs)} inputs and {len(graph.output)} outputs ({names}); a classifier has one "
            "of each"
        )
    output = graph.output[0].name
    shape, batch = _input_shape(inputs[0])
    nodes = _needed(graph, output)
    if not nodes:
        raise UnsupportedModelError(
            f"output '{shortened(output)}' is no node's; a classifier computes it"
        )
    return File(inputs[0].name, output, shape, batch, nodes, constants, model)


def _refuse_other_files(graph: onnx.GraphProto) -> None:
    """Tensors in other files are read by nobody here, wherever in the graph they hide."""
    tensors = [*graph.initializer]
    for sparse in graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    for node in graph.node:
        for item in node.attribute:
            tensors += [
                item.t,
                *item.tensors,
                item.sparse_tensor.values,
                item.sparse_tensor.indices,
            ]
            if item.HasField("g") or item.graphs:
                raise UnsupportedModelError(
                    f"node '{node.name}' ({node.op_type}): graphs inside of nodes are not read; "
                    "export without control flow"
                )
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise UnsupportedModelError(
                f"tensor '{shortened(tensor.name)}' lies in another file; save the model with its "
                "data inside"
            )


def _values(tensor: onnx.TensorProto) -> Array:
    """The values of a tensor.

    Raises:
        MalformedModelError: there are more or fewer of them than its shape says.
    """
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # whatever NumPy or onnx raise on the way
        raise MalformedModelError(
            f"tensor '{shortened(tensor.name)}': {shortened(error)}"
        ) from None


def _input_shape(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], int]:
    kind = value.type.tensor_type
    if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        known = onnx.TensorProto.DataType.values()
        code = kind.elem_type
        name = onnx.TensorProto.DataType.Name(code) if code in known else f"of unknown type {code}"
        raise UnsupportedModelError(
            f"input '{value.name}' is {name}; a float network takes FLOAT, which holds the real "
            "values of a sample in [0, 1]"
        )
    extents = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
    if len(extents) < 2 or min(extents[1:]) < 1:
        raise UnsupportedModelError(
            f"input '{value.name}' has shape {extents} (0: open); all but the batch, the first, "
            "must be fixed: export with a sample of the real size"
        )
    return (1, *extents[1:]), max(extents[0], 0)


def _needed(graph: onnx.GraphProto, output: str) -> tuple[Node, ...]:
    """The nodes that the output depends on."""
    wanted, found = {output}, list[Node]()
    names = Counter(proto.name for proto in graph.node)
    for proto in reversed(graph.node):
        if not wanted & set(proto.output):
            continue
        wanted |= set(proto.input)
        outputs = tuple(proto.output)
        attributes = {item.name: _attribute(item) for item in proto.attribute}
        if names[proto.name] > 1:
            proto.name = ""  # ONNX Runtime wants unique names as well
        name = proto.name or outputs[0]
        found.append(Node(proto.op_type, name, tuple(proto.input), outputs, attributes, proto))
    return tuple(reversed(found))


def _attribute(item: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(item)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        return _values(value)
    return tuple(value) if isinstance(value, list) else value


def fold(file: File, node: Node, constants: Mapping[str, Array]) -> list[Array]:
    """The outputs of a node all of whose inputs are constants.

    Raises:
        UnsupportedModelError: the node cannot be evaluated, or gives far more than it is given.
    """
    if node.kind not in _FOLDED:
        raise node.error("of constants only simple operators are evaluated", "export it folded")
    names = [name for name in dict.fromkeys(node.inputs) if name]
    graph = onnx.helper.make_graph(
        [node.proto],
        "constant",
        [onnx.helper.make_empty_tensor_value_info(name) for name in names],
        [onnx.helper.make_empty_tensor_value_info(name) for name in node.outputs if name],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=file.proto.opset_import, ir_version=file.proto.ir_version
    )
    try:
        _check_sizes(model, {name: constants[name] for name in names})
        values = ReferenceEvaluator(model).run(None, {name: constants[name] for name in names})
    except Exception as error:  # whatever the operator's reference raises
        raise node.error(f"its constants cannot be evaluated: {shortened(error)}") from None
    return [np.asarray(value) for value in values]


def _check_sizes(model: onnx.ModelProto, values: Mapping[str, Array]) -> None:
    """Raise ValueError where the outputs would be far larger than the inputs, or it is not known.

    A few bytes can ask for any amount of memory: a shape that is filled, a product of a row and a
    column.
    """
    known = onnx.ModelProto()
    known.CopyFrom(model)
    del known.graph.input[:]
    for name, value in values.items():
        if value.size <= 64:
            known.graph.initializer.append(numpy_helper.from_array(value, name))
        else:
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            known.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    inferred = onnx.shape_inference.infer_shapes(known, strict_mode=True, data_prop=True)
    most = max(_SMALL, _GROWTH * max((value.size for value in values.values()), default=0))
    for output in inferred.graph.output:
        dims = output.type.tensor_type.shape.dim
        extents = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]
        if min(extents, default=1) < 0 or math.prod(extents) > most:
            raise ValueError(f"its output {extents} is not known, or too large")
