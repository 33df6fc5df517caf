"""Certificates of patches, masks, the k largest logits, radii, queries and several models.

A true certificate is accepted, what it says agrees with every point of small boxes, and a forged
one is rejected, also where digest, summary and bounds were made to fit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cactus_edge import certificate, decision, flatbuffer, inputs
from cactus_edge.certificate import Bounds, Sample
from cactus_edge.certificate_stream import Certificate
from cactus_edge.certify import Certifier, Request, Settings, certify
from cactus_edge.certify.engine import cover
from cactus_edge.check import CheckResult
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array, Linear, Weights
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof
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
