"""Certificates of patches, masks, the k largest logits, radii, queries and several models.

A true certificate is accepted, what it says agrees with every point of small boxes, and a forged
one is rejected, also where digest, summary and bounds were made to fit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer

from cactus_edge import certificate, check_linear, decision, flatbuffer, inputs, profiles, vnnlib
from cactus_edge.certificate import Bounds, Head, Property, Sample
from cactus_edge.certificate_stream import Certificate, Reader, load
from cactus_edge.certify import Certifier, Request, Settings, certify
from cactus_edge.certify.engine import cover
from cactus_edge.certify.query_certificate import QueryRequest, answered, certify_query
from cactus_edge.check import CheckResult, check
from cactus_edge.check_linear import LinearChecker
from cactus_edge.cli import properties, proving
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, PropertyNotMetError, UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array, Linear, Weights
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof, Split
from cactus_edge.specification import Atom
from tests.certificates import certified, checked, encoded, read
from tests.graphs import enumerate_box, random_graph

SETTINGS = Settings(steps=8, restarts=1)
NAMES = ("tflite-micro", "tflite-x86")
METHODS: tuple[certificate.Method, ...] = ("interval", "linear", "complete")


def data_for(graph: Graph, count: int, seed: int = 1, wrong: int = 7) -> Dataset:
    """Pixels labelled by the model itself, every ``wrong``-th one wrongly."""
    rng = np.random.default_rng(seed)
    shape = graph.tensors[graph.core_input].shape[1:]
    images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = decision.predict(execute(graph, inputs.stored(graph, images)))
    classes = graph.tensors[graph.logits].size
    labels[::wrong] = (labels[::wrong] + 1) % classes
    return Dataset("made-up", images, labels.astype(np.int64), classes, "test", "5e" * 32)


@cache
def scene(seed: int, classes: int = 4) -> tuple[Graph, bytes, Dataset]:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=(1, 3, 3, 1), depth=2, channels=5, classes=classes)
    return graph, flatbuffer.write_tflite(graph), data_for(graph, 8)


def asked(data: Dataset, perturbation: Perturbation, **options: Any) -> Request:
    return Request(data, perturbation, **{"profiles": NAMES, "budget": 5.0, **options})


def forged(claim: Certificate, model: bytes, data: Dataset, *samples: Sample) -> CheckResult:
    """The certificate with other lines about some samples, and all that is derived from them."""
    by_index = {sample.index: sample for sample in samples}
    lines = [by_index.get(sample.index, sample) for sample in claim.samples]
    return checked(encoded(claim.head, lines), model, data)


def with_property(claim: Certificate, **changes: object) -> Certificate:
    changed = msgspec.structs.replace(claim.head.property, **changes)
    return replace(claim, head=msgspec.structs.replace(claim.head, property=changed))


def bounds_of(certifier: Certifier, lower: Int64Array, upper: Int64Array) -> tuple[Bounds, ...]:
    """What a careful forger states: the hull over some boxes."""
    return tuple(
        Bounds(tuple(low.min(axis=0).tolist()), tuple(high.max(axis=0).tolist()))
        for low, high in certifier.bounds(lower, upper)
    )


def truth_of(graph: Graph, lower: Int64Array, upper: Int64Array) -> Int64Array:
    """Logits of every point of a box under the profiles that are claimed, int64 [any, classes]."""
    points = enumerate_box(lower, upper)
    found = [execute(group.graph, points) for group in cover(graph, NAMES).groups]
    return np.concatenate([logits.reshape(len(points), -1) for logits in found])


def holds(graph: Graph, lower: Int64Array, upper: Int64Array, label: int, top: int = 1) -> bool:
    """The truth about some boxes, from every point."""
    for low, high in zip(lower, upper, strict=True):
        logits = truth_of(graph, low, high)
        if not decision.within(logits, np.full(len(logits), label), top).all():
            return False
    return True


def reasons(result: CheckResult) -> str:
    return " | ".join(result.problems)


# ---------------------------------------------------------------- patches and masks
@pytest.mark.parametrize("method", METHODS)
def test_patches(method: certificate.Method) -> None:
    """Every placement's box counts; small ones can be run, so that nothing stays open."""
    verdicts: set[str] = set()
    for seed in (6, 7):
        graph, model, data = scene(seed)
        around = Perturbation.levels(6).patched(1, 2)
        attack = SETTINGS if method == "interval" else None
        request = asked(data, around, method=method, attack=attack)
        claim = certified(model, request)
        assert claim.head.property.patch == (1, 2, 1)
        assert checked(encoded(claim.head, claim.samples), model, data).problems == ()
        for sample, boxes in zip(
            claim.samples, inputs.boxes(graph, data.images, around), strict=True
        ):
            verdicts.add(sample.verdict)
            assert len(boxes[0]) == 3 * 2
            truth = holds(graph, *boxes, sample.label)
            assert truth or sample.verdict != "certified"
            assert sample.verdict != "refuted" or not truth
            assert method != "complete" or sample.verdict == ("certified" if truth else "refuted")
    assert {"certified", "refuted"} <= verdicts


