"""The faster layout of each linear layer, measured on this machine when a model is loaded.

Every candidate of a layer runs as a step by itself, some microseconds long. What was chosen is kept
beside the compiled kernels, under a digest of the graph, the tier, the CPU, the sources and the
samples that were given, so that the next load measures nothing. A choice never changes what is
computed.

How long a kernel takes that skips inputs at the zero point depends on the inputs; it is a candidate
only where there are samples to time it on.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cactus_edge import files
from cactus_edge.errors import CactusEdgeError
from cactus_edge.graph import DepthwiseConv2D, Graph, Linear
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.program import Program, build
from cactus_edge.kernels.replay import Replay, median_seconds
from cactus_edge.kernels.simd.tiers import Tier, features
from cactus_edge.kernels.steps import SKIPPING
from cactus_edge.kernels.walk import DIGEST, Frame, cache_folder

_log = logging.getLogger(__name__)

_LEAST_ZEROS = 0.3
"""Layers with a smaller share of zeros are dense without a measurement."""
_TURNS = 7
_ENOUGH = 300e-6
"""Seconds of one measurement, where a single run takes less."""
_LEAST_GAIN = 0.05
"""Share of a layer's time that skipping has to save: other inputs may be less dead."""
_ALIVE = 255
"""A byte that no kernel skips."""

Layouts = dict[int, Layout]
"""By position in the graph's core."""


def fastest(
    graph: Graph,
    wanted: Sequence[int],
    block: int,
    tier: Tier,
    images: npt.NDArray[np.uint8] | None = None,
) -> Layouts:
    """The fastest layout of every CONV_2D and FULLY_CONNECTED of a resolved graph.

    Args:
        graph: resolved and validated.
        wanted: tensors whose values are results.
        block: images that are computed together.
        tier: of the kernels.
        images: uint8 [samples, bytes of an image], samples of what single images hold; None where
            there are none.
    """
    layers = {
        number: 1 - np.count_nonzero(op.weights.values) / op.weights.values.size
        for number, op in enumerate(graph.core)
        if isinstance(op, Linear) and not isinstance(op, DepthwiseConv2D)
    }
    if images is None and all(zeros < _LEAST_ZEROS for zeros in layers.values()):
        return dict.fromkeys(layers, Layout.DENSE)
    file = _file(graph, block, tier, images)
    known = _read(file, layers)
    if known is not None:
        return known
    chosen = _by_weights(graph, wanted, block, tier, layers)
    if images is not None:
        chosen = _by_activations(graph, wanted, tier, chosen, images)
    _write(file, chosen)
    return chosen


def _by_weights(
    graph: Graph,
    wanted: Sequence[int],
    block: int,
    tier: Tier,
    layers: dict[int, float],  # float: shares of zeros
) -> Layouts:
    """The fastest of the layouts whose time does not depend on the activations."""
    if all(zeros < _LEAST_ZEROS for zeros in layers.values()):
        return dict.fromkeys(layers, Layout.DENSE)
    programs = {
        layout: build(graph, wanted, block, layout, tier)
        for layout in (Layout.DENSE, Layout.SPARSE, Layout.BLOCKS, Layout.BITMASK)
    }
    chosen: Layouts = {}
    for number, zeros in layers.items():
        candidates = list(programs) if zeros >= _LEAST_ZEROS else [Layout.DENSE]
        times = {
            layout: seconds(programs[layout], number, block)
            for layout in candidates
            if layout is Layout.DENSE
            or programs[layout].opcode(number) != programs[Layout.DENSE].opcode(number)
        }
        chosen[number] = min(times, key=times.__getitem__)
        _log.debug("%s: %s", graph.core[number].name, times)
    return chosen


def _by_activations(
    graph: Graph,
    wanted: Sequence[int],
    tier: Tier,
    chosen: Layouts,
    images: npt.NDArray[np.uint8],
) -> Layouts:
    """``chosen``, with layers that skip inputs at the zero point where that takes less time.

    One layer after the other: which inputs lie side by side follows from the layers before.
    """
    able = build(graph, wanted, 1, Layout.SKIPPING, tier)
    for number in chosen:
        if able.opcode(number) != SKIPPING:
            continue
        trial: Layouts = {**chosen, number: Layout.SKIPPING}
        replays = [
            Replay(graph, build(graph, wanted, 1, layouts, tier), number, images)
            for layouts in (chosen, trial)
        ]
        times = median_seconds(replays)
        _log.debug("%s: %s, skipping %s", graph.core[number].name, chosen[number], times)
        if times[1] < (1 - _LEAST_GAIN) * times[0]:
            chosen = trial
    return chosen


def seconds(program: Program, number: int, block: int) -> float:  # float: a clock
    """How long one operator of a program takes for a block of images; the least of some runs.

    No activation is at the zero point.
    """
    position = program.operators.index(number)
    work = program.workspace()
    work.activations[:] = _ALIVE
    frame = Frame(program, work, steps=program.steps[position : position + 1])

    def run() -> float:  # float: a clock
        begin = time.perf_counter()
        frame.run(0, 0, block)
        return time.perf_counter() - begin

    return least(run)


def least(run: Callable[[], float]) -> float:  # float: a clock
    """The least of some times that ``run`` measures, more of them where they are short."""
    first = run()
    turns = max(_TURNS, min(100, int(_ENOUGH / max(first, 1e-7))))  # float: a clock
    return min(run() for _ in range(turns))


def _file(
    graph: Graph, block: int, tier: Tier, images: npt.NDArray[np.uint8] | None
) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    samples = "" if images is None else hashlib.sha256(images.tobytes()).hexdigest()
    key = f"{graph.fingerprint()} {block} {tier} {sorted(features())} {DIGEST} {samples}"
    return folder / f"layouts-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read(file: Path | None, layers: dict[int, float]) -> Layouts | None:  # float: shares
    if file is None or not file.exists():
        return None
    try:
        known = msgspec.json.decode(file.read_bytes(), type=dict[int, Layout])
    except (OSError, msgspec.MsgspecError) as error:
        _log.warning("%s is not read: %s", file, error)
        return None
    return known if known.keys() == layers.keys() else None


def _write(file: Path | None, chosen: Layouts) -> None:
    if file is None:
        return
    try:
        files.write(file, msgspec.json.encode(chosen), force=True)
    except (OSError, CactusEdgeError) as error:
        _log.info("what was chosen is not kept: %s", error)
