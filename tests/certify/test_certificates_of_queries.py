"""Certificates of VNN-LIB queries, and forged ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from cactus_edge import certificate, check_linear, flatbuffer, profiles, vnnlib
from cactus_edge.certificate import Head, Property, Sample
from cactus_edge.certificate_stream import Certificate, Reader
from cactus_edge.certify.query_certificate import QueryRequest, answered, certify_query
from cactus_edge.check import CheckResult, check
from cactus_edge.check_linear import LinearChecker
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof, Split
from cactus_edge.specification import Atom
from tests.certificates import certified, encoded, read
from tests.certify.test_certificates_of_properties import (
    METHODS,
    NAMES,
    SETTINGS,
    asked,
    reasons,
    scene,
    truth_of,
)
from tests.graphs import enumerate_box, random_graph


def query_of(
    lower: Int64Array, upper: Int64Array, classes: int, unsafe: Iterable[str], more: str = ""
) -> bytes:
    """One box and a disjunction, over stored integers."""
    count = lower.size
    text = "".join(f"(declare-const X_{i} Real)" for i in range(count))
    text += "".join(f"(declare-const Y_{i} Real)" for i in range(classes))
    for i, (low, high) in enumerate(zip(lower.flat, upper.flat, strict=True)):
        text += f"(assert (<= {low} X_{i} {high}))"
    return f"{text}(assert (or {' '.join(unsafe)})){more}".encode()


def text_of(atom: Atom) -> str:
    terms = " ".join(f"(* {c} Y_{k})" for k, c in atom.terms)
    return f"(>= (+ 0 {terms}) {atom.bound})"


def answer(
    model: bytes, query: bytes, method: certificate.Method, **options: Any
) -> tuple[Certificate, str]:
    request = QueryRequest(
        ("model.tflite", model),
        ("q.vnnlib", query),
        **{
            "variables": "stored",
            "attack": SETTINGS,
            "method": method,
            "profiles": NAMES,
            **options,
        },
    )
    stream = BytesIO()
    result = certify_query(request, stream)
    assert answered(request).answer.verdict == result.answer.verdict
    return read(stream.getvalue()), result.answer.verdict


def rechecked(
    head: Head, samples: Iterable[Sample], model: bytes, query: bytes | None
) -> CheckResult:
    reader = Reader(BytesIO(encoded(head, samples)), "memory")
    return check(reader, [model], query=query)


def random_atoms(
    rng: np.random.Generator, logits: Int64Array, count: int, spread: int
) -> list[Atom]:
    """Bounds up to ``spread`` above what the box attains, but for the last one, which is below."""
    found: list[Atom] = []
    for number in range(count):
        chosen = rng.choice(logits.shape[1], int(rng.integers(1, 4)), replace=False)
        weights = {int(k): int(rng.choice([-3, -1, 1, 2])) for k in sorted(chosen)}
        if len(weights) == 2 and rng.random() < 0.7:
            weights = dict(zip(weights, (1, -1), strict=True))
        most = int(max(sum(c * row[k] for k, c in weights.items()) for row in logits))
        offset = int(rng.integers(1, spread)) if number < count - 1 else -4
        found.append(Atom(tuple(weights.items()), most + offset))
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("points", [4096, 1])
def test_queries(points: int, method: certificate.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random disjunctions against every point; with ``points`` 1 no box is closed by running it."""
    monkeypatch.setattr("cactus_edge.certify.linear.search.POINTS", points)
    monkeypatch.setattr("cactus_edge.certify.query.POINTS", points)
    counts: dict[tuple[str, str], int] = {}
    trees = missed = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, shape=(1, 3), depth=2, channels=6, classes=3)
        model = flatbuffer.write_tflite(graph)
        lower = rng.integers(-100, 100, 3)
        upper = lower + (4 if points > 1 else 16)
        truth = truth_of(graph, lower, upper)
        atoms = random_atoms(rng, truth, 5, 6 if points > 1 else 25)
        disjuncts = [f"(and {text_of(a)} {text_of(b)})" for a, b in pairwise(atoms[:3])]
        disjuncts += [text_of(atom) for atom in atoms[3:]]
        for unsafe in ([disjuncts[0], disjuncts[2]], disjuncts):
            query = query_of(lower, upper, 3, unsafe)
            claim, verdict = answer(model, query, method)
            spec = vnnlib.bind(vnnlib.parse(query), graph, "stored")[0].specification
            broken = any(spec.violated(logits) for logits in truth)
            assert verdict in ("unknown", "refuted" if broken else "certified")
            assert rechecked(claim.head, claim.samples, model, query).problems == ()
            (sample,) = claim.samples
            key = sample.verdict, sample.method
            counts[key] = counts.get(key, 0) + 1
            trees += sum(len(proof.nodes) > 1 for proof in sample.proofs)
            missed += verdict == "unknown"
            if sample.verdict == "refuted":
                lie = msgspec.structs.replace(
                    sample, verdict="certified", counterexample="", profile="", method="interval"
                )
                assert not rechecked(claim.head, [lie], model, query).agrees
    assert {"certified", "refuted"} <= {verdict for verdict, _ in counts}
    if method == "complete":
        assert missed == 0 or points == 1
        assert trees > 0 or points > 1
    if method == "linear" and points == 1:
        assert counts.get(("certified", "linear"), 0) > 0


