"""Start and memory of one runtime, measured in a fresh process: this module run as a program.

The parent writes a line of JSON and the model's bytes to standard input; the answer is a line of
JSON on standard output, from which whatever the runtime prints is kept away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np

from cactus_edge.bench import machine
from cactus_edge.bench.peers import Model, Ours, peer_named
from cactus_edge.errors import CactusEdgeError, ToolError
from cactus_edge.flatbuffer import read_tflite

_TIMEOUT = 600.0
_SETTLING_CALLS = 20


@dataclass(frozen=True)
class Start:
    """From a model's bytes to its first result.

    Attributes:
        load_seconds: import of the runtime's modules, compilation or its cache, and the model.
        first_call_us: the first inference.
        memory_kib: memory that the process gained since before the load; None where the operating
            system does not tell.
        peak_kib: the most that the whole process had, Python and NumPy included.
    """

    load_seconds: float
    first_call_us: float
    memory_kib: int | None
    peak_kib: int | None


def start(
    name: str, model: Model, stored: bytes, threads: int, ours: Ours, *, compiled: bool = True
) -> Start:
    """Start ``cactus-edge`` (as ``ours`` says) or the peer of that name.

    Args:
        name: the runtime's.
        model: what it loads.
        stored: bytes of one stored image.
        threads: of the runtime.
        ours: profile, layout and calibration of our runtime.
        compiled: whether kernels that were compiled before may be read from Numba's cache.

    Raises:
        ToolError: the process failed.
    """
    calibration = b"" if ours.calibration is None else ours.calibration.tobytes()
    head = {
        "name": name,
        "threads": threads,
        "profile": ours.profile,
        "layout": ours.layout,
        "image": len(stored),
        "calibration": len(calibration),
    }
    with tempfile.TemporaryDirectory() as empty:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "cactus_edge.bench.child"],
                input=json.dumps(head).encode() + b"\n" + stored + calibration + model.content,
                capture_output=True,
                timeout=_TIMEOUT,
                check=False,
                env=None if compiled else {**os.environ, "NUMBA_CACHE_DIR": empty},
            )
        except subprocess.TimeoutExpired:
            raise ToolError(f"{name}: no answer within {_TIMEOUT:.0f} s") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
        reason = lines[-1] if done.returncode > 0 else f"killed by signal {-done.returncode}"
        raise ToolError(f"{name}: {reason}")
    return Start(**json.loads(done.stdout))


def serve(source: IO[bytes]) -> Start:
    """Answer one request."""
    head = json.loads(source.readline())
    stored, calibration = (source.read(head[name]) for name in ("image", "calibration"))
    content = source.read()
    graph = read_tflite(content)
    tensor = graph.tensors[graph.core_input]
    image = np.frombuffer(stored, tensor.dtype.value).reshape(tensor.shape)
    samples = np.frombuffer(calibration, tensor.dtype.value).reshape(-1, *tensor.shape[1:])
    own = Ours(head["profile"], head["layout"], calibration=samples if len(samples) else None)
    peer = own if head["name"] == own.name else peer_named(head["name"])
    before = machine.resident_kib()
    begin = time.perf_counter()
    loaded = peer.load(Model(graph, content), head["threads"])
    seconds = time.perf_counter() - begin
    prepared = loaded.prepare(image)
    begin = time.perf_counter()
    loaded.call(prepared)
    first = time.perf_counter() - begin
    for _ in range(_SETTLING_CALLS):
        loaded.call(prepared)
    after = machine.resident_kib()
    gained = None if before is None or after is None else after - before
    return Start(seconds, 1e6 * first, gained, machine.peak_kib())


def main() -> int:
    """The program; C libraries print to descriptor 1, so that the answer gets another one."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with answer:
        try:
            result = serve(sys.stdin.buffer)
        except CactusEdgeError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
        answer.write(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
