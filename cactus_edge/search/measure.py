"""Figures of candidates, all of the deployed file: its bytes are read back before anything else.

Accuracies are counts on the validation split, which is what choices may look at. Latencies are
medians of single images, one thread, the candidates taking turns: figures of different moments do
not compare, so they are measured together or not at all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from cactus_edge import inputs, universal
from cactus_edge.bench import timing
from cactus_edge.bench.timing import Contender
from cactus_edge.certify import Certifier
from cactus_edge.certify.sweep import sweep
from cactus_edge.datasets import Dataset, Images
from cactus_edge.errors import DoesNotFitError, RuntimesDisagreeError, UsageError, meant
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Graph, Linear
from cactus_edge.inputs import Perturbation
from cactus_edge.kernels.replay import SAMPLES
from cactus_edge.runtime import Session
from cactus_edge.search.report import Candidate, Firmware, Latency
from cactus_edge.train.checkpoint import Model
from cactus_edge.train.lower import Settings, lower
from firmware_sim import BOARDS, CPUS, Board, simulate
from firmware_sim.boards import board_of

_EMULATED = 8
_TIMED = 16
_SECONDS = 30.0
"""Of timing in all, roughly."""
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50


def board_named(device: str) -> Board | None:
    """The board that ``--device`` means: by its own name or its CPU's; None is this machine.

    Raises:
        UsageError: no such device.
    """
    if device == "host":
        return None
    if device in CPUS:
        return board_of(device, None)
    if device in BOARDS:
        return BOARDS[device]
    known = ("host", *CPUS, *BOARDS)
    raise UsageError(
        f"--device {device}: no such device{meant(device, known)} known: {', '.join(known)}"
    )


def deployed(model: Model, training: Dataset, settings: Settings) -> bytes:
    """The ``.tflite`` file that ``convert`` writes.

    Raises:
        UnsupportedModelError: see ``lower``.
        ToolError: see ``lower``.
    """
    return write_tflite(lower(model, training, settings).graph)


def candidate(
    content: bytes,
    data: Dataset,
    samples: int,
    perturbation: Perturbation,
    board: Board | None,
    progress: Callable[[int, int], None] | None = None,
) -> Candidate:
    """All figures but the latency.

    Args:
        content: of the file.
        data: the validation split.
        samples: the first of it that count.
        perturbation: what is certified.
        board: to emulate, or None.
        progress: called with (samples done, samples in all).

    Raises:
        UnsupportedModelError: the file cannot be read or certified.
        RuntimesDisagreeError: the emulated microcontroller computes other integers.
        MissingExtraError: a package of the extra ``sim`` is not installed.
    """
    graph = read_tflite(content)
    images, labels = data.images[:samples], data.labels[:samples]
    firmware, problem = _emulated(graph, images[:_EMULATED], board)
    curve = sweep(Certifier(graph), images, labels, [perturbation], progress=progress)
    weights = [op.weights.values for op in graph.core if isinstance(op, Linear)]
    return Candidate(
        sha256=hashlib.sha256(content).hexdigest(),
        file_bytes=len(content),
        universal=universal.is_universal(graph),
        weights=sum(values.size for values in weights),
        nonzero=sum(int(np.count_nonzero(values)) for values in weights),
        samples=curve.samples,
        correct=curve.correct,
        certified=curve.points[0].certified,
        firmware=firmware,
        problem=problem,
    )


def _emulated(graph: Graph, images: Images, board: Board | None) -> tuple[Firmware | None, str]:
    """What the board needs, or why it cannot hold the model."""
    if board is None:
        return None, ""
    stored = inputs.stored(graph, images)
    try:
        found = simulate(graph, stored, cpu=board.cpu, board=board)
    except DoesNotFitError as error:
        return None, str(error)
    if not np.array_equal(found.outputs, Session(graph).run(stored)):
        raise RuntimesDisagreeError(
            f"the emulated {board.name} computes other integers than the kernels; this is a defect"
        )
    firmware = Firmware(
        found.instructions.median, found.flash_bytes, found.ram_bytes, found.stack_bytes
    )
    return firmware, ""


def latencies(graphs: Sequence[Graph], training: Dataset, validation: Dataset) -> list[Latency]:
    """Of our kernels on this machine; layouts are chosen on training samples."""
    sessions: list[Session] = []
    contenders: list[Contender] = []
    once = 0.0
    for graph in graphs:
        session = Session(
            graph, threads=1, calibration=inputs.stored(graph, training.images[:SAMPLES])
        )
        native = graph.tensors[graph.core_input].dtype.value
        stored = inputs.stored(graph, validation.images[:_TIMED]).astype(native)
        images = [stored[i : i + 1] for i in range(len(stored))]
        session.run(images[0])
        begin = time.perf_counter()
        session.run(images[0])
        once += time.perf_counter() - begin
        sessions.append(session)
        contenders.append(Contender(session.run, images, session.run, stored))
    rounds = int(np.clip(_SECONDS / (timing.CALLS * once), _LEAST_ROUNDS, _MOST_ROUNDS))
    return [
        Latency(sum(session.program.sizes), samples.median, *samples.quartiles)
        for session, samples in zip(sessions, timing.warm(contenders, rounds), strict=True)
    ]
