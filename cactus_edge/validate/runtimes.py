"""Every runtime that can execute a model, behind one interface, with the profile it follows.

Stock runtimes run in a child process: one that crashes is reported, and nothing else is lost.
Which profile a runtime follows depends on package, mode and processor; the table is the measured
one of ``profiles``, and the tests repeat the measurement.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np

from cactus_edge import profiles
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph, Int64Array, Stored
from cactus_edge.runtime import Session
from cactus_edge.validate import onnx_runtime
from cactus_edge.validate.child import HERE, Part, Python, Shipped, Worker


@dataclass(frozen=True)
class Peer:
    """A runtime in one mode.

    ``package`` is what pip installs and ``module`` what is imported; ``extra`` brings it. Our own
    executors follow every profile and are compared under ``profile``. A runtime outside this
    environment has a ``python`` that runs it, and is of version ``installed``.
    """

    name: str
    package: str
    module: str
    extra: str
    mode: str
    profile: str
    python: Python = HERE
    installed: str = ""

    @property
    def version(self) -> str:
        """The installed version; empty when it is not installed."""
        if self.installed or not self.package:
            return self.installed or "own"
        try:
            return metadata.version(self.package) if self._importable() else ""
        except metadata.PackageNotFoundError:
            return ""

    @property
    def is_emulated(self) -> bool:
        """Whether every instruction is emulated."""
        return self.mode == "cortex-m4"

    @property
    def absence(self) -> str:
        """Why it cannot run, or an empty string."""
        if self.version:
            return ""
        return f"not installed; run: pip install 'cactus-edge[{self.extra}]'"

    def _importable(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


def _machine() -> str:
    return "arm" if platform.machine() in ("aarch64", "arm64") else "x86"


def peers(profile: str = profiles.DEFAULT) -> tuple[Peer, ...]:
    """Every known runtime on this machine; own executors under ``profile``."""
    cpu = _machine()
    old, new = "tflite_runtime.interpreter", "ai_edge_litert.interpreter"
    tflite = ("tflite-runtime", old, "runtimes")
    litert = ("ai-edge-litert", new, "runtimes")
    return (
        Peer("reference", "", "", "", "reference", profile),
        Peer("numba", "", "", "", "session", profile),
        Peer("host C", "ziglang", "ziglang", "sim", "host", profile),
        Peer("Cortex-M4", "unicorn", "unicorn", "sim", "cortex-m4", profile),
        Peer("tflite reference", *tflite, "BUILTIN_REF", "tflite-reference"),
        Peer("tflite optimized", *tflite, "BUILTIN_WITHOUT_DEFAULT_DELEGATES", f"tflite-{cpu}"),
        Peer("tflite default", *tflite, "AUTO", f"tflite-{cpu}"),
        Peer("tflite XNNPACK", *tflite, "XNNPACK", f"tflite-xnnpack-{cpu}"),
        Peer("LiteRT reference", *litert, "BUILTIN_REF", "litert-reference"),
        Peer("LiteRT optimized", *litert, "BUILTIN_WITHOUT_DEFAULT_DELEGATES", f"litert-{cpu}"),
        Peer("LiteRT default", *litert, "AUTO", f"litert-xnnpack-{cpu}"),
        Peer(
            "TFLite Micro",
            "tflite-micro",
            "tflite_micro.python.tflite_micro.runtime",
            "runtimes",
            "micro",
            "tflite-micro",
        ),
    )


def onnx_peer() -> Peer:
    """ONNX Runtime on the QDQ form of a model; see ``onnx_runtime``."""
    profile = f"litert-xnnpack-{_machine()}"
    return Peer("ONNX Runtime", "onnxruntime", "onnxruntime", "onnx", onnx_runtime.MODE, profile)


def runner(
    peer: Peer, shipped: Shipped | None = None
) -> Callable[[Sequence[Part]], list[Int64Array]]:
    """A function from (graph, stored inputs [n, ...]) pairs to stored outputs, int64 [n, ...] each.

    The function raises ToolError when the runtime refuses a model, fails, or crashes.
    """
    if peer.mode == onnx_runtime.MODE:
        return onnx_runtime.OnnxWorker().run
    if peer.mode not in _OWN:
        return Worker(peer.module, peer.mode, shipped, peer.python).run
    own = _OWN[peer.mode]
    return lambda parts: [
        own(graph, batch, peer.profile).astype(np.int64) for graph, batch in parts
    ]


def layers_at_once(peer: Peer) -> Callable[[Graph, Int64Array], list[Int64Array]] | None:
    """A function from a graph and stored inputs to the outputs of all operators, from one run.

    None for runtimes that show nothing but a model's output.
    """
    if peer.mode not in _LAYERS:
        return None
    traced = _LAYERS[peer.mode]

    def layers(graph: Graph, batch: Int64Array) -> list[Int64Array]:
        found = traced(graph, batch, peer.profile)
        return [found[op.output].astype(np.int64) for op in graph.core]

    return layers


def _session(graph: Graph, batch: Int64Array, profile: str) -> Stored:
    return Session(graph, profile).run(batch)


def _host(graph: Graph, batch: Int64Array, profile: str) -> Stored:
    from firmware_sim import run_host

    return run_host(graph, batch, profile).outputs


def _emulated(graph: Graph, batch: Int64Array, profile: str) -> Stored:
    from firmware_sim import simulate

    return simulate(graph, batch, profile=profile, cpu="cortex-m4").outputs


def _traced_host(graph: Graph, batch: Int64Array, profile: str) -> Mapping[int, Stored]:
    from firmware_sim import run_host

    return run_host(graph, batch, profile, trace=True).layers


def _traced_emulation(graph: Graph, batch: Int64Array, profile: str) -> Mapping[int, Stored]:
    from firmware_sim import simulate

    return simulate(graph, batch, profile=profile, cpu="cortex-m4", trace=True).layers


_OWN: dict[str, Callable[[Graph, Int64Array, str], Stored]] = {
    "reference": execute,
    "session": _session,
    "host": _host,
    "cortex-m4": _emulated,
}
_LAYERS: dict[str, Callable[[Graph, Int64Array, str], Mapping[int, Stored]]] = {
    "reference": execute_all,
    "host": _traced_host,
    "cortex-m4": _traced_emulation,
}