def test_a_patch_of_a_larger_stride_says_nothing_about_a_smaller_one() -> None:
    """Samples that are safe on every other placement, and broken on one between them."""
    seen = 0
    for seed in (8,):
        graph, model, data = scene(seed)
        sparse, dense = (Perturbation.levels(30).patched(1, 1, stride) for stride in (2, 1))
        wide = certified(model, asked(data, sparse, method="complete"))
        assert checked(encoded(wide.head, wide.samples), model, data).agrees
        assert not checked(
            encoded(with_property(wide, patch=(1, 1, 1)).head, wide.samples), model, data
        ).agrees
        true = certified(model, asked(data, dense, method="complete"))
        certifier = Certifier(graph, NAMES)
        for one, other in zip(wide.samples, true.samples, strict=True):
            if (one.verdict, other.verdict) != ("certified", "refuted"):
                continue
            seen += 1
            ((lower, upper),) = inputs.boxes(graph, data.images[one.index : one.index + 1], dense)
            boxes = range(len(lower))
            points = [
                Proof(p.group, p.rival, (Leaf("points"),), b) for p in one.proofs for b in boxes
            ]
            for proofs in (one.proofs, tuple(points)):
                lie = msgspec.structs.replace(
                    one, bounds=bounds_of(certifier, lower, upper), proofs=proofs
                )
                assert "cannot be re-derived" in reasons(forged(true, model, data, lie))
    assert seen > 0


def test_a_proof_is_about_its_own_box() -> None:
    _, model, data = scene(7)
    request = asked(data, Perturbation.levels(12).patched(2, 2), method="linear")
    claim = certified(model, request)
    sample = next(s for s in claim.samples if len({proof.box for proof in s.proofs}) > 1)
    first, *rest = sample.proofs
    closed = next((b for b in range(4) if b not in {proof.box for proof in sample.proofs}), 4)
    for proofs in (
        rest,
        [*sample.proofs, first],
        [msgspec.structs.replace(first, box=closed), *rest],
        [msgspec.structs.replace(first, box=6), *rest],
        [msgspec.structs.replace(first, box=-1), *rest],
        [*sample.proofs, msgspec.structs.replace(first, box=closed)],
    ):
        lie = msgspec.structs.replace(sample, proofs=tuple(proofs))
        assert not forged(claim, model, data, lie).agrees


def test_bad_patches_are_named() -> None:
    graph, model, data = scene(3)
    claim = certified(model, asked(data, Perturbation.levels(3).patched(2, 2)))
    for patch in ((4, 1, 1), (2, 2, 0), (2, 2), (2, 2, 1, 1), (-1, 2, 1)):
        result = checked(
            encoded(with_property(claim, patch=patch).head, claim.samples), model, data
        )
        assert "property: " in reasons(result)
    with pytest.raises(DataError, match="does not fit an input"):
        certified(model, asked(data, Perturbation.levels(3).patched(9, 2)))


