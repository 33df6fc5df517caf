"""A generated model on this computer, as a program of its own: what it breaks is not the caller."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cactus_edge import DType, Graph, profiles
from cactus_edge.csource import CLayer, CSource, Layout, generate
from cactus_edge.errors import ToolError
from cactus_edge.execute import check_input
from firmware_sim import build

_MODEL_ERROR = 10  # c/host.c adds it to the error of the model

Stored = npt.NDArray[np.int8] | npt.NDArray[np.uint8]


@dataclass(frozen=True)
class HostRun:
    """``outputs`` [n, ...] in their stored type; ``layers`` the same by tensor index, if traced."""

    outputs: Stored
    layers: Mapping[int, Stored]


def stored_inputs(graph: Graph, inputs: npt.ArrayLike) -> Stored:
    """``inputs`` in the type that the device reads.

    Raises:
        DataError: not integers, another shape, or values outside the input's type.
    """
    unsigned = graph.tensors[graph.core_input].dtype is DType.UINT8
    checked = check_input(graph, inputs)
    return checked.astype(np.uint8) if unsigned else checked.astype(np.int8)


def as_tensor(graph: Graph, tensor: int, data: bytes) -> Stored:
    """Raw integers as [n, ...] of a tensor's type and shape."""
    kind = graph.tensors[tensor]
    shape = (-1, *kind.shape[1:])
    if kind.dtype is DType.UINT8:
        return np.frombuffer(data, np.uint8).reshape(shape)
    return np.frombuffer(data, np.int8).reshape(shape)


def split_trace(graph: Graph, layers: tuple[CLayer, ...], data: bytes) -> dict[int, Stored]:
    """The activations of all samples, by tensor, from all layers of each sample in turn."""
    table = np.frombuffer(data, np.uint8).reshape(-1, sum(layer.output_bytes for layer in layers))
    result: dict[int, Stored] = {}
    start = 0
    for layer in layers:
        part = table[:, start : start + layer.output_bytes]
        result[layer.output] = as_tensor(graph, layer.output, part.tobytes())
        start += layer.output_bytes
    return result


def run_host(
    graph: Graph,
    inputs: npt.ArrayLike,
    profile: str = profiles.DEFAULT,
    *,
    trace: bool = False,
    layout: Layout = Layout.AUTO,
    sanitize: bool = False,
) -> HostRun:
    """Generate, compile and run; the outputs equal ``execute`` bit by bit.

    Args:
        graph: resolved, or else resolved under ``profile``.
        inputs: stored integers [n, ...].
        profile: name of a rounding profile.
        trace: also return every activation.
        layout: of the weights, see ``cactus_edge.csource``.
        sanitize: stop at the first undefined behaviour (overflow, shifts, alignment).

    Raises:
        ToolError: the compiler or the program failed.
    """
    source = generate(graph, profile, layout=layout)
    return run_source(graph, source, inputs, trace=trace, sanitize=sanitize)


def run_source(
    graph: Graph,
    source: CSource,
    inputs: npt.ArrayLike,
    *,
    trace: bool = False,
    sanitize: bool = False,
) -> HostRun:
    """``run_host`` of C that was generated before, with the default prefix."""
    data = stored_inputs(graph, inputs)
    outputs, traced = run_program(source, data, trace=trace, sanitize=sanitize)
    layers = split_trace(graph, source.layers, traced) if trace else {}
    return HostRun(as_tensor(graph, graph.logits, outputs), layers)


def run_program(
    source: CSource,
    data: Stored,
    *,
    levels: npt.NDArray[np.int32] | None = None,
    trace: bool = False,
    sanitize: bool = False,
) -> tuple[bytes, bytes]:
    """What ``c/host.c`` writes about these inputs: outputs, or results with ``levels``; traces.

    Raises:
        ToolError: the compiler or the program failed, or the model reported an error.
    """
    with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
        folder = Path(name)
        program = build.host_program(source.files, folder, trace=trace, sanitize=sanitize)
        files = [folder / part for part in ("inputs.bin", "outputs.bin", "trace.bin")]
        files[0].write_bytes(data.tobytes())
        radii = []
        if levels is not None:
            radii = [folder / "levels.bin"]
            radii[0].write_bytes(levels.tobytes())
        result = subprocess.run([program, *files, *radii], capture_output=True, check=False)
        if result.returncode >= _MODEL_ERROR:
            error = result.returncode - _MODEL_ERROR
            raise ToolError(f"the generated C reported error {error}; see its header")
        if result.returncode:
            what = "undefined behaviour" if sanitize and result.returncode < 0 else "an error"
            raise ToolError(
                f"the generated C stopped with {what} (exit status {result.returncode}); "
                "this is a bug: please report it with the model"
            )
        outputs, traced = (path.read_bytes() for path in files[1:])
    return outputs, traced
