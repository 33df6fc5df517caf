"""Runtimes behind one interface: load a model on some threads, run one image or a batch.

    cactus-edge      our own
    litert-xnnpack   LiteRT as it comes, which hands int8 layers to XNNPACK
    litert-builtin   LiteRT without that
    tflite-runtime   the last release of TensorFlow Lite's own package, as it comes
    onnxruntime      the same integers as an ONNX model, see ``onnx_io.qdq``
    torch-ENGINE     the same integers in torch's quantized operators, see ``torch_model``

A peer that is not installed, or that refuses the model, is reported with its reason. Conversion of
images and results happens outside of what is timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cactus_edge import profiles
from cactus_edge.errors import InvalidGraphError, MissingExtraError, ToolError, UsageError, meant
from cactus_edge.flatbuffer.wire import serialize
from cactus_edge.flatbuffer.writer import model_values
from cactus_edge.graph import Graph

Array = npt.NDArray[np.generic]
Call = Callable[[Array], Array]

PIECE = 128
"""Images that a peer computes at once when it is given a batch; fewer made all of them slower."""


@dataclass(frozen=True, eq=False)
class Model:
    """A graph and the ``.tflite`` file that holds it."""

    graph: Graph
    content: bytes


@dataclass(frozen=True)
class Loaded:
    """A runtime that holds a model.

    Attributes:
        prepare: stored images [n, ...] to what ``call`` and ``batch`` take.
        call: one prepared image to the output.
        batch: prepared images to the outputs, on all threads.
        finish: an output to stored logits [n, classes], or None where the model's own output is
            something else (probabilities, real numbers).
    """

    prepare: Call
    call: Call
    batch: Call
    finish: Call | None


class Peer(Protocol):
    """Another runtime."""

    @property
    def name(self) -> str:
        """As it is called in results."""
        ...

    @property
    def package(self) -> str:
        """What pip installs."""
        ...

    def load(self, model: Model, threads: int) -> Loaded:
        """Load a model.

        Raises:
            MissingExtraError: the runtime is not installed.
            ToolError: the runtime refuses the model.
            UnsupportedModelError: the model cannot be said in the runtime's form.
        """
        ...


@dataclass(frozen=True)
class Ours:
    """Our runtime; ``calibration`` are samples for ``Session``."""

    profile: str = profiles.DEFAULT
    layout: str = "auto"
    name: str = "cactus-edge"
    package: str = "cactus-edge"
    calibration: Array | None = field(default=None, compare=False)

    def load(self, model: Model, threads: int) -> Loaded:
        """A session."""
        from cactus_edge.runtime import Session  # its import is part of what a start takes

        session = Session(
            model.graph,
            self.profile,
            layout=self.layout,
            threads=threads,
            calibration=self.calibration,
        )
        return Loaded(_same, session.run, session.run, _same)


@dataclass(frozen=True)
class TFLitePeer:
    """A Python package with TensorFlow Lite's ``Interpreter``."""

    name: str
    package: str
    module: str
    resolver: str = "AUTO"

    def load(self, model: Model, threads: int) -> Loaded:
        """Interpreters with the delegates that the resolver chooses."""
        module = import_peer(self.module, self.package, self.name)
        graph = model.graph
        single = self._interpreter(module, model.content, threads)
        pieces: list[Call] = []  # made when it is needed: not everybody wants a batch

        def batch(images: Array) -> Array:
            if not pieces:
                pieces.append(self._interpreter(module, batched_file(graph, PIECE), threads))
            return run_in_pieces(pieces[0], images)

        finish = _same if graph.output == graph.logits else None
        return Loaded(lambda stored: as_taken(graph, stored), single, batch, finish)

    def _interpreter(self, module: ModuleType, content: bytes, threads: int) -> Call:
        try:
            interpreter = module.Interpreter(
                model_content=content,
                num_threads=threads,
                experimental_op_resolver_type=getattr(module.OpResolverType, self.resolver),
            )
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
    """ONNX Runtime, on the model that ``onnx_io.qdq`` makes of the graph."""

    name: str = "onnxruntime"
    package: str = "onnxruntime"

    def load(self, model: Model, threads: int) -> Loaded:
        """A session with all optimizations."""
        import_peer("onnx", "onnx", self.name, extra="onnx")
        module = import_peer("onnxruntime", self.package, self.name, extra="onnx")
        from cactus_edge.onnx_io import qdq

        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Without it, CPUs that have no VNNI add products with saturation: other integers.
        options.add_session_config_entry("session.x64quantprecision", "1")
        content = qdq.convert(model.graph)
        try:
            session = module.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes of errors have no public root
            raise ToolError(f"{self.name} cannot load the model: {error}") from None
        source, target, graph = qdq.INPUT, [qdq.OUTPUT], model.graph

        def call(images: Array) -> Array:
            return session.run(target, {source: images})[0]

        return Loaded(
            lambda stored: qdq.prepare(graph, stored),
            call,
            lambda images: run_in_pieces(call, images),
            lambda output: qdq.finish(graph, output),
        )


