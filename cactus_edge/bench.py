"""The latency protocol: our runtime and its peers, interleaved in one process, medians.

Every contender computes the same images, one at a time, on one thread. They take turns in short
rounds, so that a slow phase of the machine meets all of them, and each round begins with calls that
are not counted. What is compared is the ratio of medians. Compilation, loading and throughput in
batches are measured apart. A peer that is not installed, or that cannot load the model, is listed
as absent with its reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cactus_edge import profiles
from cactus_edge.errors import CactusEdgeError, MissingExtraError, ToolError, UsageError
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import Graph
from cactus_edge.kernels.simd.tiers import choose
from cactus_edge.kernels.walk import walker
from cactus_edge.runtime import Session

Array = npt.NDArray[np.generic]
Call = Callable[[Array], Array]
"""One image [1, ...] as the model takes it to the model's output [1, ...]."""

_WARM_CALLS = 3
_CALLS = 20
_IMAGES = 16


class Peer(Protocol):
    """Another runtime."""

    @property
    def name(self) -> str:
        """As it is called in the report."""
        ...

    def load(self, model: bytes) -> Call:
        """Load a ``.tflite`` file on one thread.

        Raises:
            MissingExtraError: the runtime is not installed.
            ToolError: the runtime refuses the model.
        """
        ...


@dataclass(frozen=True)
class Latency:
    """Microseconds for one image; ``ratio`` is this median over that of our runtime.

    ``differing`` of ``compared`` output integers differ from ours; 0 compared where the output is
    not the integer logits. Runtimes round differently (see ``profiles``), so a few may.
    """

    name: str
    version: str
    median: float
    lower_quartile: float
    upper_quartile: float
    calls: int
    ratio: float
    differing: int = 0
    compared: int = 0


@dataclass(frozen=True)
class Absent:
    """A peer that was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """All figures of one model on one machine.

    ``compile_seconds`` is what the kernels took in this process, near 0 if they were ready before;
    ``load_seconds`` is validation and packing. ``latencies`` begin with our runtime.
    """

    machine: str
    python: str
    profile: str
    layout: str
    compile_seconds: float
    load_seconds: float
    batch: int
    threads: int
    images_per_second: float
    latencies: tuple[Latency, ...]
    absent: tuple[Absent, ...]


@dataclass(frozen=True)
class TFLitePeer:
    """A Python package with TensorFlow Lite's ``Interpreter``."""

    name: str
    package: str
    module: str

    def load(self, model: bytes) -> Call:
        """An interpreter on one thread, with the delegates that it chooses by itself."""
        module = _import(self.module, self.package, self.name)
        try:
            interpreter = module.Interpreter(model_content=model, num_threads=1)
            interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ToolError(f"{self.name} cannot load the model: {error}") from None
        source = interpreter.get_input_details()[0]["index"]
        target = interpreter.get_output_details()[0]["index"]

        def call(image: Array) -> Array:
            interpreter.set_tensor(source, image)
            interpreter.invoke()
            return interpreter.get_tensor(target)

        return call


@dataclass(frozen=True)
class ONNXPeer:
    """ONNX Runtime on an ONNX file of the same network, which the caller provides."""

    model: bytes
    name: str = "onnxruntime"
    package: str = "onnxruntime"

    def load(self, model: bytes) -> Call:
        """A session on one thread; ``model`` is not used, since it is no ONNX file."""
        module = _import("onnxruntime", self.package, self.name, extra="onnx")
        options = module.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            session = module.InferenceSession(
                self.model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's classes of errors have no public root
            raise ToolError(f"{self.name} cannot load the model: {error}") from None
        source = session.get_inputs()[0]
        dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}.get(source.type, np.int8)
        shape = [extent if isinstance(extent, int) else 1 for extent in source.shape]

        def call(image: Array) -> Array:
            channels_first = image.ndim == 4 and list(image.shape) != shape
            moved = np.moveaxis(image, 3, 1) if channels_first else image
            return session.run(None, {source.name: moved.reshape(shape).astype(dtype)})[0]

        return call


TFLITE_PEERS: tuple[Peer, ...] = (
    TFLitePeer("LiteRT", "ai-edge-litert", "ai_edge_litert.interpreter"),
    TFLitePeer("tflite-runtime", "tflite-runtime", "tflite_runtime.interpreter"),
)