@pytest.mark.parametrize("patch", [(), (2, 2, 1)])
def test_radii_of_elements(patch: tuple[int, ...]) -> None:
    """Masks, by themselves and together with a patch."""
    graph, model, data = scene(7)
    levels = [6, 0, 3, 0, 6, 0, 0, 2, 0]
    around = replace(Perturbation.each("levels", levels), patch=patch)
    claim = certified(model, asked(data, around, attack=SETTINGS))
    assert checked(encoded(claim.head, claim.samples), model, data).problems == ()
    for sample, boxes in zip(claim.samples, inputs.boxes(graph, data.images, around), strict=True):
        if sample.verdict == "certified":
            assert holds(graph, *boxes, sample.label)
    for changed in (["60"] * 9, ["6"] * 8, ["6.0", *map(str, levels[1:])]):
        lie = with_property(claim, radii=tuple(changed))
        assert not checked(encoded(lie.head, lie.samples), model, data).agrees


# ---------------------------------------------------------------- the k largest logits
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top", [2, 3])
def test_top(top: int, method: certificate.Method) -> None:
    """On boxes of few points, and a claim about fewer logits does not follow."""
    verdicts: set[str] = set()
    lies = 0
    for seed in (6, 7):
        graph, model, data = scene(seed)
        around = Perturbation.each("levels", [9, 0, 0, 0, 9, 0, 0, 0, 0])
        request = asked(data, around, top=top, method=method, attack=SETTINGS)
        claim = certified(model, request)
        assert claim.head.property.top == top
        assert checked(encoded(claim.head, claim.samples), model, data).problems == ()
        verdicts |= {sample.verdict for sample in claim.samples}
        less = with_property(claim, top=top - 1, decision=decision.describe(graph, top - 1))
        for sample, boxes in zip(
            claim.samples, inputs.boxes(graph, data.images, around), strict=True
        ):
            truth = holds(graph, *boxes, sample.label, top)
            assert truth or sample.verdict != "certified"
            assert sample.verdict != "refuted" or not truth
            if sample.verdict == "certified" and not holds(graph, *boxes, sample.label, top - 1):
                lies += 1
                problems = reasons(forged(less, model, data))
                assert f"sample {sample.index}: 'certified' cannot be re-derived" in problems
    assert {"certified", "refuted"} <= verdicts or top == 3
    assert lies > 0


def test_proofs_of_top_leave_only_as_many_rivals_as_are_allowed() -> None:
    taken = 0
    for seed in range(3, 9):
        graph, model, data = scene(seed, 5)
        request = asked(data, Perturbation.levels(4), top=2, method="linear")
        claim = certified(model, request)
        assert checked(encoded(claim.head, claim.samples), model, data).problems == ()
        for sample in claim.samples:
            for number, proof in enumerate(sample.proofs):
                rest = sample.proofs[:number] + sample.proofs[number + 1 :]
                lie = msgspec.structs.replace(sample, proofs=rest)
                result = forged(claim, model, data, lie)
                assert "the proofs are not about" in reasons(result) or not rest
                assert not result.agrees
                other = msgspec.structs.replace(proof, rival=sample.label)
                lie = msgspec.structs.replace(sample, proofs=(*rest, other))
                assert not forged(claim, model, data, lie).agrees
                taken += 1
    assert taken > 0


def test_bad_tops() -> None:
    _, model, data = scene(3)
    claim = certified(model, asked(data, Perturbation.levels(3)))
    for top in (-1, 0, 4, 5):
        with pytest.raises(UsageError, match="the model has 4 logits"):
            certified(model, asked(data, Perturbation.levels(3), top=top))
        lie = with_property(claim, top=top)
        assert not checked(encoded(lie.head, lie.samples), model, data).agrees