@dataclass(frozen=True)
class TorchPeer:
    """Torch's quantized operators with one of its engines."""

    engine: str
    package: str = "torch"

    @property
    def name(self) -> str:
        """With the engine."""
        return f"torch-{self.engine}"

    def load(self, model: Model, threads: int) -> Loaded:
        """Packed layers."""
        torch = import_peer("torch", self.package, self.name, extra="train")
        if self.engine not in torch.backends.quantized.supported_engines:
            raise ToolError(f"{self.name}: this build of torch has no engine '{self.engine}'")
        from cactus_edge.bench import torch_model

        def network() -> torch_model.Network:
            return torch_model.Network(torch, model.graph, self.engine, threads)

        # Layers adapt themselves to the first shape that they see, and are slow on others.
        single, several = network(), network()
        return Loaded(
            single.prepare,
            single.run,
            lambda images: run_in_pieces(several.run, images),
            single.finish,
        )


def all_peers() -> tuple[Peer, ...]:
    """Every runtime that this machine might have."""
    litert = ("ai-edge-litert", "ai_edge_litert.interpreter")
    arm = platform.machine() in ("aarch64", "arm64")
    return (
        TFLitePeer("litert-xnnpack", *litert),
        TFLitePeer("litert-builtin", *litert, "BUILTIN_WITHOUT_DEFAULT_DELEGATES"),
        TFLitePeer("tflite-runtime", "tflite-runtime", "tflite_runtime.interpreter"),
        ONNXPeer(),
        TorchPeer("onednn"),
        TorchPeer("qnnpack" if arm else "x86"),
    )


def usual_profile(graph: Graph) -> str:
    """The rounding of ``litert-xnnpack``, the fastest peer; our default where that is not covered.

    A universal model computes the same integers under every profile.
    """
    cpu = "arm" if platform.machine() in ("aarch64", "arm64") else "x86"
    name = f"litert-xnnpack-{cpu}"
    try:
        profiles.resolve(graph, name)
    except InvalidGraphError:
        return profiles.DEFAULT
    return name


def peer_named(name: str) -> Peer:
    """One of ``all_peers``.

    Raises:
        UsageError: there is no such peer.
    """
    known = {peer.name: peer for peer in all_peers()}
    if name not in known:
        raise UsageError(f"no peer '{name}'{meant(name, known)} known: {', '.join(known)}")
    return known[name]


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def import_peer(module: str, package: str, purpose: str, extra: str = "runtimes") -> ModuleType:
    """A package that need not be installed.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(package, extra, f"timing {purpose}") from None


def batched_file(graph: Graph, images: int) -> bytes:
    """A ``.tflite`` of the same layers for several images at once.

    Interpreters could resize the input, but not the shapes that RESHAPE holds.
    """
    tensors = tuple(replace(t, shape=(images * t.shape[0], *t.shape[1:])) for t in graph.tensors)
    return serialize(model_values(replace(graph, tensors=tensors)))


def run_in_pieces(call: Call, images: Array) -> Array:
    """All of ``images``, ``PIECE`` at a time; their number is a multiple of that."""
    return np.concatenate([call(images[i : i + PIECE]) for i in range(0, len(images), PIECE)])


def as_taken(graph: Graph, stored: Array) -> Array:
    """Stored images as the whole model takes them: real where it begins with a QUANTIZE."""
    if graph.input == graph.core_input:
        return stored
    tensor = graph.tensors[graph.core_input]
    assert tensor.quantization is not None, "validated: QUANTIZE needs a scale"
    scale, zero_point = tensor.quantization.scale, tensor.zero_point
    return ((stored.astype(np.int32) - zero_point) * scale).astype(np.float32)


def _same(values: Array) -> Array:
    return values
