"""What one process does: verdicts of consecutive samples, as the lines of a certificate.

A ``Task`` carries all that it needs, so that any process can do it, and do it again: its lines
depend on nothing else, and not on which samples stand beside each other in it. The compiled models
are kept from task to task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np

from cactus_edge import inputs
from cactus_edge.certificate import LINE_LIMIT, Sample, line_of
from cactus_edge.certify import radius
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.boxes import Boxes
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.engine import Certifier
from cactus_edge.datasets import Images
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import Perturbation


@dataclass(frozen=True)
class Plan:
    """What is the same for all samples.

    ``top``: the label has to be among that many largest logits. ``each_radius``: the largest
    certified radius of each sample is searched, up to that of ``perturbation``. ``threads`` of each
    process, None for all there are.
    """

    models: tuple[tuple[str, bytes], ...]
    profiles: tuple[str, ...] | None
    perturbation: Perturbation
    attack: Settings | None
    effort: Effort
    threads: int | None
    top: int = 1
    each_radius: bool = False


@dataclass(frozen=True)
class Task:
    """Samples ``first`` and following of the data set: images [N, ...], labels int64 [N]."""

    plan: Plan
    first: int
    images: Images
    labels: Int64Array


def run(task: Task) -> list[bytes]:
    """A line for each sample."""
    plan = task.plan
    certifier = built(plan)
    graph, labels = certifier.graph, task.labels
    stored = inputs.stored(graph, task.images)
    if plan.each_radius:
        largest = int(plan.perturbation.radius)
        samples = radius.lines(certifier, task.first, stored, labels, largest, plan.attack)
    elif plan.perturbation.patch:
        boxes = placed(graph, task.images, plan.perturbation, stored, labels)
        samples = certifier.verdicts(task.first, *boxes[:4], plan.attack, boxes.owner)
    else:
        lower, upper = inputs.box(graph, task.images, plan.perturbation)
        samples = certifier.verdicts(task.first, stored, lower, upper, labels, plan.attack)
    return [line(sample) for sample in samples]


def placed(
    graph: Graph,
    images: Images,
    perturbation: Perturbation,
    stored: Int64Array,
    labels: Int64Array,
    top: int = 1,
) -> Boxes:
    """The boxes of all placements of a patch, or one box for each sample without a patch."""
    ends = list(inputs.boxes(graph, images, perturbation))
    owner = np.repeat(np.arange(len(ends)), [len(lower) for lower, _ in ends])
    lower, upper = (np.concatenate(side) for side in zip(*ends, strict=True))
    return Boxes(stored[owner], lower, upper, labels[owner], owner, top)


@lru_cache(maxsize=1)
def built(plan: Plan) -> Certifier:
    """The compiled models of a plan, kept for its next task; the one place that compiles them."""
    graphs = [read_tflite(content, file) for file, content in plan.models]
    return Certifier(graphs, plan.profiles, plan.effort, plan.top, threads=plan.threads)


def line(sample: Sample) -> bytes:
    """The sample's line; a witness that is longer than a line may be is given up."""
    whole = line_of(sample)
    if len(whole) <= LINE_LIMIT:
        return whole
    short = msgspec.structs.replace(
        sample,
        verdict="unknown",
        counterexample="",
        profile="",
        model=0,
        message=f"the witness takes {len(whole)} bytes, more than a line may have",
        method="elided-margin",
        radius=None,
        bounds=sample.bounds if sample.radius is None else (),
        proofs=(),
    )
    return line_of(short)


def cut(plan: Plan, first: int, images: Images, labels: Int64Array, size: int) -> Iterator[Task]:
    """Consecutive tasks of up to ``size`` samples; the arrays are views."""
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield Task(plan, first + start, images[part], labels[part])