# ---------------------------------------------------------------- radii of samples
def line_graph() -> tuple[Graph, bytes, Dataset]:
    graph = random_graph(np.random.default_rng(25), shape=(1, 2), depth=2, channels=6, classes=3)
    return graph, flatbuffer.write_tflite(graph), data_for(graph, 10, wrong=5)


@pytest.mark.parametrize("method", METHODS)
def test_radius(method: certificate.Method) -> None:
    graph, model, data = line_graph()
    largest = 9
    request = asked(
        data,
        Perturbation.levels(largest),
        each_radius=True,
        attack=SETTINGS,
        method=method,
    )
    claim = certified(model, request)
    assert (claim.head.property.kind, claim.head.property.radius) == ("radius", "9")
    assert checked(encoded(claim.head, claim.samples), model, data).problems == ()
    stored = inputs.stored(graph, data.images)
    certifier = Certifier(graph, NAMES)
    lies = 0
    for sample, point in zip(claim.samples, stored, strict=True):
        radius = -1 if sample.radius is None else sample.radius
        right = [
            holds(graph, low[None], high[None], sample.label)
            for low, high in (
                inputs.around(graph, point, np.int64(level)) for level in range(largest + 1)
            )
        ]
        assert all(right[: radius + 1])
        assert (sample.verdict == "certified") == (radius == largest)
        assert sample.verdict != "refuted" or not all(right)
        # More levels, with the bounds that belong to them, and all proofs that might do.
        rivals = [k for k in range(3) if k != sample.label]
        groups = range(len(certifier.groups))
        points = tuple(Proof(g, r, (Leaf("points"),)) for g in groups for r in rivals)
        for level in range(radius + 1, largest + 1):
            lower, upper = inputs.around(graph, point[None], np.int64(level))
            bounds = bounds_of(certifier, lower, upper)
            # One level more may be true, but intervals had not shown it.
            if right[level] and (method != "interval" or level > radius + 1):
                continue
            lies += 1
            for proofs in ((), sample.proofs, points):
                lie = msgspec.structs.replace(sample, radius=level, bounds=bounds, proofs=proofs)
                assert not forged(claim, model, data, lie).agrees
            if level > radius + 1:
                break
    assert lies > 2
    assert {"certified", "refuted"} <= {sample.verdict for sample in claim.samples}


def test_radii_that_do_not_fit_the_verdict() -> None:
    graph, model, data = line_graph()
    request = asked(data, Perturbation.levels(9), each_radius=True, attack=SETTINGS)
    claim = certified(model, request)
    whole = next(s for s in claim.samples if s.verdict == "certified")
    broken = next(s for s in claim.samples if s.verdict == "refuted" and s.radius)
    for lie in (
        msgspec.structs.replace(whole, radius=None, bounds=()),
        msgspec.structs.replace(whole, radius=8),
        msgspec.structs.replace(whole, radius=10),
        msgspec.structs.replace(whole, radius=-1),
        msgspec.structs.replace(whole, radius=1 << 70),
        msgspec.structs.replace(whole, verdict="unknown", method="elided-margin"),
        msgspec.structs.replace(broken, radius=9),
        msgspec.structs.replace(broken, counterexample="0100" * 2, method="attack"),
        msgspec.structs.replace(broken, radius=None),
        msgspec.structs.replace(broken, proofs=(Proof(0, 0, (Leaf("bounds"),)),)),
    ):
        assert not forged(claim, model, data, lie).agrees
    # A smaller radius with its own bounds is a weaker claim, and true.
    assert broken.radius is not None
    lower, upper = inputs.around(
        graph, inputs.stored(graph, data.images[broken.index : broken.index + 1]), np.int64(0)
    )
    less = msgspec.structs.replace(
        broken, radius=0, bounds=bounds_of(Certifier(graph, NAMES), lower, upper)
    )
    assert forged(claim, model, data, less).agrees
    for changes in ({"radius": "10"}, {"kind": "levels"}, {"patch": (1, 1, 1)}, {"radius": "1/2"}):
        lie = with_property(claim, **changes)
        assert not checked(encoded(lie.head, lie.samples), model, data).agrees
    with pytest.raises(UsageError, match="a radius is searched in stored levels"):
        certified(model, asked(data, Perturbation.epsilon("0.1"), each_radius=True))


