"""Stock runtimes in a child process, so that a crash of theirs is a message and not ours.

The child reads requests from standard input and answers on standard output, both as length-prefixed
records: a line of JSON that tells the sizes, then raw bytes. Its program is ``served``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cactus_edge.errors import ToolError
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import Graph, Int64Array

Part = tuple[Graph, Int64Array]
Shipped = tuple[Graph, bytes]
TIMEOUT = 600.0
# By its path: with ``-m`` Python would import this package first, and with it Numba.
_PROGRAM = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_SERVED = str(Path(__file__).with_name("served.py"))


@dataclass(frozen=True, eq=False)
class Python:
    """What runs the child: this environment's Python, another's, or an emulator with one.

    ``environment`` is that of the process, this one's where it is None; an answer may take
    ``seconds``.
    """

    command: tuple[str, ...] = (sys.executable,)
    environment: Mapping[str, str] | None = None
    seconds: float = TIMEOUT


HERE = Python()


class Worker:
    """One runtime in one mode, as a function; each call has a process of its own."""

    def __init__(
        self, module: str, mode: str, shipped: Shipped | None = None, python: Python = HERE
    ) -> None:
        """Name the interpreter's module and the resolver (or ``micro``, or ``XNNPACK``).

        ``shipped`` are a graph and the bytes that it was read from: that graph is run from them.
        """
        self._module = module
        self._mode = mode
        self._shipped = shipped
        self._python = python

    def _bytes(self, graph: Graph) -> bytes:
        if self._shipped and graph is self._shipped[0] and _integer_edges(graph):
            return self._shipped[1]
        return core_bytes(graph)

    def run(self, parts: Sequence[Part]) -> list[Int64Array]:
        """Stored outputs of each (graph, stored inputs), int64 [n, ...], from one process.

        Raises:
            ToolError: the runtime refuses a model, fails, crashes or takes too long.
            UnsupportedModelError: a graph cannot be written to a file.
        """
        models = [self._bytes(graph) for graph, _ in parts]
        batches = [
            np.ascontiguousarray(batch, graph.tensors[graph.core_input].dtype.value)
            for graph, batch in parts
        ]
        head = {
            "module": self._module,
            "mode": self._mode,
            "models": [len(model) for model in models],
            "shapes": [batch.shape for batch in batches],
            "dtypes": [batch.dtype.name for batch in batches],
        }
        request = [json.dumps(head).encode(), b"\n", *models, *(b.tobytes() for b in batches)]
        try:
            done = subprocess.run(
                [*self._python.command, "-c", _PROGRAM, _SERVED],
                input=b"".join(request),
                capture_output=True,
                env=self._python.environment,
                timeout=self._python.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ToolError(
                f"{self._module}: no answer within {self._python.seconds:.0f} s"
            ) from None
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
            reason = lines[-1] if done.returncode > 0 else f"killed by signal {-done.returncode}"
            raise ToolError(f"{self._module} ({self._mode}): {reason}")
        line, _, raw = done.stdout.partition(b"\n")
        outputs: list[Int64Array] = []
        answer = json.loads(line)
        for shape, dtype in zip(answer["shapes"], answer["dtypes"], strict=True):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            outputs.append(np.frombuffer(raw[:size], dtype).reshape(shape).astype(np.int64))
            raw = raw[size:]
        return outputs


def _integer_edges(graph: Graph) -> bool:
    """Whether the file itself takes and returns the integers that are compared."""
    return (graph.input, graph.output) == (graph.core_input, graph.logits)


def core_bytes(graph: Graph) -> bytes:
    """A file of the integer core alone, whose output is the logits.

    Raises:
        UnsupportedModelError: the graph cannot be written.
    """
    return write_tflite(Graph(graph.tensors, graph.core, graph.core_input, graph.logits))
