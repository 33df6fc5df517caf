"""The independent checker agrees with true certificates and rejects every changed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cactus_edge import certificate, check_bounds, flatbuffer, universal
from cactus_edge.certificate import Bounds, Sample, line_of
from cactus_edge.certificate_stream import Certificate, load, reading
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
from cactus_edge.proofs import Leaf, Proof
from cactus_edge.semantics import Rounding
from tests.certificates import certified, checked, encoded
from tests.graphs import random_graph

COUNT = 60
Made = tuple[Graph, bytes, Dataset, Certificate]


def dataset(graph: Graph, labels: np.ndarray) -> Dataset:
    rng = np.random.default_rng(1)
    shape = graph.tensors[graph.input].shape[1:]
    images = rng.random((len(labels), *shape), dtype=np.float32)
    return Dataset("made-up", images, labels, int(labels.max()) + 1, "test", "5e" * 32)


def model_of(is_universal: bool, seed: int = 5) -> Graph:
    rng = np.random.default_rng(seed)
    while True:
        graph = random_graph(rng, shape=(1, 4, 4, 2), depth=3, classes=4, universal=is_universal)
        if universal.is_universal(graph) is is_universal:
            return graph


def case(is_universal: bool) -> Made:
    """A model, data labelled by the model itself (a few wrongly), and its certificate."""
    graph = model_of(is_universal)
    model = flatbuffer.write_tflite(graph)
    data = dataset(graph, np.zeros(COUNT, np.int64))
    first = certified(model, Request(data, Perturbation.levels(0)))
    labels = np.array([s.prediction for s in first.samples])
    labels[::9] = (labels[::9] + 1) % 4
    data = replace(data, labels=labels, classes=4)
    request = Request(data, Perturbation.levels(3), attack=Settings(steps=8))
    return graph, model, data, certified(model, request)


@pytest.fixture(scope="module", params=[True, False], ids=["universal", "conjunction"])
def made(request: pytest.FixtureRequest) -> Made:
    return case(bool(request.param))


def file_of(claim: Certificate) -> bytes:
    """The file, with a fresh digest and summary, as a careful forger would write it."""
    return encoded(claim.head, claim.samples)


def with_sample(claim: Certificate, chosen: str, /, **changes: object) -> Certificate:
    """Change the first sample that has this verdict."""
    index = next(i for i, s in enumerate(claim.samples) if s.verdict == chosen)
    changed = msgspec.structs.replace(claim.samples[index], **changes)
    return replace(claim, samples=(*claim.samples[:index], changed, *claim.samples[index + 1 :]))


def with_head(claim: Certificate, **changes: object) -> Certificate:
    return replace(claim, head=msgspec.structs.replace(claim.head, **changes))


def with_property(claim: Certificate, **changes: object) -> Certificate:
    return with_head(claim, property=msgspec.structs.replace(claim.head.property, **changes))


def with_arithmetic(claim: Certificate, **changes: object) -> Certificate:
    return with_head(
        claim, arithmetic=(msgspec.structs.replace(claim.head.arithmetic[0], **changes),)
    )


def with_data(claim: Certificate, **changes: object) -> Certificate:
    assert claim.head.data is not None
    return with_head(claim, data=msgspec.structs.replace(claim.head.data, **changes))


def swapped(claim: Certificate, one: int, other: int) -> Certificate:
    samples = list(claim.samples)
    samples[one], samples[other] = samples[other], samples[one]
    return replace(claim, samples=tuple(samples))


def test_true_certificates_agree(made: Made) -> None:
    _, model, data, claim = made
    verdicts = {s.verdict for s in claim.samples}
    assert {"certified", "refuted"} <= verdicts, "the case is too easy to say anything"
    result = checked(file_of(claim), model, data)
    assert result.problems == ()
    assert result.samples == COUNT


def test_survives_the_file(made: Made, tmp_path: Path) -> None:
    _, model, data, claim = made
    path = tmp_path / "certificate.jsonl"
    path.write_bytes(file_of(claim))
    assert load(path) == claim
    with reading(path) as reader:
        assert check(reader, [model], data).agrees
        assert reader.tail == claim.tail


def _first_linear(graph: Graph) -> tuple[int, Linear]:
    return next((i, op) for i, op in enumerate(graph.operators) if isinstance(op, Linear))


def _with_operator(graph: Graph, index: int, op: Linear) -> bytes:
    operators = (*graph.operators[:index], op, *graph.operators[index + 1 :])
    return flatbuffer.write_tflite(replace(graph, operators=operators))


def test_every_single_weight_counts(made: Made) -> None:
    graph, _, data, claim = made
    index, op = _first_linear(graph)
    for position in range(0, op.weights.values.size, max(1, op.weights.values.size // 7)):
        values = op.weights.values.copy()
        values.flat[position] += 1 if values.flat[position] < 1 else -1
        changed = replace(op, weights=replace(op.weights, values=values))
        result = checked(file_of(claim), _with_operator(graph, index, changed), data)
        assert any("sha256" in p for p in result.problems)
        assert any("fingerprint" in p for p in result.problems)


def test_every_scale_counts(made: Made) -> None:
    graph, _, data, claim = made
    index, op = _first_linear(graph)
    for channel in range(op.weights.scale_bits.size):
        bits = op.weights.scale_bits.copy()
        bits[channel] += 1
        changed = replace(op, weights=replace(op.weights, scale_bits=bits))
        result = checked(file_of(claim), _with_operator(graph, index, changed), data)
        assert any("fingerprint" in p for p in result.problems)


PROOF = Proof(0, 0, (Leaf("bounds"),))
FORGERIES: dict[str, Callable[[Certificate], Certificate]] = {
    "label": lambda c: with_sample(c, "certified", label=(c.samples[1].label + 1) % 4),
    "prediction": lambda c: with_sample(c, "certified", prediction=9),
    "refuted becomes certified": lambda c: with_sample(
        c, "refuted", verdict="certified", method="interval", counterexample="", profile=""
    ),
    "certified becomes unknown": lambda c: with_sample(
        c, "certified", verdict="unknown", method="elided-margin"
    ),
    "certified becomes refuted": lambda c: with_sample(
        c,
        "certified",
        verdict="refuted",
        method="sample",
        profile=c.head.arithmetic[0].profiles[0],
    ),
    "refuted becomes unknown": lambda c: with_sample(
        c, "refuted", verdict="unknown", method="elided-margin", counterexample="", profile=""
    ),
    "bounds": lambda c: with_sample(
        c, "certified", bounds=(Bounds((0,) * 4, (1,) * 4),) * len(c.samples[0].bounds)
    ),
    "bounds left out": lambda c: with_sample(c, "certified", bounds=()),
    "counterexample outside the box": lambda c: with_sample(
        c, "refuted", method="attack", counterexample=(np.full(32, 99, "<i2")).tobytes().hex()
    ),
    "counterexample of another size": lambda c: with_sample(
        c, "refuted", method="attack", counterexample="0000"
    ),
    "counterexample that is none": lambda c: with_sample(c, "refuted", counterexample="zz"),
    "counterexample of no attack": lambda c: with_sample(
        c, "refuted", method="sample", counterexample=(np.full(32, 1, "<i2")).tobytes().hex()
    ),
    "unknown profile of a counterexample": lambda c: with_sample(c, "refuted", profile="nobody"),
    "model of a counterexample": lambda c: with_sample(c, "refuted", model=1),
    "counterexample of a certified one": lambda c: with_sample(
        c, "certified", counterexample="0000"
    ),
    "message of a certified one": lambda c: with_sample(c, "certified", message="trust me"),
    "radius of a sample": lambda c: with_sample(c, "certified", radius=9),
    "proofs that nobody needs": lambda c: with_sample(c, "certified", proofs=(PROOF,)),
    "radius": lambda c: with_property(c, radius="9"),
    "negative radius": lambda c: with_property(c, radius="-3"),
    "radius that is none": lambda c: with_property(c, radius="1/0"),
    "radius written otherwise": lambda c: with_property(c, radius="3.0"),
    "radius of endless digits": lambda c: with_property(c, radius="9" * 10_000),
    "kind of the property": lambda c: with_property(c, kind="epsilon", radius="3"),
    "smaller radii for some": lambda c: with_property(c, radius="", radii=("3",) * 31 + ("4",)),
    "radii of another size": lambda c: with_property(c, radius="", radii=("3",) * 31),
    "a patch": lambda c: with_property(c, patch=(2, 2, 1)),
    "top two": lambda c: with_property(c, top=2),
    "top of none": lambda c: with_property(c, top=0),
    "method": lambda c: with_sample(c, "certified", method="branch and bound"),
    "method of a sample beyond the head's": lambda c: with_sample(c, "certified", method="linear"),
    "the head's method": lambda c: with_head(c, method="linear"),
    "the head's method and its text": lambda c: with_head(
        c, method="complete", verifier=certificate.VERIFIERS["complete"]
    ),
    "no attack in the search": lambda c: with_head(c, search=certificate.Search()),
    "a poem in the search": lambda c: with_head(
        c, search=certificate.Search(attack="none was ever as strong")
    ),
    "verifier": lambda c: with_head(c, verifier="branch and bound"),
    "side conditions": lambda c: with_head(c, side_conditions=()),
    "tool": lambda c: with_head(c, tool="something else"),
    "how to check": lambda c: with_head(c, how_to_check="true"),
    "decision rule": lambda c: with_property(c, decision="highest index wins"),
    "input map": lambda c: with_head(c, input_map={"kind": "pixel"}),
    "rounding": lambda c: with_arithmetic(
        c,
        rounding=("conjunction" if c.head.arithmetic[0].rounding == "universal" else "universal"),
    ),
    "a profile renamed": lambda c: with_arithmetic(
        c, profiles=("nobody", *c.head.arithmetic[0].profiles[1:])
    ),
    "a profile twice": lambda c: with_arithmetic(
        c, profiles=c.head.arithmetic[0].profiles[:1] + c.head.arithmetic[0].profiles
    ),
    "a profile left out": lambda c: with_arithmetic(c, profiles=c.head.arithmetic[0].profiles[1:]),
    "a reason of its own": lambda c: with_arithmetic(c, uncovered={"tflite-x86": "who cares"}),
    "no arithmetic": lambda c: with_head(c, arithmetic=()),
    "no model": lambda c: with_head(c, models=(), arithmetic=()),
    "a model twice": lambda c: with_head(
        c, models=c.head.models * 2, arithmetic=c.head.arithmetic * 2
    ),
    "size of the model": lambda c: with_head(
        c, models=(msgspec.structs.replace(c.head.models[0], bytes=1),)
    ),
    "data": lambda c: with_data(c, sha256="00" * 32),
    "name of the data": lambda c: with_data(c, name="mnist"),
    "split": lambda c: with_data(c, split="train"),
    "first sample": lambda c: with_data(c, first=1),
    "a range beyond the data": lambda c: with_data(c, count=10**12),
    "no samples": lambda c: replace(with_data(c, count=0), samples=()),
    "no data": lambda c: with_head(c, data=None),
    "a query": lambda c: with_head(c, query=certificate.Query("q", "00" * 32, "real")),
    "a sample left out": lambda c: replace(c, samples=c.samples[1:]),
    "the last sample left out": lambda c: replace(c, samples=c.samples[:-1]),
    "a sample twice": lambda c: replace(c, samples=(*c.samples[:5], *c.samples[4:])),
    "the last sample twice": lambda c: replace(c, samples=(*c.samples, c.samples[-1])),
    "lines swapped": lambda c: swapped(c, 3, 4),
    "index of a sample": lambda c: with_sample(c, "certified", index=2**70),
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=str)
def test_forgeries_are_rejected(made: Made, forgery: str) -> None:
    """Even with digest and summary made to fit, and without that in any case."""
    _, model, data, claim = made
    forged = FORGERIES[forgery](claim)
    lines = [forged.head, *forged.samples, claim.tail]
    assert not checked(b"".join(line_of(part) for part in lines), model, data).agrees, "digest"
    result = checked(file_of(forged), model, data)
    if forgery == "a profile left out" and claim.head.arithmetic[0].rounding == "conjunction":
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
    claim = certified(model, request)
    assert checked(file_of(claim), model, data).agrees
    verdicts = set[bool]()
    for name in ("tflite-micro", "litert-xnnpack-x86", "tflite-x86"):
        forged = with_arithmetic(claim, profiles=(name,))
        verdicts.add(checked(file_of(forged), model, data).agrees)
    assert verdicts == {False}


def test_summary_must_follow_from_the_samples(made: Made) -> None:
    _, model, data, claim = made
    summary = msgspec.structs.replace(claim.tail.summary, certified_accuracy=1.0)
    tally = certificate.Tally()
    lines = [line_of(claim.head), *(line_of(sample) for sample in claim.samples)]
    tally.head(lines[0])
    for line in lines[1:]:
        tally.sample(line)
    tail = certificate.Tail(summary, tally.digest(summary))
    problems = checked(b"".join([*lines, line_of(tail)]), model, data).problems
    assert [p.partition(":")[0] for p in problems] == ["summary"]


def test_the_tail_of_another_file(made: Made) -> None:
    _, model, data, claim = made
    other = certified(model, Request(data, Perturbation.levels(3), count=COUNT - 1))
    lines = file_of(claim).splitlines(keepends=True)
    lines[-1] = line_of(other.tail)
    problems = checked(b"".join(lines), model, data).problems
    assert {p.partition(":")[0] for p in problems} == {"digest", "summary"}


@pytest.mark.parametrize("kind", ["head", "sample", "tail"])
def test_every_changed_byte_is_noticed(made: Made, kind: str) -> None:
    """A changed byte makes a file that is none, or one whose digest does not fit."""
    _, model, data, claim = made
    short = Request(data, Perturbation.levels(3), count=1)
    content = file_of(certified(model, short))
    lines = content.splitlines(keepends=True)
    number = {"head": 0, "sample": 1, "tail": 2}[kind]
    begin = sum(len(line) for line in lines[:number])
    for position in range(begin, begin + len(lines[number]), 7):
        changed = bytearray(content)
        changed[position] ^= 1
        try:
            assert not checked(bytes(changed), model, data).agrees, position
        except DataError:
            continue


# ---------------------------------------------------------------- several models
@pytest.fixture(scope="module")
def pair() -> tuple[list[bytes], Dataset, Certificate, bytes]:
    """Two models that take the same inputs, one universal and one not, and their certificate."""
    graphs = [model_of(True), model_of(False, 6)]
    quantization = graphs[0].tensors[graphs[0].input].quantization
    tensors = list(graphs[1].tensors)
    if tensors[graphs[1].input].quantization != quantization:
        tensors[graphs[1].input] = replace(tensors[graphs[1].input], quantization=quantization)
        graphs[1] = replace(graphs[1], tensors=tuple(tensors))
    models = [flatbuffer.write_tflite(graph) for graph in graphs]
    data = dataset(graphs[0], np.zeros(COUNT, np.int64))
    winners = [
        [s.prediction for s in certified(model, Request(data, Perturbation.levels(0))).samples]
        for model in models
    ]
    data = replace(data, labels=np.array(winners[0]), classes=4)
    assert winners[0] != winners[1]
    stream = BytesIO()
    named = tuple(zip(("a.tflite", "b.tflite"), models, strict=True))
    certify(Request(data, Perturbation.levels(1), models=named, attack=Settings(steps=5)), stream)
    reader = stream.getvalue()
    return models, data, _parsed(reader), reader


def _parsed(content: bytes) -> Certificate:
    head, *samples, tail = content.splitlines(keepends=True)
    return Certificate(
        certificate.head_of(head),
        tuple(certificate.sample_of(line) for line in samples),
        certificate.tail_of(tail),
    )


def test_one_certificate_for_several_models(
    pair: tuple[list[bytes], Dataset, Certificate, bytes],
) -> None:
    models, data, claim, content = pair
    assert checked(content, models, data).problems == ()
    assert [model.file for model in claim.head.models] == ["a.tflite", "b.tflite"]
    assert {a.rounding for a in claim.head.arithmetic} == {"universal", "conjunction"}
    alone = [certified(model, Request(data, Perturbation.levels(1))).samples for model in models]
    both = {s.index for s in claim.samples if s.verdict == "certified"}
    each = [{s.index for s in samples if s.verdict == "certified"} for samples in alone]
    assert both == each[0] & each[1]
    assert {s.model for s in claim.samples if s.verdict == "refuted"} >= {1}


def test_the_order_of_models_counts(pair: tuple[list[bytes], Dataset, Certificate, bytes]) -> None:
    models, data, claim, content = pair
    assert not checked(content, models[::-1], data).agrees
    assert not checked(content, models[:1], data).agrees
    assert not checked(content, [*models, models[0]], data).agrees
    head = claim.head
    turned = msgspec.structs.replace(head, models=head.models[::-1])
    assert not checked(encoded(turned, claim.samples), models, data).agrees
    turned = msgspec.structs.replace(
        head,
        models=head.models[::-1],
        arithmetic=head.arithmetic[::-1],
        how_to_check=certificate.how_to_check(["b.tflite", "a.tflite"], data.name),
    )
    problems = checked(encoded(turned, claim.samples), models[::-1], data).problems
    assert any("bounds" in problem for problem in problems)


def test_a_counterexample_names_its_model(
    pair: tuple[list[bytes], Dataset, Certificate, bytes],
) -> None:
    models, data, claim, _ = pair
    index = next(i for i, s in enumerate(claim.samples) if s.model == 1)
    for number in (0, 2, -1):
        changed = msgspec.structs.replace(claim.samples[index], model=number)
        samples = (*claim.samples[:index], changed, *claim.samples[index + 1 :])
        assert not checked(encoded(claim.head, samples), models, data).agrees, number


def test_models_that_do_not_go_together() -> None:
    graph = model_of(True)
    rng = np.random.default_rng(0)
    other = random_graph(rng, shape=(1, 4, 4, 2), depth=3, classes=5, universal=True)
    models = tuple((name, flatbuffer.write_tflite(g)) for name, g in (("a", graph), ("b", other)))
    data = dataset(graph, np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"b: (input map|number of logits)"):
        certify(Request(data, Perturbation.levels(1), models=models), BytesIO())


# ---------------------------------------------------------------- methods beyond intervals
def test_a_forged_proof(made: Made) -> None:
    """``linear`` and ``complete`` need proofs of exactly what bounds leave open."""
    _, model, data, claim = made
    for method in ("linear", "complete"):
        head = msgspec.structs.replace(
            claim.head,
            method=method,
            verifier=certificate.VERIFIERS[method],
            search=msgspec.structs.replace(claim.head.search, budget="1 s", memory=1),
        )
        assert checked(encoded(head, claim.samples), model, data).agrees
        wrong = replace(claim, head=head)
        rivals = range(4)
        for proofs in ((), (PROOF,), tuple(Proof(0, r, (Leaf("bounds"),)) for r in rivals)):
            forged = with_sample(
                wrong,
                "refuted",
                verdict="certified",
                method=method,
                counterexample="",
                profile="",
                proofs=proofs,
            )
            assert not checked(file_of(forged), model, data).agrees
            idle = with_sample(wrong, "certified", method=method, proofs=proofs)
            assert not checked(file_of(idle), model, data).agrees


@pytest.mark.parametrize("method", ["linear", "complete"])
def test_what_linear_bounds_certify_is_re_derived(method: certificate.Method) -> None:
    """Proofs that were found hold, and none of them holds for another rival or group."""
    rng = np.random.default_rng(2)
    graph = random_graph(rng, shape=(1, 4, 4, 2), depth=2, classes=3, universal=False)
    model = flatbuffer.write_tflite(graph)
    data = dataset(graph, np.zeros(16, np.int64))
    plain = certified(model, Request(data, Perturbation.levels(0)))
    data = replace(data, labels=np.array([s.prediction for s in plain.samples]), classes=3)
    claim = certified(model, Request(data, Perturbation.levels(2), method=method, budget=1))
    proved = [i for i, s in enumerate(claim.samples) if s.proofs]
    assert proved, "nothing was left for linear bounds: the test says nothing"
    assert checked(file_of(claim), model, data).problems == ()
    for i in proved[:1]:
        sample = claim.samples[i]
        first = sample.proofs[0]
        for proofs in (
            sample.proofs[1:],
            (*sample.proofs, first),
            (msgspec.structs.replace(first, rival=sample.label), *sample.proofs[1:]),
            (msgspec.structs.replace(first, group=99), *sample.proofs[1:]),
            (msgspec.structs.replace(first, nodes=()), *sample.proofs[1:]),
        ):
            forged = msgspec.structs.replace(sample, proofs=proofs)
            samples = (*claim.samples[:i], forged, *claim.samples[i + 1 :])
            assert not checked(encoded(claim.head, samples), model, data).agrees


# ---------------------------------------------------------------- files
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"format": "x"}', b"\xff\xfe\x00", b"[" * 5000],
)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_files_that_are_no_certificate(content: bytes, end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "certificate.jsonl"
    path.write_bytes(content + end)
    with pytest.raises(DataError, match="not a certificate"):
        load(path)


def test_the_summary_beside_a_model_is_told_from_a_certificate() -> None:
    with pytest.raises(DataError, match=r"certificate\.json beside a model"):
        load(Path("models/digits-0.05/certificate.json"))


@pytest.mark.parametrize("version", [1, 3, 99])
def test_another_version_is_named(made: Made, tmp_path: Path, version: int) -> None:
    path = tmp_path / "certificate.jsonl"
    path.write_bytes(line_of(msgspec.structs.replace(made[3].head, version=version)))
    with pytest.raises(DataError, match=f"version {version}"):
        load(path)


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
    assert any("certify again" in p for p in checked(file_of(forged), model, data).problems)


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
