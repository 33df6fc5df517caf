"""The independent checker agrees with true certificates and rejects every changed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cactus_edge import certificate, check_bounds, flatbuffer, universal
from cactus_edge.certificate import Bounds, Certificate, Sample
from cactus_edge.certify import Certifier, Request, Settings, certify
from cactus_edge.check import check
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError
from cactus_edge.graph import (
    FullyConnected,
    Graph,
    Linear,
    Quantization,
    Requantization,
    Tensor,
    Weights,
)
from cactus_edge.inputs import Perturbation
from cactus_edge.semantics import Rounding
from tests.graphs import random_graph

COUNT = 60


def dataset(graph: Graph, labels: np.ndarray) -> Dataset:
    rng = np.random.default_rng(1)
    shape = graph.tensors[graph.input].shape[1:]
    images = rng.random((len(labels), *shape), dtype=np.float32)
    return Dataset("made-up", images, labels, int(labels.max()) + 1, "test", "5e" * 32)


def case(is_universal: bool) -> tuple[Graph, bytes, Dataset, Certificate]:
    """A model, data labelled by the model itself (a few wrongly), and its certificate."""
    rng = np.random.default_rng(5)
    shape = (1, 4, 4, 2)
    graph = random_graph(rng, shape=shape, depth=3, classes=4, universal=is_universal)
    while universal.is_universal(graph) is not is_universal:
        graph = random_graph(rng, shape=shape, depth=3, classes=4, universal=is_universal)
    model = flatbuffer.write_tflite(graph)
    data = dataset(graph, np.zeros(COUNT, np.int64))
    first = certify(model, Request(data, Perturbation.levels(0)))
    labels = np.array([s.prediction for s in first.samples])
    labels[::9] = (labels[::9] + 1) % 4
    data = replace(data, labels=labels, classes=4)
    claim = certify(model, Request(data, Perturbation.levels(3), attack=Settings(steps=8)))
    return graph, model, data, claim


@pytest.fixture(scope="module", params=[True, False], ids=["universal", "conjunction"])
def made(request: pytest.FixtureRequest) -> tuple[Graph, bytes, Dataset, Certificate]:
    return case(bool(request.param))


def sealed(claim: Certificate) -> Certificate:
    """With a fresh digest and summary, as a careful forger would write it."""
    attacked = claim.summary.attack_accuracy is not None
    claim = msgspec.structs.replace(
        claim, summary=certificate.summarize(claim.samples, attacked), digest=""
    )
    return msgspec.structs.replace(claim, digest=certificate.digest(claim))


def with_sample(claim: Certificate, chosen: str, /, **changes: object) -> Certificate:
    """Change the first sample that has this verdict."""
    index = next(i for i, s in enumerate(claim.samples) if s.verdict == chosen)
    changed = msgspec.structs.replace(claim.samples[index], **changes)
    samples = (*claim.samples[:index], changed, *claim.samples[index + 1 :])
    return msgspec.structs.replace(claim, samples=samples)


def test_true_certificates_agree(made: tuple[Graph, bytes, Dataset, Certificate]) -> None:
    _, model, data, claim = made
    verdicts = {s.verdict for s in claim.samples}
    assert {"certified", "refuted"} <= verdicts, "the case is too easy to say anything"
    result = check(sealed(claim), model, data)
    assert result.problems == ()
    assert result.samples == COUNT


def test_survives_the_file(made: tuple[Graph, bytes, Dataset, Certificate], tmp_path: Path) -> None:
    _, model, data, claim = made
    path = tmp_path / "certificate.json"
    path.write_bytes(certificate.encode(claim))
    assert check(certificate.load(path), model, data).agrees


def _first_linear(graph: Graph) -> tuple[int, Linear]:
    return next((i, op) for i, op in enumerate(graph.operators) if isinstance(op, Linear))


def _with_operator(graph: Graph, index: int, op: Linear) -> bytes:
    operators = (*graph.operators[:index], op, *graph.operators[index + 1 :])
    return flatbuffer.write_tflite(replace(graph, operators=operators))


def test_every_single_weight_counts(made: tuple[Graph, bytes, Dataset, Certificate]) -> None:
    graph, _, data, claim = made
    index, op = _first_linear(graph)
    for position in range(0, op.weights.values.size, max(1, op.weights.values.size // 7)):
        values = op.weights.values.copy()
        values.flat[position] += 1 if values.flat[position] < 1 else -1
        changed = replace(op, weights=replace(op.weights, values=values))
        result = check(sealed(claim), _with_operator(graph, index, changed), data)
        assert any("sha256" in p for p in result.problems)
        assert any("fingerprint" in p for p in result.problems)


def test_every_scale_counts(made: tuple[Graph, bytes, Dataset, Certificate]) -> None:
    graph, _, data, claim = made
    index, op = _first_linear(graph)
    for channel in range(op.weights.scale_bits.size):
        bits = op.weights.scale_bits.copy()
        bits[channel] += 1
        changed = replace(op, weights=replace(op.weights, scale_bits=bits))
        result = check(sealed(claim), _with_operator(graph, index, changed), data)
        assert any("fingerprint" in p for p in result.problems)


FORGERIES: dict[str, Callable[[Certificate], Certificate]] = {
    "label": lambda c: with_sample(c, "certified", label=(c.samples[1].label + 1) % 4),
    "prediction": lambda c: with_sample(c, "certified", prediction=9),
    "refuted becomes certified": lambda c: with_sample(
        c, "refuted", verdict="certified", method="interval", counterexample="", profile=""
    ),
    "certified becomes unknown": lambda c: with_sample(c, "certified", verdict="unknown"),
    "certified becomes refuted": lambda c: with_sample(
        c, "certified", verdict="refuted", profile=c.arithmetic.profiles[0]
    ),
    "bounds": lambda c: with_sample(
        c, "certified", bounds=(Bounds((0,) * 4, (1,) * 4),) * len(c.samples[0].bounds)
    ),
    "counterexample outside the box": lambda c: with_sample(
        c, "refuted", counterexample=(np.full(32, 99, "<i2")).tobytes().hex()
    ),
    "counterexample of another size": lambda c: with_sample(c, "refuted", counterexample="0000"),
    "counterexample that is none": lambda c: with_sample(c, "refuted", counterexample="zz"),
    "unknown profile of a counterexample": lambda c: with_sample(c, "refuted", profile="nobody"),
    "radius": lambda c: msgspec.structs.replace(
        c, property=msgspec.structs.replace(c.property, radius="9")
    ),
    "negative radius": lambda c: msgspec.structs.replace(
        c, property=msgspec.structs.replace(c.property, radius="-3")
    ),
    "radius that is none": lambda c: msgspec.structs.replace(
        c, property=msgspec.structs.replace(c.property, radius="1/0")
    ),
    "method": lambda c: with_sample(c, "certified", method="branch and bound"),
    "verifier": lambda c: msgspec.structs.replace(c, verifier="branch and bound"),
    "decision rule": lambda c: msgspec.structs.replace(
        c, property=msgspec.structs.replace(c.property, decision="highest index wins")
    ),
    "input map": lambda c: msgspec.structs.replace(c, input_map={"kind": "pixel"}),
    "rounding": lambda c: msgspec.structs.replace(
        c,
        arithmetic=msgspec.structs.replace(
            c.arithmetic,
            rounding="conjunction" if c.arithmetic.rounding == "universal" else "universal",
        ),
    ),
    "a profile renamed": lambda c: msgspec.structs.replace(
        c,
        arithmetic=msgspec.structs.replace(
            c.arithmetic, profiles=("nobody", *c.arithmetic.profiles[1:])
        ),
    ),
    "a profile left out": lambda c: msgspec.structs.replace(
        c, arithmetic=msgspec.structs.replace(c.arithmetic, profiles=c.arithmetic.profiles[1:])
    ),
    "data": lambda c: msgspec.structs.replace(
        c, data=msgspec.structs.replace(c.data, sha256="00" * 32)
    ),
    "a sample left out": lambda c: msgspec.structs.replace(c, samples=c.samples[1:]),
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=str)
def test_forgeries_are_rejected(
    made: tuple[Graph, bytes, Dataset, Certificate], forgery: str
) -> None:
    """Even with digest and summary made to fit, and without that in any case."""
    _, model, data, claim = made
    forged = FORGERIES[forgery](sealed(claim))
    assert not check(forged, model, data).agrees, "digest"
    result = check(sealed(forged), model, data)
    if forgery == "a profile left out" and claim.arithmetic.rounding == "conjunction":
        # A claim about fewer runtimes is weaker and true, but its witnesses must be theirs.
        names = [p for p in result.problems if "bounds" in p or "profile" in p]
        assert result.agrees or names
        return
    assert not result.agrees
    if "radius" not in forgery:
        assert len(result.problems) <= 20


def test_another_rounding_profile_is_another_claim() -> None:
    """A certificate for one runtime does not pass for one that rounds otherwise on this model."""
    _, model, data, _ = case(is_universal=False)
    request = Request(data, Perturbation.levels(3), profiles=("single-rounding",))
    claim = certify(model, request)
    assert check(sealed(claim), model, data).agrees
    verdicts = set[bool]()
    for name in ("tflite-micro", "litert-xnnpack-x86", "tflite-x86"):
        arithmetic = msgspec.structs.replace(claim.arithmetic, profiles=(name,))
        forged = sealed(msgspec.structs.replace(claim, arithmetic=arithmetic))
        verdicts.add(check(forged, model, data).agrees)
    assert verdicts == {False}


def test_summary_must_follow_from_the_samples(
    made: tuple[Graph, bytes, Dataset, Certificate],
) -> None:
    _, model, data, claim = made
    summary = msgspec.structs.replace(claim.summary, certified_accuracy=1.0)
    forged = msgspec.structs.replace(claim, summary=summary, digest="")
    forged = msgspec.structs.replace(forged, digest=certificate.digest(forged))
    assert any("summary" in p for p in check(forged, model, data).problems)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"format": "x"}', b"\xff\xfe\x00", b"[" * 5000],
)
def test_files_that_are_no_certificate(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a certificate"):
        certificate.load(path)


def test_another_version_is_named(
    made: tuple[Graph, bytes, Dataset, Certificate], tmp_path: Path
) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(made[3], version=99)))
    with pytest.raises(DataError, match="version 99"):
        certificate.load(path)


def test_error_verdicts_claim_nothing() -> None:
    sample = Sample(0, 0, -1, "error", "none", message="x")
    summary = certificate.summarize([sample], attacked=False)
    assert (summary.standard_accuracy, summary.certified_accuracy) == (0, 0)
    assert summary.verdicts["error"] == 1


def test_the_certifier_refuses_what_is_no_box() -> None:
    graph, _, data, _ = case(is_universal=True)
    stored = np.zeros((2, *graph.tensors[graph.input].shape[1:]), np.int64)
    certifier = Certifier(graph)
    zero = np.zeros(2, np.int64)
    for lower, upper, labels, message in (
        (stored + 1, stored + 2, zero, "outside its box"),
        (stored, stored - 1, zero, "outside its box"),
        (stored, stored, zero - 1, "labels"),
        (stored, stored, zero + 4, "labels"),
        (stored, stored, np.zeros(3, np.int64), "differ in number"),
        (stored - 300, stored, zero, "values outside"),
        (stored.astype(np.float64), stored, zero, "stored integers"),
    ):
        with pytest.raises(DataError, match=message):
            certifier.verdicts(0, stored, lower, upper, labels)
    with pytest.raises(DataError, match="box is empty"):
        certifier.bounds(stored + 1, stored)


def test_an_error_is_no_verdict_that_holds() -> None:
    _, model, data, claim = case(is_universal=True)
    forged = with_sample(claim, "refuted", verdict="error", method="none")
    assert any("certify again" in p for p in check(sealed(forged), model, data).problems)


def test_a_layer_that_nothing_reads_does_not_stand_for_the_last_one() -> None:
    """Margins are proved through the layer of the logits, wherever other layers stand."""
    rng = np.random.default_rng(2)
    quantization = Quantization.of(0.05, -128)
    factors = Requantization.uniform(Rounding.SINGLE, 1 << 30, 37, 3)

    def layer(name: str, source: int, target: int) -> FullyConnected:
        return FullyConnected(
            name=name,
            inputs=(source,),
            output=target,
            weights=Weights(rng.integers(-99, 99, (3, 3))),
            bias=rng.integers(-500, 500, 3),
            requantization=factors,
        )

    tensors = tuple(Tensor(f"t{i}", (1, 3), quantization=quantization) for i in range(4))
    operators = (layer("hidden", 0, 1), layer("logits", 1, 2), layer("dead", 2, 3))
    graph = Graph(tensors, operators, 0, 2)
    box = (np.full((1, 3), -20), np.full((1, 3), 30))
    _, hidden = check_bounds.logits_box(graph, box)
    expected, _ = check_bounds.logits_box(replace(graph, output=1), box)
    assert all(np.array_equal(a, b) for a, b in zip(hidden, expected, strict=True))
    layer_of_logits = check_bounds.last_layer(graph)
    assert layer_of_logits is not None
    assert layer_of_logits.name == "logits"
