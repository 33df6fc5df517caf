"""The checker's first half: everything that a certificate's first line says.

Each field is re-derived from models and data, or compared with the only text that this format
allows. What cannot be derived is free and said so in ``docs/certificates.md``: the files' names,
the tool's version, and how hard the search was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cactus_edge import certificate, decision, inputs, profiles, universal
from cactus_edge.certificate import Arithmetic, Head
from cactus_edge.constraints import validate
from cactus_edge.datasets import Dataset
from cactus_edge.errors import UsageError
from cactus_edge.graph import Graph
from cactus_edge.inputs import Perturbation

_TOOL = re.compile(r"cactus-edge [0-9A-Za-z.+-]{1,40}")
_ATTACK = re.compile(r"([a-z_]+ [0-9A-Za-z_.+-]+(, [a-z_]+ [0-9A-Za-z_.+-]+)*)?")
_BUDGET = re.compile(r"[0-9.e+]{1,12} s")


@dataclass(frozen=True)
class Group:
    """Profiles that compute the same integers on a model, with its graph resolved for them."""

    model: int
    names: tuple[str, ...]
    graph: Graph


def problems(
    head: Head, models: Sequence[bytes], graphs: Sequence[Graph], data: Dataset
) -> Iterator[str]:
    """What is wrong with the head; ``graphs`` are the models as read."""
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
        rule = decision.describe(graph, max(head.property.top, 1))
        if head.property.decision != rule:
            yield f"decision rule: claimed '{head.property.decision}', the model's is '{rule}'"
    if len({_form(graph) for graph in graphs}) != 1:
        yield "models: inputs or logits differ in number"
    yield from _property(head, graphs[0])
    yield from _texts(head)
    yield from _data(head, data)


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
    try:
        perturbation(head.property)
    except UsageError as error:
        yield f"property: {error}"
        return
    radii, size = head.property.radii, graph.tensors[graph.core_input].size
    if radii and len(radii) != size:
        yield f"property: {len(radii)} radii, the model's input has {size} elements"


def perturbation(claim: certificate.Property) -> Perturbation:
    """The claimed perturbation set.

    Raises:
        UsageError: there is no such set, it is not written as it should be, or this checker does
            not re-derive claims about it.
    """
    if claim.kind not in ("epsilon", "levels") or claim.patch or claim.top != 1:
        raise UsageError(
            f"kind '{claim.kind}', patch {list(claim.patch)}, top {claim.top}: "
            "not re-derived by this version"
        )
    if claim.radii:
        found = Perturbation.each(claim.kind, claim.radii)
        stated = claim.radius == "" and claim.radii == tuple(str(radius) for radius in found.radii)
    else:
        found = Perturbation(claim.kind, inputs.rational(claim.radius))
        stated = claim.radius == str(found.radius)
    if not stated:
        raise UsageError("radii are written as lowest terms, either one or one for each element")
    return found


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


def _data(head: Head, data: Dataset) -> Iterator[str]:
    if head.query is not None or head.data is None:
        yield "data: claims about queries are not re-derived by this version"
        return
    claim = head.data
    if (claim.sha256, claim.split) != (data.sha256, data.split):
        yield f"data: the certificate is about {claim.name} {claim.split} of another hash"
    if claim.name != data.name:
        yield f"data: the certificate is about '{claim.name}', this is '{data.name}'"
    end = claim.first + claim.count
    if not 0 <= claim.first < end <= len(data.labels):
        yield f"data: samples {claim.first}..{end - 1} are not in it"


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
