"""From a model's bytes and a data set to a certificate, and attacks without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import cactus_edge
from cactus_edge import certificate, decision, inputs, profiles
from cactus_edge.certificate import Certificate, Sample
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import Certifier, attack_boxes, chunks, cover
from cactus_edge.datasets import Dataset, Images
from cactus_edge.errors import DataError, UsageError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import Perturbation

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What to certify: samples ``first`` to ``first + count - 1`` of ``data`` (None: to the end).

    ``profiles`` restricts the claim to some runtimes (None: all that cover the model); a claim
    about a universal model is about all of them in any case.
    """

    data: Dataset
    perturbation: Perturbation
    first: int = 0
    count: int | None = None
    profiles: tuple[str, ...] | None = None
    attack: Settings | None = None


def certify(
    model: bytes, request: Request, *, file: str = "model.tflite", progress: Progress | None = None
) -> Certificate:
    """Certify the deployed integers of a ``.tflite`` file's bytes.

    Args:
        model: the file as it ships; its SHA-256 is what the certificate names.
        request: samples, perturbation set, profiles, whether to attack what stays open.
        file: name for messages and for the certificate.
        progress: called with (samples done, samples in all).

    Returns:
        The certificate; ``certificate.encode`` makes the file of it.

    Raises:
        UnsupportedModelError: the model cannot be read or certified.
        DataError: the samples do not fit the model.
        UsageError: a range or a profile that does not exist.
    """
    graph = read_tflite(model, file)
    images, labels = _selected(graph, request)
    certifier = Certifier(graph, request.profiles)
    samples: list[Sample] = []
    for part in chunks(len(labels)):
        stored = inputs.stored(graph, images[part])
        lower, upper = inputs.box(graph, images[part], request.perturbation)
        samples += certifier.verdicts(
            request.first + part.start, stored, lower, upper, labels[part], request.attack
        )
        if progress:
            progress(part.stop, len(labels))
    coverage = certifier.coverage
    names = tuple(name for group in coverage.groups for name in group.names)
    data = request.data
    claim = Certificate(
        format=certificate.FORMAT,
        version=certificate.VERSION,
        tool=f"cactus-edge {cactus_edge.__version__}",
        model=certificate.Model(
            file, hashlib.sha256(model).hexdigest(), graph.fingerprint(), len(model)
        ),
        arithmetic=certificate.Arithmetic(
            "universal" if coverage.universal else "conjunction", names, coverage.uncovered
        ),
        input_map=inputs.input_map(graph).describe(),
        property=certificate.Property(
            "epsilon" if request.perturbation.kind == "epsilon" else "levels",
            str(request.perturbation.radius),
            decision.describe(graph),
        ),
        data=certificate.Data(data.name, data.split, data.sha256, request.first, len(labels)),
        verifier=certificate.VERIFIER,
        side_conditions=certificate.SIDE_CONDITIONS,
        summary=certificate.summarize(samples, request.attack is not None),
        samples=tuple(samples),
        how_to_check=certificate.how_to_check(file, data.name),
    )
    return certificate.sealed(claim)


def _selected(graph: Graph, request: Request) -> tuple[Images, Int64Array]:
    total = len(request.data.labels)
    for name in request.profiles or ():
        profiles.profile_of(name)
    count = total - request.first if request.count is None else request.count
    if not (0 <= request.first < total and 0 < count <= total - request.first):
        raise UsageError(
            f"samples {request.first}..{request.first + count - 1} are not in "
            f"'{request.data.name}' {request.data.split}, which has {total}"
        )
    part = slice(request.first, request.first + count)
    labels = request.data.labels[part].astype(np.int64)
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
    for part in chunks(len(labels)):
        stored = inputs.stored(graph, images[part])
        lower, upper = inputs.box(graph, images[part], request.perturbation)
        samples += attack_boxes(
            found,
            request.first + part.start,
            (stored, lower, upper, labels[part]),
            request.attack or Settings(),
        )
        if progress:
            progress(part.stop, len(labels))
    return samples