def wide_query(seed: int = 4) -> tuple[Graph, bytes, bytes, Certificate, list[str], Int64Array]:
    """A certified query that needs proofs, with the ends of its box."""
    graph, model, _ = scene(seed)
    rng = np.random.default_rng(seed)
    lower = np.full(9, int(rng.integers(-60, 40)))
    upper = lower + 24
    sampled = execute(graph, rng.integers(lower, upper + 1, (4000, 9)).reshape(-1, 3, 3, 1))
    logits = sampled.reshape(4000, -1)
    disjuncts: list[str] = []
    for one, other in ((0, 1), (1, 2), (2, 3)):
        most = int((logits[:, one] - logits[:, other]).max())
        disjuncts.append(f"(>= (- Y_{one} Y_{other}) {most + 25})")
    disjuncts.append(f"(>= (+ Y_0 Y_1 Y_2) {int(logits[:, :3].sum(axis=1).max()) + 40})")
    query = query_of(lower, upper, 4, disjuncts)
    claim, verdict = answer(model, query, "complete", profiles=("tflite-micro",))
    assert verdict == "certified"
    return graph, model, query, claim, disjuncts, np.stack([lower, upper])


def test_another_query_and_a_dropped_disjunct() -> None:
    graph, model, query, claim, disjuncts, (lower, upper) = wide_query()
    assert any(sample.proofs for sample in claim.samples)
    assert rechecked(claim.head, claim.samples, model, query).problems == ()
    assert "give that file" in reasons(rechecked(claim.head, claim.samples, model, None))
    # The disjunct that the attack breaks was dropped from the query that was certified.
    logits = execute(graph, ((lower + upper) // 2).reshape(1, 3, 3, 1), "tflite-micro")
    middle = int(logits.reshape(-1)[0])
    true = query_of(lower, upper, 4, [*disjuncts, f"(>= Y_0 {middle})"])
    bigger = query_of(lower, upper + 40, 4, disjuncts)
    tighter = query_of(lower, upper, 4, [*disjuncts[:-1], "(>= (+ Y_0 Y_1 Y_2) -900)"])
    cut = int(lower[0]) + 9
    halves = f"(assert (or (<= X_0 {cut}) (>= X_0 {cut + 1})))"
    more = query_of(lower, upper, 4, disjuncts, halves)
    for other in (true, bigger, tighter, more):
        assert "sha256" in reasons(rechecked(claim.head, claim.samples, model, other))
        about = msgspec.structs.replace(
            claim.head, query=certificate.Query("q.vnnlib", sha256_of(other), "stored")
        )
        assert not rechecked(about, claim.samples, model, other).agrees
        if other is true:
            text = reasons(rechecked(about, claim.samples, model, other))
            assert "'certified' cannot be re-derived" in text
    assert query_of(lower, upper, 4, disjuncts) == query


def sha256_of(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_forged_answers() -> None:
    _, model, query, claim, _, _ = wide_query()
    (sample,) = claim.samples
    first, *rest = sample.proofs
    changed: list[Sequence[Proof]] = [
        rest,
        [first, first, *rest],
        [msgspec.structs.replace(first, rival=first.rival + 7), *rest],
        [msgspec.structs.replace(first, box=1), *rest],
        [msgspec.structs.replace(first, group=1), *rest],
        [msgspec.structs.replace(first, nodes=(Leaf("bounds"),)), *rest],
        [msgspec.structs.replace(first, nodes=(Leaf("points"),)), *rest],
        [msgspec.structs.replace(first, nodes=(Leaf("multipliers", "eJwDAAAAAAE="),)), *rest],
        [msgspec.structs.replace(first, nodes=(*first.nodes, Leaf("bounds"))), *rest],
        [msgspec.structs.replace(first, nodes=(Split(0, 0, 3), *first.nodes)), *rest],
    ]
    for proofs in changed:
        lie = msgspec.structs.replace(sample, proofs=tuple(proofs))
        assert not rechecked(claim.head, [lie], model, query).agrees
    for changes in (
        {"label": 0},
        {"prediction": 0},
        {"index": 1},
        {"verdict": "refuted", "method": "sample", "profile": "tflite-micro", "proofs": ()},
        {"verdict": "refuted", "method": "attack", "profile": "tflite-micro", "proofs": (),
         "counterexample": "0000" * 9},
        {"bounds": ()},
        {"radius": 3},
    ):  # fmt: skip
        lie = msgspec.structs.replace(sample, **changes)
        assert not rechecked(claim.head, [lie], model, query).agrees
    for samples in ((), (sample, sample)):
        assert not rechecked(claim.head, samples, model, query).agrees


def test_forged_heads_of_queries() -> None:
    _, model, query, claim, _, _ = wide_query()
    head = claim.head
    data = certificate.Data("made-up", "test", "5e" * 32, 0, 1)
    assert head.query is not None
    for changes in (
        {"data": data},
        {"property": Property("vnnlib", top=2)},
        {"property": Property("vnnlib", radius="3")},
        {"property": Property("levels", radius="3")},
        {"query": None},
        {"query": msgspec.structs.replace(head.query, variables="real")},
        {"query": msgspec.structs.replace(head.query, sha256="00" * 32)},
        {"method": "interval"},
        {"models": head.models * 2, "arithmetic": head.arithmetic * 2},
    ):
        lie = msgspec.structs.replace(head, **changes)
        assert not rechecked(lie, claim.samples, model, query).agrees, changes
    _, other, set_ = scene(3)
    labelled = certified(other, asked(set_, Perturbation.levels(3)))
    assert not rechecked(labelled.head, labelled.samples, other, query).agrees
    lie = msgspec.structs.replace(
        labelled.head,
        property=Property("vnnlib"),
        query=certificate.Query("q.vnnlib", sha256_of(query), "stored"),
    )
    assert not rechecked(lie, labelled.samples, other, query).agrees


def test_a_query_of_several_boxes_and_real_values() -> None:
    """A line for each box, numbered as they stand; one is refuted, the others are not."""
    graph, model, _ = scene(6)
    names = "".join(f"(declare-const X_{i} Real)" for i in range(9))
    names += "".join(f"(declare-const Y_{i} Real)" for i in range(4))
    boxes = ["0.1 0.11", "0.5 0.52", "0.8 0.83"]
    parts = [
        "(and " + " ".join(f"(<= {ends.split()[0]} X_{i} {ends.split()[1]})" for i in range(9))
        + f" (>= Y_0 {bound}))"
        for ends, bound in zip(boxes, (900, -900, 900), strict=True)
    ]  # fmt: skip
    query = f"{names}(assert (or {' '.join(parts)}))".encode()
    claim, verdict = answer(model, query, "interval", variables="real")
    assert verdict == "refuted"
    assert [sample.verdict for sample in claim.samples] == ["certified", "refuted", "certified"]
    assert rechecked(claim.head, claim.samples, model, query).problems == ()
    turned = [
        msgspec.structs.replace(sample, index=i)
        for i, sample in enumerate(claim.samples[1:] + claim.samples[:1])
    ]
    assert not rechecked(claim.head, turned, model, query).agrees
    assert not rechecked(claim.head, claim.samples[:2], model, query).agrees
    broken = claim.samples[1]
    profile = broken.profile
    case = vnnlib.bind(vnnlib.parse(query), graph)[1]
    difference = np.frombuffer(bytes.fromhex(broken.counterexample), "<i2")
    point = case.lower + difference.reshape(case.lower.shape)
    assert (point <= case.upper).all()
    assert case.specification.violated(execute(graph, point, profile).reshape(-1))
    for outside in (-1, int((case.upper - case.lower).max()) + 1):
        text = np.full(9, outside, "<i2").tobytes().hex()
        lie = msgspec.structs.replace(broken, counterexample=text)
        lines = [claim.samples[0], lie, claim.samples[2]]
        assert "outside" in reasons(rechecked(claim.head, lines, model, query))


def test_the_checker_bounds_atoms_from_below_whatever_the_multipliers() -> None:
    """Random codes against every point, on graphs with every operator, splits included."""
    import base64
    import zlib

    closed = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng, shape=(1, 1, 3, 1), depth=int(rng.integers(1, 4)), channels=5)
        name = profiles.DEFAULT
        resolved = profiles.resolve(graph, name)
        lower = rng.integers(-100, 90, (1, 3, 1))
        upper = lower + rng.integers(1, 5, lower.shape)
        logits = execute(resolved, enumerate_box(lower, upper)).reshape(-1, 3)
        checker = LinearChecker(resolved)
        case = checker.case((lower, upper), {})
        assert case is not None
        count = sum(int((s.low < s.high).sum()) for s in case.steps.values())
        for _ in range(4):
            weights = rng.integers(-4, 5, 3)
            terms = tuple((k, int(c)) for k, c in enumerate(weights) if c)
            most = int((logits @ weights).max())
            codes = rng.integers(0, 1 << 15, count).astype("<i4")
            packed = base64.b64encode(zlib.compress(codes.tobytes())).decode()
            leaf = Leaf("multipliers", packed, 20)
            assert checker.never((lower, upper), (Atom(terms, most),), (leaf,)) != ""
            loose = most + 400
            closed += checker.never((lower, upper), (Atom(terms, loose),), (leaf,)) == ""
    assert closed > 20
    assert checker.never((lower, upper), (), (Leaf("bounds"),)) != ""
    huge = Atom(((0, check_linear.LARGEST_WEIGHT),), 1 << 60)
    assert "too large" in checker.never((lower, upper), (huge,), (leaf,))