def test_a_radius_certificate_is_resumed_and_divided_like_any_other(tmp_path: Path) -> None:
    _, model, data = line_graph()
    request = asked(
        data, Perturbation.levels(9), each_radius=True, models=(("model.tflite", model),)
    )
    whole, path = BytesIO(), tmp_path / "c.jsonl"
    certify(request, whole)
    lines = whole.getvalue().splitlines(keepends=True)
    (tmp_path / "c.jsonl.partial").write_bytes(b"".join(lines[:6]) + lines[6][:9])
    certify(replace(request, chunk=1), path, resume=True)
    assert path.read_bytes() == whole.getvalue()


# ---------------------------------------------------------------- queries
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


# ---------------------------------------------------------------- compressed versions
def in_four_bits(graph: Graph) -> Graph:
    """The same network with its weights in 4 bits."""
    operators = []
    for op in graph.operators:
        if isinstance(op, Linear):
            values = np.clip(np.rint(op.weights.values / 16), -7, 7).astype(np.int8)
            scale = (16 * op.weights.scale).astype(np.float32).view(np.uint32)
            bias = np.rint(op.bias / 16).astype(np.int32)
            op = replace(op, weights=Weights(values, 4, scale), bias=bias)
        operators.append(op)
    return replace(graph, operators=tuple(operators))


def test_one_certificate_for_int8_and_int4() -> None:
    rng = np.random.default_rng(8)
    whole = random_graph(
        rng, shape=(1, 3, 3, 1), depth=2, channels=5, classes=3, bits=(8,), per_channel=False
    )
    graphs = [whole, in_four_bits(whole)]
    models = [flatbuffer.write_tflite(graph) for graph in graphs]
    data = data_for(whole, 16)
    around = Perturbation.levels(3).patched(1, 2)
    named = tuple(zip(("int8.tflite", "int4.tflite"), models, strict=True))
    stream = BytesIO()
    request = asked(data, around, models=named, method="complete")
    certify(request, stream)
    claim = read(stream.getvalue())
    assert checked(stream.getvalue(), models, data).problems == ()
    alone = [certified(model, replace(request, models=())) for model in models]
    each = [{s.index for s in a.samples if s.verdict == "certified"} for a in alone]
    both = {s.index for s in claim.samples if s.verdict == "certified"}
    assert both == each[0] & each[1]
    lost = sorted(each[0] - each[1])
    assert both and lost, "compression changes nothing: the test says nothing"
    for index, boxes in enumerate(inputs.boxes(whole, data.images, around)):
        label = int(data.labels[index])
        assert (index in both) == all(holds(graph, *boxes, label) for graph in graphs)
    # Certified for int8, claimed for both: with int4's own bounds, and with int8's for both.
    for index in lost:
        true, own = claim.samples[index], alone[0].samples[index]
        assert (true.verdict, true.model) == ("refuted", 1)
        for bounds in (true.bounds, own.bounds * 2, own.bounds):
            lie = msgspec.structs.replace(own, bounds=bounds)
            lines = [*claim.samples[:index], lie, *claim.samples[index + 1 :]]
            assert not checked(encoded(claim.head, lines), models, data).agrees
    # The claim about int8 alone, with int4 named beside it.
    about = msgspec.structs.replace(claim.head, models=claim.head.models[:1] * 2)
    assert not checked(encoded(about, claim.samples), [models[0]] * 2, data).agrees
    assert not checked(stream.getvalue(), [models[0]] * 2, data).agrees


