"""Our models as ONNX files, and what ONNX Runtime makes of them, counted."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec
import numpy as np

from cactus_edge import profiles, universal
from cactus_edge.errors import DataError, MissingExtraError, ToolError, UnsupportedModelError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import Perturbation
from cactus_edge.onnx_io import qdq, real_form
from cactus_edge.vnnlib.writing import robustness

_RANDOM = 64


class ExportReport(msgspec.Struct, frozen=True):
    """A QDQ file in ONNX Runtime, with its default options, on this machine.

    Attributes:
        runtime: its version.
        universal: whether all profiles compute the same.
        samples: stored inputs that were compared, the data given and random ones.
        elements: logits that were compared.
        differences: how many of them differ from our integers, by profile that covers the model.
        largest: by how many levels at most, under the profile that is closest.
        decisions_differ: samples on which the decision differs, under that profile.
    """

    runtime: str
    universal: bool
    samples: int
    elements: int
    differences: dict[str, int]
    largest: int
    decisions_differ: int


def to_qdq(graph: Graph, *, signed: bool = True) -> bytes:
    """A QDQ model; see ``qdq``.

    Raises:
        UnsupportedModelError: an operator has no form in ONNX.
    """
    try:
        return qdq.convert(graph, signed=signed)
    except ToolError as error:
        raise UnsupportedModelError(f"{error}; it cannot be exported") from None


def compare(
    graph: Graph, content: bytes, stored: Int64Array, *, signed: bool = True
) -> ExportReport:
    """Run a QDQ file and count where it differs from our integers.

    Args:
        graph: the model.
        content: what ``to_qdq`` made of it.
        stored: inputs, int64 [n, ...]; random ones are added.
        signed: as for ``to_qdq``.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ToolError: it cannot run the file.
    """
    shape = graph.tensors[graph.core_input].shape[1:]
    least, greatest = graph.tensors[graph.core_input].dtype.range
    noise = np.random.default_rng(0).integers(least, greatest + 1, (_RANDOM, *shape))
    inputs = np.concatenate([stored.reshape(-1, *shape), noise])
    version, found = _run(graph, content, inputs, signed)
    outside = profiles.uncovered(graph)
    differences: dict[str, int] = {}
    closest: Int64Array | None = None
    is_universal, known = universal.is_universal(graph), dict[str, Int64Array]()
    for name in profiles.PROFILES:
        if name in outside:
            continue
        if not is_universal or not known:
            known[name] = execute(graph, inputs, name).reshape(found.shape)
        expected = known.get(name, next(iter(known.values())))
        differences[name] = int((expected != found).sum())
        if closest is None or differences[name] == min(differences.values()):
            closest = expected
    assert closest is not None
    decisions = closest.argmax(axis=1) != found.argmax(axis=1)
    return ExportReport(
        runtime=version,
        universal=is_universal,
        samples=len(inputs),
        elements=found.size,
        differences=differences,
        largest=int(np.abs(closest - found).max()),
        decisions_differ=int(decisions.sum()),
    )


def _run(graph: Graph, content: bytes, inputs: Int64Array, signed: bool) -> tuple[str, Int64Array]:
    """The runtime's version, and stored logits int64 [n, classes]."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", "comparing ONNX files") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    try:
        session: Any = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        prepared = qdq.prepare(graph, inputs, signed=signed)
        outputs = [
            session.run([qdq.OUTPUT], {qdq.INPUT: prepared[i : i + 1]})[0]
            for i in range(len(prepared))
        ]
    except Exception as error:  # onnxruntime's classes of errors have no public root
        raise ToolError(f"onnxruntime cannot run the exported file: {error}") from None
    finished = qdq.finish(graph, np.concatenate(outputs), signed=signed)
    return onnxruntime.__version__, finished.reshape(len(inputs), -1).astype(np.int64)


def to_real(graph: Graph) -> bytes:
    """The dequantized float network; see ``real_form``.

    Raises:
        UnsupportedModelError: an operator has no form in ONNX.
    """
    try:
        return real_form.convert_real(graph)
    except ToolError as error:
        raise UnsupportedModelError(f"{error}; it cannot be exported") from None


def query(
    graph: Graph,
    image: np.ndarray[Any, np.dtype[Any]],
    label: int,
    perturbation: Perturbation,
    remark: str,
) -> str:
    """The VNN-LIB query that goes with ``to_real``: X in the order of its input, channels first.

    Args:
        graph: the model.
        image: one sample, uint8 or float in [0, 1].
        label: its class.
        perturbation: one radius on real inputs; the box is clipped to [0, 1].
        remark: see ``robustness``.

    Raises:
        DataError: the sample is not what the model takes, or the label is no class.
    """
    shape, classes = graph.tensors[graph.core_input].shape[1:], graph.tensors[graph.logits].size
    if image.size != int(np.prod(shape)):
        raise DataError(f"a sample of {list(image.shape)}, the model takes {list(shape)}")
    if not 0 <= label < classes:
        raise DataError(f"label {label}, the model has {classes} classes")
    ordered = image.reshape(shape)
    ordered = ordered.transpose(2, 0, 1) if ordered.ndim == 3 else ordered
    unit = Fraction(1, 255) if image.dtype == np.uint8 else Fraction(1)
    centre = [Fraction(value) * unit for value in ordered.ravel().tolist()]
    lower = [max(value - perturbation.radius, Fraction(0)) for value in centre]
    upper = [min(value + perturbation.radius, Fraction(1)) for value in centre]
    return robustness(lower, upper, label, classes, remark)
