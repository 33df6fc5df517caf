"""The checker's first half: everything that a certificate's first line says.

Each field is re-derived from models and data, or compared with the only text that this format
allows. What cannot be derived is free and said so in ``docs/certificates.md``: the files' names,
the tool's version, and how hard the search was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cactus_edge import certificate, decision, inputs, profiles, universal, vnnlib
from cactus_edge.certificate import Arithmetic, Head
from cactus_edge.constraints import validate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import CactusEdgeError, UsageError
from cactus_edge.graph import Graph
from cactus_edge.inputs import Perturbation
from cactus_edge.vnnlib import BoundCase

_TOOL = re.compile(r"cactus-edge [0-9A-Za-z.+-]{1,40}")
_ATTACK = re.compile(r"([a-z_]+ [0-9A-Za-z_.+-]+(, [a-z_]+ [0-9A-Za-z_.+-]+)*)?")
_BUDGET = re.compile(r"[0-9][0-9.e+-]{0,11} s")


@dataclass(frozen=True)
class Group:
    """Profiles that compute the same integers on a model, with its graph resolved for them."""

    model: int
    names: tuple[str, ...]
    graph: Graph


def problems(
    head: Head,
    models: Sequence[bytes],
    graphs: Sequence[Graph],
    data: Dataset | None,
    query: bytes | None,
) -> Iterator[str]:
    """What is wrong with the head; ``graphs`` are the models as read.

    ``data`` and ``query`` are what was given to check it against.
    """
    if not len(head.models) == len(head.arithmetic) == len(models):
        yield (
            f"models: the certificate is about {len(head.models)}, with arithmetic of "
            f"{len(head.arithmetic)}; {len(models)} were given"
        )
        return
    for number, (model, graph) in enumerate(zip(models, graphs, strict=True)):
        where = "" if len(models) == 1 else f" {number}"
        for problem in _model(head.models[number], model, graph):
            yield f"model{where}: {problem}"
        for problem in _arithmetic(head.arithmetic[number], graph):
            yield f"arithmetic{where}: {problem}"
        if head.input_map != inputs.input_map(graph).describe():
            yield f"input map: differs from the model's{where}"
        is_query = head.property.kind == "vnnlib"  # which states its own rule
        rule = "" if is_query else decision.describe(graph, max(head.property.top, 1))
        if head.property.decision != rule:
            yield f"decision rule: claimed '{head.property.decision}', the model's is '{rule}'"
    if len({_form(graph) for graph in graphs}) != 1:
        yield "models: inputs or logits differ in number"
    yield from _property(head, graphs[0])
    yield from _texts(head)
    yield from _query(head, query, graphs[0]) if head.query else _data(head, data)


def _form(graph: Graph) -> tuple[tuple[int, ...], int]:
    return graph.tensors[graph.core_input].shape[1:], graph.tensors[graph.logits].size


def _model(claim: certificate.Model, model: bytes, graph: Graph) -> Iterator[str]:
    sha256 = hashlib.sha256(model).hexdigest()
    if (claim.sha256, claim.bytes) != (sha256, len(model)):
        yield f"the certificate is about sha256 {claim.sha256}, the file has {sha256}"
    if claim.fingerprint != graph.fingerprint():
        yield "the fingerprint of the arithmetic differs"


def _arithmetic(claim: Arithmetic, graph: Graph) -> Iterator[str]:
    rounding = "universal" if universal.is_universal(graph) else "conjunction"
    if claim.rounding != rounding:
        yield f"claimed '{claim.rounding}', the model is '{rounding}'"
    names = claim.profiles
    unknown = [name for name in names if name not in profiles.PROFILES]
    if not names or unknown or len(set(names)) != len(names):
        yield f"profiles {list(names)} are not distinct known profiles"
    outside = profiles.uncovered(graph)
    covering = tuple(name for name in profiles.PROFILES if name not in outside)
    if not set(names) <= set(covering):
        yield f"profiles {sorted(set(names) - set(covering))} do not cover the model"
    if rounding == "universal" and names != covering:
        yield "a universal model is certified for every profile that covers it"
    whole = set(names) == set(covering)
    chosen = rounding == "conjunction" and not claim.uncovered
    if not chosen and not (whole and claim.uncovered == outside):
        yield "'uncovered' does not name the profiles that do not cover the model, with the reasons"


def _property(head: Head, graph: Graph) -> Iterator[str]:
    claim = head.property
    if head.query is not None or claim.kind == "vnnlib":
        if head.query is None or claim != certificate.Property("vnnlib"):
            yield "property: of a query it is 'vnnlib' and nothing else, and only of a query"
        return
    classes = graph.tensors[graph.logits].size
    if not 1 <= claim.top < max(classes, 2):
        yield f"property: top {claim.top}, the model has {classes} logits"
    try:
        found = perturbation(claim)
        if found.patch:
            inputs.placements(graph, found.patch)
    except CactusEdgeError as error:
        yield f"property: {error}"
        return
    size = graph.tensors[graph.core_input].size
    if found.radii and len(found.radii) != size:
        yield f"property: {len(found.radii)} radii, the model's input has {size} elements"


def perturbation(claim: certificate.Property) -> Perturbation:
    """The claimed perturbation set; for ``radius`` the largest that was searched.

    Raises:
        UsageError: there is no such set, or it is not written as it should be.
    """
    if claim.kind == "vnnlib":
        raise UsageError("the sets of a query are in its file")
    kind = "levels" if claim.kind == "radius" else claim.kind
    if claim.radii:
        found = Perturbation.each(kind, claim.radii)
        stated = claim.radius == "" and claim.radii == tuple(str(radius) for radius in found.radii)
    else:
        found = Perturbation(kind, inputs.rational(claim.radius))
        stated = claim.radius == str(found.radius)
    if not stated:
        raise UsageError("radii are written as lowest terms, either one or one for each element")
    if claim.kind == "radius" and (claim.radii or claim.patch):
        raise UsageError("a radius of each sample is one number of levels for all elements")
    return replace(found, patch=claim.patch)


def cases(head: Head, graph: Graph, query: bytes) -> tuple[BoundCase, ...]:
    """The boxes of a query, each with what must not happen in it.

    Raises:
        DataError: the query cannot be read, or does not fit the model.
    """
    assert head.query is not None
    return vnnlib.bind(vnnlib.parse(query, "query"), graph, head.query.variables)


def _texts(head: Head) -> Iterator[str]:
    stated = (head.verifier, head.side_conditions)
    if stated != (certificate.VERIFIERS[head.method], certificate.SIDE_CONDITIONS):
        yield "verifier or side conditions: not those of this format and method"
    if not _TOOL.fullmatch(head.tool):
        yield "tool: not the name and version of one that writes this format"
    search = head.search
    if not _ATTACK.fullmatch(search.attack):
        yield "search: not the settings of an attack"
    if head.method == "interval":
        fits = (search.budget, search.memory) == ("", 0)
    else:
        fits = bool(_BUDGET.fullmatch(search.budget)) and search.memory > 0
    if not fits:
        yield f"search: budget '{search.budget}' and memory {search.memory} for '{head.method}'"
    name = "" if head.data is None else head.data.name
    query = "" if head.query is None else head.query.file
    files = [model.file for model in head.models]
    if head.how_to_check != certificate.how_to_check(files, name, query):
        yield "how_to_check: not the text of this format"


def _data(head: Head, data: Dataset | None) -> Iterator[str]:
    claim = head.data
    if claim is None or data is None:
        yield "data: the certificate names none" if claim is None else "data: none were given"
        return
    if (claim.sha256, claim.split) != (data.sha256, data.split):
        yield f"data: the certificate is about {claim.name} {claim.split} of another hash"
    if claim.name != data.name:
        yield f"data: the certificate is about '{claim.name}', this is '{data.name}'"
    end = claim.first + claim.count
    if not 0 <= claim.first < end <= len(data.labels):
        yield f"data: samples {claim.first}..{end - 1} are not in it"


def _query(head: Head, query: bytes | None, graph: Graph) -> Iterator[str]:
    assert head.query is not None
    if head.data is not None:
        yield "data: a claim about a query is about no samples"
    if len(head.models) != 1:
        yield "query: its real values are those of one model, so is the claim"
    if query is None:
        yield f"query: the certificate is about '{head.query.file}'; give that file"
        return
    sha256 = hashlib.sha256(query).hexdigest()
    if head.query.sha256 != sha256:
        yield f"query: the certificate is about sha256 {head.query.sha256}, the file has {sha256}"
        return
    try:
        cases(head, graph, query)
    except CactusEdgeError as error:
        yield f"query: {error}"


def groups(head: Head, graphs: Sequence[Graph]) -> list[Group]:
    """The groups of all models, in the order of the claim."""
    found: list[Group] = []
    for number, (graph, arithmetic) in enumerate(zip(graphs, head.arithmetic, strict=True)):
        if universal.is_universal(graph):
            resolved = _resolved(graph, profiles.DEFAULT)
            found.append(Group(number, arithmetic.profiles, resolved))
            continue
        seen: dict[str, Group] = {}
        for name in arithmetic.profiles:
            resolved = _resolved(graph, name)
            known = seen.get(resolved.fingerprint(), Group(number, (), resolved))
            seen[resolved.fingerprint()] = Group(number, (*known.names, name), known.graph)
        found += seen.values()
    return found


def _resolved(graph: Graph, name: str) -> Graph:
    resolved = profiles.resolve(graph, name)
    validate(resolved)
    return resolved
