"""``<prefix>_predict_certified`` on this computer and on an emulated board."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cactus_edge import DType, Graph
from cactus_edge.csource import CSource
from cactus_edge.errors import ToolError
from firmware_sim import build
from firmware_sim.boards import Board
from firmware_sim.emulator import BlockCounter, Machine
from firmware_sim.host import run_program, stored_inputs
from firmware_sim.image import read_image

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Verdicts:
    """Fields of the C struct, one row for each input; ``instructions`` on a board alone.

    ``labels`` int64 [n], ``certified`` bool [n]; ``margins``, ``leads``, ``logits``, ``lower`` and
    ``upper`` int64 [n, classes], see the header.
    """

    labels: _Int64
    certified: npt.NDArray[np.bool_]
    margins: _Int64
    leads: _Int64
    logits: _Int64
    lower: _Int64
    upper: _Int64
    instructions: tuple[int, ...] = ()


def result_type(graph: Graph) -> np.dtype[np.void]:
    """The C struct, laid out as every ABI does that aligns int64_t to 8 bytes."""
    logits = graph.tensors[graph.logits]
    classes, stored = (logits.size,), np.uint8 if logits.dtype is DType.UINT8 else np.int8
    fields = [
        ("margins", np.int64, classes),
        ("leads", np.int32, classes),
        ("label", np.int32),
        ("certified", np.int32),
        *((name, stored, classes) for name in ("logits", "lower", "upper")),
    ]
    return np.dtype(fields, align=True)


def certify_host(
    graph: Graph,
    source: CSource,
    inputs: npt.ArrayLike,
    levels: npt.ArrayLike,
    *,
    sanitize: bool = False,
) -> Verdicts:
    """On this computer; ``source`` was generated with ``certified`` and the default prefix.

    ``levels``: one radius, or one for each input.

    Raises:
        ToolError: the compiler or the program failed, or the model reported an error.
    """
    data = stored_inputs(graph, inputs)
    radii = np.broadcast_to(np.asarray(levels, np.int32), len(data))
    outputs, _ = run_program(source, data, levels=radii, sanitize=sanitize)
    return verdicts(graph, outputs)


def certify_board(
    graph: Graph, source: CSource, inputs: npt.ArrayLike, levels: npt.ArrayLike, board: Board
) -> Verdicts:
    """On an emulated board, with the exact number of instructions for each input.

    Raises:
        DoesNotFitError: the board is too small.
        ToolError: the compiler or the emulator failed, or the model reported an error.
    """
    data = stored_inputs(graph, inputs)
    size = result_type(graph).itemsize
    with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
        folder = Path(name)
        image = read_image(build.firmware(source.files, folder, board))
        machine = Machine(board, image, layers=source.layers)
        counter = BlockCounter(image, board, folder)
        counter.attach(machine.engine)
        results: list[bytes] = []
        counts: list[int] = []
        radii = np.broadcast_to(np.asarray(levels, np.int32), len(data))
        for sample, radius in zip(data, radii.tolist(), strict=True):
            given, result = image.address("input_buffer"), image.address("output_buffer")
            machine.engine.mem_write(given, sample.tobytes())
            status = machine.call("cactus_edge_predict_certified", given, radius, result)
            if status:
                raise ToolError(f"the model reported error {status}; see its header")
            results.append(bytes(machine.engine.mem_read(result, size)))
            counts.append(counter.take())
        machine.stack_bytes()
    return verdicts(graph, b"".join(results), tuple(counts))


def verdicts(graph: Graph, data: bytes, instructions: tuple[int, ...] = ()) -> Verdicts:
    """From C structs, one behind the other."""
    table = np.frombuffer(data, result_type(graph))
    names = ("margins", "leads", "logits", "lower", "upper")
    return Verdicts(
        table["label"].astype(np.int64),
        table["certified"] == 1,
        *(table[name].astype(np.int64) for name in names),
        instructions,
    )