# ---------------------------------------------------------------- the command line
PROFILES = tuple(word for name in NAMES for word in ("--profile", name))
VERBS = typer.Typer()
properties.register(VERBS)
proving.register(VERBS)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    VERBS([str(a) for a in (*arguments, "--json")], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    graph, model, data = scene(3)
    (tmp_path / "m.tflite").write_bytes(model)
    pairs = {"x_test": data.images, "y_test": data.labels}
    np.savez(tmp_path / "d.npz", **pairs, x_train=data.images, y_train=data.labels)
    return tmp_path / "m.tflite", tmp_path / "d.npz"


def test_verbs_certify_and_check(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    folder = model.parent
    mask = np.zeros((3, 3), bool)
    mask[0] = True
    np.save(folder / "mask.npy", mask)
    (folder / "radii.csv").write_text(",".join(["0.01", "0", "2/255"] * 3))
    (folder / "levels.csv").write_text(",".join(["4", "0", "2"] * 3))
    for number, options in enumerate(
        (
            ("--levels", 5, "--patch", "2x1", "--top", 2),
            ("--eps", "0.02", "--mask", folder / "mask.npy"),
            ("--radii", folder / "radii.csv", "--patch", "2x2/1"),
            ("--radii", folder / "levels.csv", "--radii-kind", "levels"),
        )
    ):
        output = folder / f"{number}.jsonl"
        shown = call(
            capsys, "certify", model, "--data", data, *options, "-n", 8, *PROFILES, "-o", output
        )
        assert shown["samples"] == 8
        assert call(capsys, "check", output, model, "--data", data)["agrees"]
        found = load(output).head.property
        assert found.top == (2 if number == 0 else 1)
        assert found.patch == ((2, 1, 1), (), (2, 2, 1), ())[number]
        assert (len(found.radii) == 9) == (number > 0)
    for bad in (
        ("--levels", 5, "--patch", "2by1"),
        ("--levels", 5, "--eps", "0.1"),
        ("--mask", folder / "mask.npy"),
        ("--radii", folder / "radii.csv", "--radii-kind", "pixels"),
        ("--radii", folder / "radii.csv", "--mask", folder / "mask.npy"),
        ("--levels", 5, "--top", 4),
    ):
        with pytest.raises(UsageError):
            call(capsys, "certify", model, "--data", data, *bad, "-o", folder / "bad.jsonl")


def test_verbs_radius_and_verify(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    folder = model.parent
    output = folder / "r.jsonl"
    arguments = ("radius", model, "--data", data, "--largest", 9, "-n", 6, "--attack", *PROFILES)
    shown = call(capsys, *arguments, "-o", output)
    assert shown["rows"] == call(capsys, *arguments)["rows"]
    assert [row["certified"] for row in shown["rows"]] == [
        -1 if sample.radius is None else sample.radius for sample in load(output).samples
    ]
    assert call(capsys, "check", output, model, "--data", data)["agrees"]
    lower = np.full(9, 20)
    for bound, expected in ((900, "certified"), (-900, "refuted")):
        query, output = folder / f"{expected}.vnnlib", folder / f"{expected}.jsonl"
        query.write_bytes(query_of(lower, lower + 3, 4, [f"(>= Y_0 {bound})"]))
        arguments = ("verify", model, query, "--stored", "-o", output, *PROFILES)
        if expected == "certified":
            assert call(capsys, *arguments)["certificate"] == str(output)
        else:
            with pytest.raises(PropertyNotMetError, match="breaks the property"):
                call(capsys, *arguments)
            capsys.readouterr()
        assert [sample.verdict for sample in load(output).samples] == [expected]
        assert call(capsys, "check", output, model, "--query", query)["agrees"]
        with pytest.raises(UsageError, match="needs --query FILE"):
            call(capsys, "check", output, model)
