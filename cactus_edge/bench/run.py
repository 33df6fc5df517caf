"""``benchmark``: one model, our runtime and its peers, on a number of threads."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cactus_edge.bench import machine, timing
from cactus_edge.bench.child import Start, start
from cactus_edge.bench.peers import (
    PIECE,
    Array,
    Loaded,
    Model,
    Ours,
    Peer,
    all_peers,
    usual_profile,
    version,
)
from cactus_edge.bench.timing import Contender, Samples
from cactus_edge.bench.work import Work, work
from cactus_edge.errors import CactusEdgeError, DataError, ToolError, UsageError, counted
from cactus_edge.execute import check_input
from cactus_edge.flatbuffer import write_tflite
from cactus_edge.graph import Graph

logger = logging.getLogger(__name__)

_IMAGES = 16
_COLD_PART = 3  # one cold call for so many warm rounds: writing to all of the cache takes long
_BATCH_TURNS = 7
_PAUSE = 0.03
"""Seconds after which no thread spins any more."""
_ENERGY_SECONDS = 1.0
_SMALLEST_FLUSH, _LARGEST_FLUSH = 64 << 20, 256 << 20


@dataclass(frozen=True)
class Figures:
    """Of one runtime, in microseconds for one image.

    Attributes:
        version: of its package.
        median_us: warm, with its quartiles, over ``calls`` single inferences.
        lower_quartile_us: see above.
        upper_quartile_us: see above.
        calls: how many were counted.
        ratio: this median over ours.
        ratio_quartiles: of the same ratio within single rounds.
        cold_us: median with caches that hold nothing of it.
        cold_ratio: that over ours.
        images_per_second: in batches.
        throughput_ratio: ours over this.
        differing: of ``compared`` output integers, how many are not ours. Runtimes round
            differently (see ``profiles``); 0 compared where the output is not the integer logits.
        compared: see above.
        start: in a process of its own; None where it was not asked for.
    """

    version: str
    median_us: float
    lower_quartile_us: float
    upper_quartile_us: float
    calls: int
    ratio: float
    ratio_quartiles: tuple[float, float]
    cold_us: float
    cold_ratio: float
    images_per_second: float
    throughput_ratio: float
    differing: int
    compared: int
    start: Start | None


@dataclass(frozen=True)
class Benchmark:
    """All figures of one model on one machine.

    ``absent`` are peers that were not measured, with the reason. ``microjoules`` are what the
    processor's own counter says about one image in batches of our runtime, the whole package
    included; None where it has no counter that may be read. ``model_sha256`` is of the file.
    """

    machine: str
    caches: dict[str, int]
    python: str
    before: machine.State
    after: machine.State
    profile: str
    layout: str
    threads: int
    batch: int
    work: Work
    ours: Figures
    peers: dict[str, Figures]
    absent: dict[str, str]
    microjoules: float | None
    model_sha256: str = ""


def benchmark(
    graph: Graph,
    *,
    model: bytes | None = None,
    profile: str | None = None,
    layout: str = "auto",
    samples: Array | None = None,
    candidates: Sequence[Peer] | None = None,
    rounds: int = 50,
    batch: int = 256,
    threads: int = 1,
    starts: bool = True,
) -> Benchmark:
    """Measure a model.

    Args:
        graph: as it was read or built.
        model: the ``.tflite`` file for the peers; written from ``graph`` if None.
        profile: rounding profile of our runtime; ``usual_profile`` if None.
        layout: of our weights, see ``Session``.
        samples: stored integers to time on, [n, *shape of an image]; uniform ones if None. Our
            kernels are calibrated on the first of them, at most half, and all are timed on the
            others.
        candidates: other runtimes; all that are known if None.
        rounds: turns that each contender takes, of ``timing.CALLS`` calls each.
        batch: images of the throughput measurement, rounded up to whole pieces of the peers.
        threads: that each runtime may use.
        starts: whether to measure start and memory, in a process for each runtime.

    Raises:
        InvalidGraphError: the graph breaks a constraint.
        UnsupportedModelError: no file can hold it.
        DataError: ``samples`` are no batch that the model takes, or fewer than two.
        UsageError: an unknown profile or layout, or less than one round, image or thread.
    """
    if min(rounds, batch, threads) < 1:
        raise UsageError(
            f"{counted(rounds, 'round')} of batch {batch} on {counted(threads, 'thread')}: "
            "all must be at least 1"
        )
    before = machine.state()
    whole = Model(graph, write_tflite(graph) if model is None else model)
    batch = -(-batch // PIECE) * PIECE
    calibration, stored = _stored_images(graph, batch, samples)
    profile = usual_profile(graph) if profile is None else profile
    own = Ours(profile, layout, calibration=calibration)
    entrants: list[Peer] = [own]
    loaded = [own.load(whole, threads)]
    absent: dict[str, str] = {}
    for peer in all_peers() if candidates is None else candidates:
        try:
            there = peer.load(whole, threads)
            there.batch(there.prepare(stored[:PIECE]))
        except (CactusEdgeError, RuntimeError) as error:
            absent[peer.name] = str(error)
        else:
            entrants.append(peer)
            loaded.append(there)
    contenders = [_contender(entry, stored) for entry in loaded]
    pause = _PAUSE if threads > 1 else 0.0
    measured = (
        timing.warm(contenders, rounds, pause),
        timing.cold(contenders, -(-rounds // _COLD_PART), _flush_bytes(), pause),
        timing.throughput(contenders, _BATCH_TURNS, pause),
    )
    begun = [_start(p, whole, stored, threads, own) if starts else None for p in entrants]
    outputs = [_outputs(entry, stored) for entry in loaded]
    figures = [
        _figures(peer, [m[i] for m in measured], [m[0] for m in measured], outputs, i, begun[i])
        for i, peer in enumerate(entrants)
    ]
    return Benchmark(
        machine=machine.machine_name(),
        caches=machine.caches(),
        python=platform.python_version(),
        before=before,
        after=machine.state(),
        profile=profile,
        layout=layout,
        threads=threads,
        batch=batch,
        work=work(graph),
        ours=figures[0],
        peers={p.name: f for p, f in zip(entrants[1:], figures[1:], strict=True)},
        absent=absent,
        microjoules=_microjoules(contenders[0]),
        model_sha256=hashlib.sha256(whole.content).hexdigest(),
    )


def _figures(
    peer: Peer,
    taken: Sequence[Samples],
    own: Sequence[Samples],
    outputs: Sequence[Array | None],
    index: int,
    begun: Start | None,
) -> Figures:
    """Of warm, cold and batch samples, beside our own three."""
    warm, cold, batch = taken
    ratios = np.percentile(warm.ratios(own[0]), (25, 75))
    output, expected = outputs[index], outputs[0]
    same_kind = output is not None and expected is not None and output.shape == expected.shape
    return Figures(
        version=version(peer.package),
        median_us=warm.median,
        lower_quartile_us=warm.quartiles[0],
        upper_quartile_us=warm.quartiles[1],
        calls=warm.values.size,
        ratio=warm.median / own[0].median,
        ratio_quartiles=(float(ratios[0]), float(ratios[1])),
        cold_us=cold.median,
        cold_ratio=cold.median / own[1].median,
        images_per_second=1e6 / batch.median,
        throughput_ratio=batch.median / own[2].median,
        differing=int((output != expected).sum()) if same_kind else 0,  # pyright: ignore
        compared=expected.size if same_kind and expected is not None else 0,
        start=begun,
    )


def _contender(loaded: Loaded, stored: Array) -> Contender:
    images = [loaded.prepare(stored[i : i + 1]) for i in range(min(_IMAGES, len(stored)))]
    return Contender(loaded.call, images, loaded.batch, loaded.prepare(stored))


def _outputs(loaded: Loaded, stored: Array) -> Array | None:
    """Stored logits of the first images, one at a time."""
    if loaded.finish is None:
        return None
    images = [loaded.prepare(stored[i : i + 1]) for i in range(min(_IMAGES, len(stored)))]
    return np.concatenate([loaded.finish(loaded.call(image)) for image in images])


def _start(peer: Peer, model: Model, stored: Array, threads: int, own: Ours) -> Start | None:
    try:
        return start(peer.name, model, stored[0].tobytes(), threads, own)
    except ToolError as error:
        logger.warning("start and memory of %s were not measured: %s", peer.name, error)
        return None


def _stored_images(graph: Graph, count: int, samples: Array | None) -> tuple[Array | None, Array]:
    """What calibrates and what is timed: samples, again and again if they are few, or uniform."""
    tensor = graph.tensors[graph.core_input]
    lower, upper = tensor.dtype.range
    if samples is None:
        rng = np.random.default_rng(0)
        values = rng.integers(lower, upper + 1, (count, *tensor.shape[1:]))
        return None, values.astype(tensor.dtype.value)
    from cactus_edge.kernels.replay import SAMPLES  # a start measures what this imports

    known = check_input(graph, samples).astype(tensor.dtype.value)
    if len(known) < 2:
        raise DataError(
            f"{counted(len(known), 'sample')}: give at least 2, one of which calibrates"
        )
    split = min(SAMPLES, len(known) // 2)
    return known[:split], np.resize(known[split:], (count, *known.shape[1:]))


def _flush_bytes() -> int:
    """More than all caches hold, within reason."""
    largest = max(machine.caches().values(), default=0)
    return min(max(2 * largest, _SMALLEST_FLUSH), _LARGEST_FLUSH)


def _microjoules(contender: Contender) -> float | None:
    """Energy of the processor for one image of a batch."""
    before = machine.energy_microjoules()
    if before is None:
        return None
    images, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _ENERGY_SECONDS:
        contender.batch_call(contender.batch)
        images += len(contender.batch)
    after = machine.energy_microjoules()
    return None if after is None or after < before else (after - before) / images
