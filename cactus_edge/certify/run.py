"""From the bytes of models and a data set to a certificate, and attacks without one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cactus_edge import certificate, decision, inputs, profiles
from cactus_edge.certificate import Head, Method, Sample, Summary
from cactus_edge.certificate_stream import Writer
from cactus_edge.certify import partial, tasks
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.engine import CHUNK, attack_boxes, chunks, cover
from cactus_edge.certify.heads import Claim, head_of
from cactus_edge.certify.linear.search import Budget
from cactus_edge.certify.parallel import pool
from cactus_edge.certify.shards import selected, shard
from cactus_edge.certify.top import check_top
from cactus_edge.datasets import Dataset, Images, check_unchanged
from cactus_edge.datasets.mapped import forget
from cactus_edge.errors import DataError, UsageError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import Perturbation

Progress = Callable[[int, int], None]
_SLOW_CHUNK = 8
"""Samples of a task where one of them may take seconds."""


@dataclass(frozen=True)
class Request:
    """What to certify, and how.

    Attributes:
        data: the split; its samples ``first`` to ``first + count - 1`` (None: to the end).
        perturbation: the inputs around each sample.
        top: the label has to be among that many largest logits.
        each_radius: search the largest certified radius of each sample, in stored levels, up to
            that of ``perturbation``; the budget is that of each radius that is tried.
        first: see ``data``.
        count: see ``data``.
        profiles: restricts the claim to some runtimes (None: all that cover the model); a claim
            about a universal model is about all of them in any case.
        attack: strength of the attack on what stays open; None for no attack.
        models: (file name, bytes of the ``.tflite``); a verdict holds for every one of them.
        method: the strongest method that may be tried.
        budget: seconds a sample for ``complete``; what it finds in this time may differ from
            machine to machine, and what it found is certified on all.
        memory: bytes that it may use.
        shard: (i, n): only the i-th of n consecutive ranges of the samples.
        jobs: processes; None for this one.
        dask: address of a Dask scheduler whose workers do the work instead.
        chunk: samples of one task; None for a size that suits the method. It never changes the
            certificate.
    """

    data: Dataset
    perturbation: Perturbation
    first: int = 0
    count: int | None = None
    profiles: tuple[str, ...] | None = None
    attack: Settings | None = None
    models: tuple[tuple[str, bytes], ...] = ()
    method: Method = "interval"
    budget: float = 60  # float: seconds, decides nothing but when to give up
    memory: int = 2 << 30
    shard: tuple[int, int] = (1, 1)
    jobs: int | None = None
    dask: str | None = None
    chunk: int | None = None
    top: int = 1
    each_radius: bool = False


class Result(NamedTuple):
    """The first line of the certificate that was written, and the summary in its last."""

    head: Head
    summary: Summary


def certify(
    request: Request,
    output: Path | BinaryIO,
    *,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Certify the deployed integers of ``.tflite`` files and write the certificate as it grows.

    Args:
        request: models, samples, perturbation set, profiles, methods.
        output: where the certificate goes. A path is written through ``OUTPUT.partial``, which
            stays if the run is stopped.
        resume: go on with a partial file, which has to be of the same claim.
        force: replace files that exist.
        progress: called with (samples done, samples in all).

    Raises:
        UnsupportedModelError: a model cannot be read or certified.
        DataError: the samples do not fit the models, or the models do not fit each other; the
            data's file was changed meanwhile.
        UsageError: a range or a profile that does not exist.
        OutputError: a file is in the way, or cannot be written.
        ToolError: worker processes die again and again.
    """
    if isinstance(output, Path):
        partial.refuse(output, resume=resume, force=force)
    graphs = _graphs(request)
    request = _narrowed(request)
    images, labels = _selected(graphs[0], request)
    plan = _plan(request)
    head = _head(request, graphs, len(labels))
    (placed,) = inputs.boxes(graphs[0], images[:1], request.perturbation)  # what does not fit, now
    if isinstance(output, Path):
        opened = partial.resumable(output, head, resume=resume, force=force)
    else:
        opened = nullcontext((Writer(output, head), output.flush))
    size = request.chunk or max(1, _chunk_size(request, len(labels)) // len(placed[0]))
    with opened as (writer, secure):
        try:
            _fill(writer, secure, request, (plan, images, labels, size), progress)
        finally:
            tasks.built.cache_clear()
        check_unchanged(request.data)
        summary = writer.finish()
    return Result(head, summary)


def _fill(
    writer: Writer,
    secure: Callable[[], None],
    request: Request,
    work: tuple[tasks.Plan, Images, Int64Array, int],
    progress: Progress | None,
) -> None:
    """Certify and write the samples that the writer does not have yet."""
    plan, images, labels, size = work
    done, total = writer.tally.samples, len(labels)
    if progress and done:
        progress(done, total)
    if done == total:
        return
    rest = tasks.cut(plan, request.first + done, images[done:], labels[done:], size)
    with pool(request.jobs, request.dask) as mapper:
        for lines in mapper(tasks.run, rest):
            for line in lines:
                index = writer.append(line).index
                assert index == request.first + done, "a defect: the samples are out of order"
                done += 1
            secure()
            forget(images)
            if progress:
                progress(done, total)


def _graphs(request: Request) -> tuple[Graph, ...]:
    """The models, checked to be alternatives of each other."""
    if not request.models:
        raise UsageError("no model to certify; give one or more")
    for name in request.profiles or ():
        profiles.profile_of(name)
    graphs = tuple(read_tflite(content, file) for file, content in request.models)
    first = graphs[0]
    for graph, (file, _) in zip(graphs[1:], request.models[1:], strict=True):
        for what, one, other in (
            ("input map", inputs.input_map(first).describe(), inputs.input_map(graph).describe()),
            ("input shape", _shape(first, first.core_input), _shape(graph, graph.core_input)),
            ("number of logits", _logits(first), _logits(graph)),
            ("decision rule", decision.describe(first), decision.describe(graph)),
        ):
            if one != other:
                raise DataError(
                    f"{file}: {what} {other}, but {one} in {request.models[0][0]}; one certificate "
                    "is about models that take the same inputs and decide alike"
                )
    return graphs


def _shape(graph: Graph, tensor: int) -> list[int]:
    return list(graph.tensors[tensor].shape[1:])


def _logits(graph: Graph) -> int:
    return graph.tensors[graph.logits].size


def _narrowed(request: Request) -> Request:
    """With the range of samples filled in and cut down to the shard."""
    about = f"'{request.data.name}' {request.data.split}"
    count = selected(request.first, request.count, len(request.data.labels), about)
    first, count = shard(request.first, count, request.shard)
    return dataclasses.replace(request, first=first, count=count, shard=(1, 1))


def _plan(request: Request) -> tasks.Plan:
    if not 0 < request.budget < math.inf or request.memory < 1:
        raise UsageError(
            f"budget {request.budget:g} s, memory {request.memory}: give finite ones above 0"
        )
    if request.chunk is not None and request.chunk < 1:
        raise UsageError(f"chunks of {request.chunk} samples; give at least 1")
    plain = request.perturbation.kind == "levels" and not request.perturbation.radii
    if request.each_radius and (not plain or request.perturbation.patch):
        raise UsageError("a radius is searched in stored levels, the same for all elements")
    return tasks.Plan(
        models=request.models,
        profiles=request.profiles,
        perturbation=request.perturbation,
        attack=request.attack,
        effort=Effort(request.method, Budget(seconds=request.budget, memory=request.memory)),
        threads=None if request.jobs is None and request.dask is None else 1,
        top=request.top,
        each_radius=request.each_radius,
    )


def _chunk_size(request: Request, count: int) -> int:
    """Large enough for the kernels, small enough that all processes end together."""
    if request.method != "interval":
        return _SLOW_CHUNK
    return CHUNK if request.jobs is None and request.dask is None else max(1, min(100, count // 8))


def _head(request: Request, graphs: tuple[Graph, ...], count: int) -> Head:
    data = request.data
    claim = Claim(
        property=_property(request, graphs[0]),
        data=certificate.Data(data.name, data.split, data.sha256, request.first, count),
        method=request.method,
        attack=request.attack,
        budget=request.budget,
        memory=request.memory,
    )
    return head_of(claim, graphs, request.models, request.profiles)


def _property(request: Request, graph: Graph) -> certificate.Property:
    """The perturbation set and the decision, as the certificate states them."""
    perturbation = request.perturbation
    radii = tuple(str(radius) for radius in perturbation.radii)
    kind = "epsilon" if perturbation.kind == "epsilon" else "levels"
    return certificate.Property(
        kind="radius" if request.each_radius else kind,
        radius="" if radii else str(perturbation.radius),
        radii=radii,
        patch=perturbation.patch,
        top=request.top,
        decision=decision.describe(graph, request.top),
    )


def _selected(graph: Graph, request: Request) -> tuple[Images, Int64Array]:
    for name in request.profiles or ():
        profiles.profile_of(name)
    about = f"'{request.data.name}' {request.data.split}"
    count = selected(request.first, request.count, len(request.data.labels), about)
    check_top(graph, request.top)
    part = slice(request.first, request.first + count)
    labels = request.data.labels[part].astype(np.int64, copy=False)
    classes = graph.tensors[graph.logits].size
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"'{request.data.name}' has labels {labels.min()}..{labels.max()}, "
            f"the model has {classes} logits"
        )
    return request.data.images[part], labels


def attack(
    graph: Graph,
    request: Request,
    *,
    progress: Progress | None = None,
) -> list[Sample]:
    """Only the search for counterexamples: verdicts ``refuted`` (with one) or ``unknown``.

    Args:
        graph: as read from the file.
        request: samples, perturbation set, strength; every group of ``request.profiles`` that
            computes other integers is attacked in turn.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: the samples do not fit the model.
        UsageError: a range or a profile that does not exist.
    """
    images, labels = _selected(graph, request)
    found = cover(graph, request.profiles).groups
    samples: list[Sample] = []
    (placed,) = inputs.boxes(graph, images[:1], request.perturbation)
    for part in chunks(len(labels), max(1, CHUNK // len(placed[0]))):
        stored = inputs.stored(graph, images[part])
        boxes = tasks.placed(
            graph, images[part], request.perturbation, stored, labels[part], request.top
        )
        settings = request.attack or Settings()
        samples += attack_boxes(found, request.first + part.start, boxes, settings)
        if progress:
            progress(part.stop, len(labels))
    return samples