def benchmark(
    graph: Graph,
    *,
    model: bytes | None = None,
    profile: str = profiles.DEFAULT,
    layout: str = "auto",
    peers: Sequence[Peer] = TFLITE_PEERS,
    rounds: int = 50,
    batch: int = 1024,
    threads: int | None = None,
) -> Benchmark:
    """Measure a model.

    Args:
        graph: as it was read or built.
        model: the ``.tflite`` file for the peers; written from ``graph`` if None.
        profile: rounding profile of our runtime.
        layout: of our weights, see ``Session``.
        peers: other runtimes; an ``ONNXPeer`` brings its own file.
        rounds: turns that each contender takes, of ``_CALLS`` calls each.
        batch: images of the throughput measurement.
        threads: of the throughput measurement; as many as the process may use if None.

    Raises:
        InvalidGraphError: the graph breaks a constraint.
        UsageError: an unknown profile or layout, or less than one round or image.
    """
    if min(rounds, batch) < 1:
        raise UsageError(f"{rounds} rounds of batch {batch}: both must be at least 1")
    begin = time.perf_counter()
    walker(choose())
    ready = time.perf_counter()
    session = Session(graph, profile, layout=layout, threads=threads)
    loaded = time.perf_counter()
    stored = _stored_images(session.graph, batch)
    images = [stored[i % batch : i % batch + 1] for i in range(_IMAGES)]
    contenders = [_Contender("cactus-edge", _version("cactus-edge"), session.run, images)]
    absent: list[Absent] = []
    for peer in peers:
        try:
            call = peer.load(_model(graph, model))
        except CactusEdgeError as error:
            absent.append(Absent(peer.name, str(error)))
        else:
            version = _version(getattr(peer, "package", peer.name))
            contenders.append(_Contender(peer.name, version, call, _as_taken(graph, images)))
    samples = _interleave(contenders, rounds)
    return Benchmark(
        machine=machine_name(),
        python=platform.python_version(),
        profile=profile,
        layout=layout,
        compile_seconds=ready - begin,
        load_seconds=loaded - ready,
        batch=batch,
        threads=session.threads,
        images_per_second=batch / _batch_seconds(session, stored),
        latencies=_latencies(contenders, samples),
        absent=tuple(absent),
    )


def machine_name() -> str:
    """The CPU's name from /proc/cpuinfo, or what Python knows of the machine."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for key in ("model name", "Model", "Hardware"):
        for line in text.splitlines():
            name, separator, value = line.partition(":")
            if separator and name.strip() == key and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class _Contender:
    name: str
    version: str
    call: Call
    images: list[Array]

    def outputs(self) -> Array:
        """What it computes from all images."""
        return np.concatenate([self.call(image) for image in self.images])


def _model(graph: Graph, model: bytes | None) -> bytes:
    return write_tflite(graph) if model is None else model


def _stored_images(graph: Graph, count: int) -> Array:
    """Uniform stored integers, always the same ones."""
    tensor = graph.tensors[graph.core_input]
    lower, upper = tensor.dtype.range
    values = np.random.default_rng(0).integers(lower, upper + 1, (count, *tensor.shape[1:]))
    return values.astype(tensor.dtype.value)


def _as_taken(graph: Graph, images: Sequence[Array]) -> list[Array]:
    """Stored images as the whole model takes them: real where it begins with a QUANTIZE."""
    if graph.input == graph.core_input:
        return list(images)
    tensor = graph.tensors[graph.core_input]
    assert tensor.quantization is not None, "validated: QUANTIZE needs a scale"
    scale, zero_point = tensor.quantization.scale, tensor.zero_point
    return [((image.astype(np.int32) - zero_point) * scale).astype(np.float32) for image in images]


def _interleave(contenders: Sequence[_Contender], rounds: int) -> list[npt.NDArray[np.int64]]:
    """Nanoseconds of each counted call, for each contender."""
    samples = [np.empty((rounds, _CALLS), np.int64) for _ in contenders]
    for turn in range(rounds):
        for contender, taken in zip(contenders, samples, strict=True):
            call = contender.call
            for image in contender.images[:_WARM_CALLS]:
                call(image)
            for i in range(_CALLS):
                image = contender.images[i % _IMAGES]
                begin = time.perf_counter_ns()
                call(image)
                taken[turn, i] = time.perf_counter_ns() - begin
    return [taken.reshape(-1) for taken in samples]


def _latencies(
    contenders: Sequence[_Contender], samples: Sequence[npt.NDArray[np.int64]]
) -> tuple[Latency, ...]:
    own = np.median(samples[0])
    expected = contenders[0].outputs()
    rows: list[Latency] = []
    for contender, taken in zip(contenders, samples, strict=True):
        lower, median, upper = np.percentile(taken, (25, 50, 75)) / 1000
        output = contender.outputs()
        same_kind = output.dtype == expected.dtype and output.shape == expected.shape
        rows.append(
            Latency(
                name=contender.name,
                version=contender.version,
                median=float(median),
                lower_quartile=float(lower),
                upper_quartile=float(upper),
                calls=taken.size,
                ratio=float(np.median(taken) / own),
                differing=int((output != expected).sum()) if same_kind else 0,
                compared=output.size if same_kind else 0,
            )
        )
    return tuple(rows)


def _batch_seconds(session: Session, stored: Array, runs: int = 7) -> float:
    """Median over a few runs of the whole batch, the first one not counted."""
    session.run(stored)
    taken: list[float] = []
    for _ in range(runs):
        begin = time.perf_counter()
        session.run(stored)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def _import(module: str, package: str, purpose: str, extra: str = "runtimes") -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(package, extra, f"timing {purpose}") from None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
