"""The first line of a certificate: which claim, about which bytes, with which methods."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import cactus_edge
from cactus_edge import certificate, inputs
from cactus_edge.certificate import Head, Method
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import cover
from cactus_edge.graph import Graph


@dataclass(frozen=True)
class Claim:
    """What is claimed, and how hard the search was; ``data`` or ``query`` is None."""

    property: certificate.Property
    method: Method
    attack: Settings | None
    budget: float  # float: seconds, decides nothing but when to give up
    memory: int
    data: certificate.Data | None = None
    query: certificate.Query | None = None


def head_of(
    claim: Claim,
    graphs: Sequence[Graph],
    models: Sequence[tuple[str, bytes]],
    names: Sequence[str] | None,
) -> Head:
    """The head of a certificate.

    Args:
        claim: what it is about.
        graphs: the models as read.
        models: (file name, bytes) of each.
        names: rounding profiles; None for all that cover a model.

    Raises:
        InvalidGraphError: a named profile does not cover a model, or none does.
        MalformedModelError: a model's input has no scale.
    """
    stated: list[certificate.Model] = []
    arithmetic: list[certificate.Arithmetic] = []
    for graph, (file, content) in zip(graphs, models, strict=True):
        sha256 = hashlib.sha256(content).hexdigest()
        stated.append(certificate.Model(file, sha256, graph.fingerprint(), len(content)))
        coverage = cover(graph, names)
        covered = tuple(name for group in coverage.groups for name in group.names)
        rounding = "universal" if coverage.universal else "conjunction"
        arithmetic.append(certificate.Arithmetic(rounding, covered, coverage.uncovered))
    slow = claim.method != "interval"
    files = [file for file, _ in models]
    data = "" if claim.data is None else claim.data.name
    query = "" if claim.query is None else claim.query.file
    return Head(
        format=certificate.FORMAT,
        version=certificate.VERSION,
        tool=f"cactus-edge {cactus_edge.__version__}",
        models=tuple(stated),
        arithmetic=tuple(arithmetic),
        input_map=inputs.input_map(graphs[0]).describe(),
        property=claim.property,
        data=claim.data,
        query=claim.query,
        method=claim.method,
        search=certificate.Search(
            attack=_settings(claim.attack),
            budget=f"{claim.budget:g} s" if slow else "",
            memory=claim.memory if slow else 0,
        ),
        verifier=certificate.VERIFIERS[claim.method],
        side_conditions=certificate.SIDE_CONDITIONS,
        how_to_check=certificate.how_to_check(files, data, query),
    )


def _settings(attack: Settings | None) -> str:
    """All settings of an attack, so that a run is resumed with the same ones alone."""
    if attack is None:
        return ""
    values = dataclasses.asdict(attack)
    return ", ".join(f"{name} {value}" for name, value in values.items())
