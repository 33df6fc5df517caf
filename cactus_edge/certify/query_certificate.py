"""Certificates of queries: one line for each box of a VNN-LIB file, numbered as it states them.

A line's label and prediction are -1; its counterexample is the difference to the box's lower ends.
The property holds when every line is ``certified``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

from cactus_edge import certificate, profiles, vnnlib
from cactus_edge.certificate import Bounds, Head, Method, Sample, Summary
from cactus_edge.certificate_stream import Writer
from cactus_edge.certify import tasks
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.boxes import difference
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.heads import Claim, head_of
from cactus_edge.certify.linear.search import Budget
from cactus_edge.certify.query import Answer, Verifier, joined
from cactus_edge.errors import UsageError
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.vnnlib import BoundCase


@dataclass(frozen=True)
class QueryRequest:
    """What to verify, and how; see ``certify.run.Request``.

    Attributes:
        model: (file name, bytes of the ``.tflite``).
        query: (file name, bytes of the VNN-LIB file).
        variables: whether X and Y are real values or stored integers.
        profiles: restricts the claim to some runtimes; None for all that cover the model.
        attack: strength of the search for a counterexample; None for no search.
        method: the strongest method that may be tried. Beyond ``interval`` every point is run where
            there are few.
        budget: seconds a box for ``complete``.
        memory: bytes that it may use.
    """

    model: tuple[str, bytes]
    query: tuple[str, bytes]
    variables: vnnlib.Variables = "real"
    profiles: tuple[str, ...] | None = None
    attack: Settings | None = None
    method: Method = "linear"
    budget: float = 60  # float: seconds, decides nothing but when to give up
    memory: int = 2 << 30


class QueryResult(NamedTuple):
    """The head and the summary that were written, and the answer to the whole query."""

    head: Head
    summary: Summary
    answer: Answer


class Answered(NamedTuple):
    """The answer to a query, the profiles it holds for, and how many boxes the query has."""

    answer: Answer
    profiles: tuple[str, ...]
    boxes: int


def answered(
    request: QueryRequest, *, progress: Callable[[int, int], None] | None = None
) -> Answered:
    """Answer a query without a certificate; stops at the first counterexample.

    Args:
        request: model, query, methods.
        progress: called with (boxes done, boxes in all).

    Raises:
        CactusEdgeError: as ``certify_query``.
    """
    graph, cases = _read(request)
    verifier = _verifier(request, graph)
    answer = verifier.decide(
        ((case.lower, case.upper, case.specification) for case in cases),
        settings=request.attack,
        total=len(cases),
        progress=progress,
    )
    names = tuple(name for group in verifier.coverage.groups for name in group.names)
    return Answered(answer, names, len(cases))


def certify_query(
    request: QueryRequest,
    output: BinaryIO,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> QueryResult:
    """Answer a query box by box and write the certificate.

    Every box is answered, also behind one that is refuted.

    Args:
        request: model, query, methods.
        output: where the certificate goes.
        progress: called with (boxes done, boxes in all).

    Raises:
        UnsupportedModelError: the model cannot be read or certified.
        DataError: the query cannot be read, or does not fit the model.
        UsageError: a profile that does not exist, or no budget.
        MissingExtraError: a solver is not installed.
    """
    graph, cases = _read(request)
    file, content = request.query
    claim = Claim(
        property=certificate.Property("vnnlib"),
        query=certificate.Query(file, hashlib.sha256(content).hexdigest(), request.variables),
        method=request.method,
        attack=request.attack,
        budget=request.budget,
        memory=request.memory,
    )
    head = head_of(claim, [graph], [request.model], request.profiles)
    verifier = _verifier(request, graph)
    writer = Writer(output, head)
    answers: list[Answer] = []
    for index, case in enumerate(cases):
        box = case.lower, case.upper
        (answer,) = verifier.answer(*box, case.specification, settings=request.attack)
        written = writer.append(tasks.line(_sample(index, case.lower[0], answer)))
        if written.verdict != answer.verdict:  # the proof is longer than a line may be
            answer = replace(answer, verdict="unknown")
        answers.append(answer)
        if progress:
            progress(index + 1, len(cases))
    return QueryResult(head, writer.finish(), joined(answers))


def _read(request: QueryRequest) -> tuple[Graph, tuple[BoundCase, ...]]:
    if not 0 < request.budget < math.inf or request.memory < 1:
        raise UsageError(
            f"budget {request.budget:g} s, memory {request.memory}: give finite ones above 0"
        )
    for name in request.profiles or ():
        profiles.profile_of(name)
    graph = read_tflite(request.model[1], request.model[0])
    query = vnnlib.parse(request.query[1], request.query[0])
    return graph, vnnlib.bind(query, graph, request.variables)


def _verifier(request: QueryRequest, graph: Graph) -> Verifier:
    budget = Budget(seconds=request.budget, memory=request.memory)
    return Verifier(graph, request.profiles, Effort(request.method, budget))


def _sample(index: int, lower: Int64Array, answer: Answer) -> Sample:
    bounds = tuple(Bounds(tuple(low.tolist()), tuple(high.tolist())) for low, high in answer.bounds)
    point = answer.counterexample
    certified = answer.verdict == "certified"
    return Sample(
        index,
        -1,
        -1,
        answer.verdict,
        "complete" if answer.method == "points" else answer.method,
        bounds,
        counterexample="" if point is None else difference(point, lower),
        profile=answer.profile,
        proofs=answer.proofs if certified else (),
    )
