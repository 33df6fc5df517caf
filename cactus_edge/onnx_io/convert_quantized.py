"""A QDQ ONNX file to a ``.tflite`` file of the same integers, which ONNX Runtime has to confirm."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cactus_edge import files, flatbuffer, universal
from cactus_edge.constraints import validate
from cactus_edge.errors import MissingExtraError, UnsupportedModelError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array, Quantization
from cactus_edge.lowering.metadata import metadata_of
from cactus_edge.onnx_io.quantized import translate
from cactus_edge.onnx_io.reading import File, read

PROFILE = "litert-xnnpack-x86"
_SAMPLES = 128


class QuantizedReport(msgspec.Struct, frozen=True):
    """What was read.

    Attributes:
        profile: the one whose integers ONNX Runtime computes.
        elements: logits that were compared with ONNX Runtime, all equal.
        runtime: its version.
        universal: whether every profile computes the same.
        bytes: of the file.
        sha256: of the file.
    """

    profile: str
    elements: int
    runtime: str
    universal: bool
    bytes: int = 0
    sha256: str = ""


def import_quantized(content: bytes) -> tuple[Graph, QuantizedReport]:
    """The integer graph of a QDQ model.

    Raises:
        UnsupportedModelError: something is not known exactly, or ONNX Runtime computes other
            integers on random inputs, or cannot run the file.
    """
    file = read(content)
    graph = translate(file)
    provenance = {"onnx_sha256": hashlib.sha256(content).hexdigest()}
    graph = Graph(
        graph.tensors,
        graph.operators,
        graph.input,
        graph.output,
        metadata_of(graph, provenance, pixels=False),
    )
    validate(graph)
    shape, limits = graph.tensors[graph.input].shape[1:], graph.tensors[graph.input].dtype.range
    rng = np.random.default_rng(0)
    stored = rng.integers(limits[0], limits[1] + 1, (_SAMPLES, *shape))
    expected = execute(graph, stored, PROFILE).reshape(_SAMPLES, -1)
    version, found = _run(file, graph, stored)
    different = int((expected != found).sum())
    if different:
        raise UnsupportedModelError(
            f"ONNX Runtime {version} computes other integers than profile '{PROFILE}': "
            f"{different} of {found.size} logits differ on random inputs; nothing is claimed about "
            "this file on this machine"
        )
    return graph, QuantizedReport(PROFILE, found.size, version, universal.is_universal(graph))


def convert(source: Path, output: Path, *, force: bool = False) -> QuantizedReport:
    """Convert a QDQ ``.onnx`` file to a ``.tflite`` file.

    Args:
        source: the ONNX file.
        output: the file to write.
        force: replace ``output``.

    Raises:
        UsageError: a file that cannot be read, or an output that exists.
        UnsupportedModelError: see ``import_quantized``; nothing is written.
    """
    files.refuse_existing(output, force)
    graph, report = import_quantized(files.read(source, "ONNX file"))
    written = flatbuffer.save(graph, output, force)
    digest = hashlib.sha256(written).hexdigest()
    return msgspec.structs.replace(report, bytes=len(written), sha256=digest)


def _run(file: File, graph: Graph, stored: Int64Array) -> tuple[str, Int64Array]:
    """ONNX Runtime's version and its stored logits, int64 [n, classes]."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", "importing ONNX files") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Fused kernels for signed activations, and none that saturate for unsigned ones.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")
    source, target = (graph.tensors[i].quantization for i in (graph.input, graph.logits))
    assert source is not None
    assert target is not None
    values = _real(stored, source)
    values = values.transpose(0, 3, 1, 2) if values.ndim == 4 else values
    try:
        session: Any = onnxruntime.InferenceSession(
            file.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        batch = max(file.batch, 1)
        outputs = [
            session.run([file.output], {file.input: np.repeat(x[None], batch, axis=0)})[0][:1]
            for x in values
        ]
    except Exception as error:  # onnxruntime's classes of errors have no public root
        text = str(error).splitlines()[0][:300]
        raise UnsupportedModelError(
            f"ONNX Runtime cannot run the file with fused integer kernels: {text}; quantize "
            "activations as uint8"
        ) from None
    logits = np.concatenate(outputs).reshape(len(stored), -1)
    if logits.dtype == np.float32:
        logits = np.rint(logits / target.scale) + target.zero_point
    else:
        logits = logits.astype(np.int64) - 128 * (logits.dtype == np.uint8)
    return onnxruntime.__version__, logits.astype(np.int64)


def _real(stored: Int64Array, quantization: Quantization) -> np.ndarray[Any, np.dtype[np.float32]]:
    levels = (stored - quantization.zero_point).astype(np.float32)
    return levels * quantization.scale
