"""Mutations: deliberate faults of the certifier, of certificates and of the checker itself.

The tables are the documentation. ``mutations.FAULTS`` breaks the certifier and ``FORGERIES``
changes a true certificate, its digest and summary made to fit; the checker has to reject the
result in the words that are given. ``COMPARED`` and ``SHARED`` are what no certificate shows:
bounds that are a little too good, and faults in the text that certifier and checker both stand on;
there every point of small boxes is run. ``LENIENT`` takes a test out of the checker, and a forgery
passes: so each of these tests is needed, and the forgery is caught by it and not by accident.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from cactus_edge import (
    certificate,
    check_head,
    check_linear,
    check_margin,
    inputs,
    profiles,
)
from cactus_edge.certificate import Bounds, Sample, line_of
from cactus_edge.certificate_stream import Certificate, Reader
from cactus_edge.check_sample import Facts
from cactus_edge.execute import execute
from cactus_edge.graph import Linear
from cactus_edge.proofs import Leaf, Proof, Split
from tests.certificates import checked, encoded
from tests.certify.mutations import (
    FAULTS,
    NAMES,
    NOT_CLOSED,
    NOT_DERIVED,
    SCENES,
    Patch,
    Scene,
    scene,
    steady,
    with_layer,
)

Nodes = tuple[Split | Leaf, ...]


def problems(name: str, claim: Certificate) -> tuple[str, ...]:
    """What the checker says about a certificate of a scene."""
    made = scene(name)
    return checked(encoded(claim.head, claim.samples), made.model, made.data).problems


@pytest.fixture(scope="module")
def honest() -> dict[str, Certificate]:
    """The certificate of each scene, by the certifier as it is."""
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        return {name: scene(name).certificate() for name in SCENES}


@pytest.mark.parametrize("name", SCENES, ids=str)
def test_without_a_mutation_certificates_are_accepted(
    honest: dict[str, Certificate], name: str
) -> None:
    assert problems(name, honest[name]) == ()


def test_the_scenes_have_something_to_mutate(honest: dict[str, Certificate]) -> None:
    samples = honest["trees"].samples
    assert {sample.verdict for sample in samples} == {"certified", "refuted", "unknown"}
    nodes = [node for sample in samples for proof in sample.proofs for node in proof.nodes]
    entry = scene("trees").graph.core_input
    assert any(isinstance(node, Split) and node.tensor == entry for node in nodes)
    assert any(isinstance(node, Split) and node.tensor != entry for node in nodes)
    leaves = {node.method for node in nodes if isinstance(node, Leaf)}
    assert leaves == {"bounds", "multipliers"}
    assert len({proof.group for sample in samples for proof in sample.proofs}) == len(NAMES)


def parts(made: Scene) -> Iterator[Scene]:
    """A quarter of the samples after the other, so that the first false claim is met early.

    And all of them: some faults take two samples.
    """
    count = len(made.data.labels)
    size = -(-count // 4)
    for first in range(0, count, size):
        request = replace(made.request, first=first, count=min(size, count - first))
        yield replace(made, request=request)
    yield made


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_of_the_certifier_are_rejected(fault: str) -> None:
    broken = FAULTS[fault]
    found: tuple[str, ...] = ()
    for part in parts(scene(broken.scene)):
        with pytest.MonkeyPatch.context() as patch:
            steady(patch)
            broken.patch(patch)
            claim = part.certificate()
        found = problems(broken.scene, claim)
        if any(broken.words in problem for problem in found):
            return
    raise AssertionError(found)


# ---------------------------------------------------------------- forgeries
def chosen(claim: Certificate, verdict: str, method: str = "") -> int:
    """The last sample of this verdict and method; of trees, one that has multipliers in each."""

    def fits(sample: Sample) -> bool:
        complete = (sample.verdict, sample.method) == ("certified", "complete")
        rich = not complete or all(_is_rich(proof.nodes) for proof in sample.proofs)
        return sample.verdict == verdict and method in ("", sample.method) and rich

    return max(i for i, sample in enumerate(claim.samples) if fits(sample))


def _is_rich(tree: Nodes) -> bool:
    methods = {node.method for node in tree if isinstance(node, Leaf)}
    return isinstance(tree[0], Split) and "multipliers" in methods


def put(claim: Certificate, index: int, /, **changes: object) -> Certificate:
    """A sample changed."""
    samples = list(claim.samples)
    samples[index] = msgspec.structs.replace(samples[index], **changes)
    return replace(claim, samples=tuple(samples))


def proofs(change: Callable[[Proof], Proof]) -> Callable[[Certificate], Certificate]:
    """Each proof of a sample whose trees have splits and multipliers, changed."""

    def forge(claim: Certificate) -> Certificate:
        index = chosen(claim, "certified", "complete")
        return put(claim, index, proofs=tuple(map(change, claim.samples[index].proofs)))

    return forge


def nodes(change: Callable[[Nodes], Nodes]) -> Callable[[Certificate], Certificate]:
    return proofs(lambda proof: msgspec.structs.replace(proof, nodes=change(proof.nodes)))


def root(**changes: object) -> Callable[[Certificate], Certificate]:
    """The first split of each tree, changed."""
    return nodes(lambda tree: (msgspec.structs.replace(tree[0], **changes), *tree[1:]))


def leaves(**changes: object) -> Callable[[Certificate], Certificate]:
    """Every leaf with multipliers, changed."""

    def change(node: Split | Leaf) -> Split | Leaf:
        used = isinstance(node, Leaf) and node.method == "multipliers"
        return msgspec.structs.replace(node, **changes) if used else node

    return nodes(lambda tree: tuple(map(change, tree)))


def codes(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Certificate], Certificate]:
    """The multipliers of every leaf that has some, changed."""

    def changed(node: Split | Leaf) -> Split | Leaf:
        if not isinstance(node, Leaf) or node.method != "multipliers":
            return node
        raw = zlib.decompress(base64.b64decode(node.multipliers))
        packed = change(np.frombuffer(raw, "<i4")).astype("<i4").tobytes()
        text = base64.b64encode(zlib.compress(packed, 9)).decode()
        return msgspec.structs.replace(node, multipliers=text)

    return nodes(lambda tree: tuple(map(changed, tree)))


def one_reversed(given: np.ndarray) -> np.ndarray:
    """The greatest multiplier with the other sign."""
    changed = given.copy()
    changed[np.abs(given).argmax()] *= -1
    return changed


def children(tree: Nodes) -> tuple[Nodes, Nodes]:
    """The two subtrees of a tree that begins with a split."""
    open_, end = 1, 1
    while open_:
        open_ += 1 if isinstance(tree[end], Split) else -1
        end += 1
    return tree[1:end], tree[end:]


def turned(tree: Nodes) -> Nodes:
    """Both subtrees of the root swapped."""
    first, second = children(tree)
    return (tree[0], *second, *first)


def moved_root(tree: Nodes) -> Nodes:
    """The root divides elsewhere: what was the smaller of the children is nearly everything."""
    first, second = children(tree)
    assert isinstance(tree[0], Split)
    level = 126 if len(first) <= len(second) else -127
    return (msgspec.structs.replace(tree[0], level=level), *tree[1:])


def borrowed(verdict: str) -> Callable[[Certificate], Certificate]:
    """An open or refuted sample becomes certified, with another sample's proofs."""

    def forge(claim: Certificate) -> Certificate:
        lender = claim.samples[chosen(claim, "certified", "complete")]
        return put(
            claim,
            chosen(claim, verdict, "complete" if verdict == "refuted" else ""),
            verdict="certified",
            method="complete",
            proofs=lender.proofs,
            counterexample="",
            profile="",
            model=0,
        )

    return forge


def kept(keep: Callable[[int], bool]) -> Callable[[Certificate], Certificate]:
    """Some of the proofs of a sample."""

    def forge(claim: Certificate) -> Certificate:
        index = chosen(claim, "certified", "complete")
        given = claim.samples[index].proofs
        return put(claim, index, proofs=tuple(p for i, p in enumerate(given) if keep(i)))

    return forge


def proof_twice(claim: Certificate) -> Certificate:
    index = chosen(claim, "certified", "complete")
    given = claim.samples[index].proofs
    return put(claim, index, proofs=(*given, given[0]))


def bound_moved(claim: Certificate) -> Certificate:
    """The label's lower bound a step higher."""
    index = chosen(claim, "certified", "interval")
    first, *rest = claim.samples[index].bounds
    low = list(first.lower)
    low[claim.samples[index].label] += 1
    return put(claim, index, bounds=(Bounds(tuple(low), first.upper), *rest))


def offsets(claim: Certificate) -> tuple[int, np.ndarray]:
    """A refuted sample of the trees and its counterexample's distance from it."""
    index = chosen(claim, "refuted", "complete")
    return index, np.frombuffer(bytes.fromhex(claim.samples[index].counterexample), "<i2").copy()


def is_right(sample: Sample, away: np.ndarray) -> bool:
    """Whether the trees' model classifies a point as labelled, under the profile that is named."""
    made = scene("trees")
    stored = inputs.stored(made.graph, made.data.images[sample.index : sample.index + 1])
    resolved = profiles.resolve(made.graph, sample.profile)
    return int(execute(resolved, stored + away.reshape(stored.shape)).argmax()) == sample.label


def level_off(claim: Certificate) -> Certificate:
    """From the counterexample level by level to the sample: the first point that is no longer one.

    It differs from a true counterexample by one level of one element.
    """
    index, away = offsets(claim)
    while not is_right(claim.samples[index], away):
        element = int(np.abs(away).argmax())
        away[element] -= np.sign(away[element])
    return put(claim, index, counterexample=away.astype("<i2").tobytes().hex())


def outside(claim: Certificate) -> Certificate:
    """One element leaves the box by one level, and the point is still misclassified."""
    index, away = offsets(claim)
    for element in range(away.size):
        for end in (-5, 5):
            moved = away.copy()
            moved[element] = end
            if not is_right(claim.samples[index], moved):
                return put(claim, index, counterexample=moved.astype("<i2").tobytes().hex())
    raise AssertionError("no misclassified point lies a level outside")


def head(**changes: object) -> Callable[[Certificate], Certificate]:
    return lambda c: replace(c, head=msgspec.structs.replace(c.head, **changes))


def part(name: str, **changes: object) -> Callable[[Certificate], Certificate]:
    """A field of the head that is a record, or a tuple with one."""

    def forge(claim: Certificate) -> Certificate:
        value = getattr(claim.head, name)
        first = value[0] if isinstance(value, tuple) else value
        changed = msgspec.structs.replace(first, **changes)
        return head(**{name: (changed,) if isinstance(value, tuple) else changed})(claim)

    return forge


def samples(
    change: Callable[[tuple[Sample, ...]], tuple[Sample, ...]],
) -> Callable[[Certificate], Certificate]:
    return lambda claim: replace(claim, samples=change(claim.samples))


def relabelled(claim: Certificate) -> Certificate:
    index = chosen(claim, "certified", "interval")
    return put(claim, index, label=(claim.samples[index].label + 1) % 4)


@dataclass(frozen=True)
class Forgery:
    """``edit`` changes the certificate of the trees; the checker rejects it with ``words``."""

    edit: Callable[[Certificate], Certificate]
    words: str


LEFT_OPEN = "the proofs are not about"
FORGERIES: dict[str, Forgery] = {
    # Multipliers.
    "signs of all multipliers": Forgery(codes(lambda given: -given), NOT_CLOSED),
    "sign of one multiplier": Forgery(codes(one_reversed), NOT_CLOSED),
    "no multipliers": Forgery(codes(lambda given: 0 * given), NOT_CLOSED),
    "one multiplier short": Forgery(codes(lambda given: given[1:]), "multipliers where"),
    "one multiplier more": Forgery(codes(lambda c: np.append(c, 0)), "multipliers where"),
    "a multiplier out of range": Forgery(codes(lambda c: c * 0 + (1 << 28)), "out of range"),
    "multipliers that are none": Forgery(leaves(multipliers="?"), "cannot be read"),
    "a finer target than int64 bears": Forgery(leaves(bits=40), "a target of 40 bits"),
    # Trees.
    "a leaf left out": Forgery(nodes(lambda tree: tree[:-1]), "leaves out a case"),
    "a leaf too many": Forgery(nodes(lambda tree: (*tree, Leaf("bounds"))), "behind the tree's"),
    "subtrees swapped": Forgery(nodes(turned), NOT_CLOSED),
    "a level changed": Forgery(nodes(moved_root), NOT_CLOSED),
    "a split on an element that is not there": Forgery(root(element=99), "no element 99"),
    "a split on a tensor that is not there": Forgery(root(tensor=99), "of tensor 99"),
    "a split on an element counted from the end": Forgery(root(element=-1), "no element -1"),
    "bounds that do not suffice": Forgery(leaves(method="bounds"), NOT_CLOSED),
    "bounds instead of a tree": Forgery(nodes(lambda _: (Leaf("bounds"),)), NOT_CLOSED),
    "points of a large box": Forgery(nodes(lambda _: (Leaf("points"),)), "more than 4096 points"),
    "no tree at all": Forgery(nodes(lambda _: ()), "leaves out a case"),
    # What is proved.
    "a rival left out": Forgery(kept(lambda i: i > 0), LEFT_OPEN),
    "no proofs": Forgery(kept(lambda i: False), LEFT_OPEN),
    "a proof twice": Forgery(proof_twice, LEFT_OPEN),
    "a proof of another group": Forgery(
        proofs(lambda p: msgspec.structs.replace(p, group=(p.group + 1) % 4)), LEFT_OPEN
    ),
    "a proof of another rival": Forgery(
        proofs(lambda p: msgspec.structs.replace(p, rival=p.rival ^ 1)), LEFT_OPEN
    ),
    "trees by the name of one bound": Forgery(
        lambda c: put(c, chosen(c, "certified", "complete"), method="linear"), "not by method"
    ),
    "intervals where a tree was needed": Forgery(
        lambda c: put(c, chosen(c, "certified", "complete"), method="interval", proofs=()),
        NOT_DERIVED,
    ),
    "unknown, certified with another's proof": Forgery(borrowed("unknown"), NOT_DERIVED),
    "refuted, certified with another's proof": Forgery(borrowed("refuted"), NOT_DERIVED),
    "certified becomes unknown": Forgery(
        lambda c: put(c, chosen(c, "certified", "interval"), verdict="unknown"),
        "'unknown', yet it can be certified",
    ),
    "a bound a step too good": Forgery(bound_moved, "bounds of the logits differ"),
    # Counterexamples.
    "a level off a counterexample": Forgery(level_off, "classified as labelled"),
    "outside the box": Forgery(outside, "outside the perturbation set"),
    "under a profile that is not claimed": Forgery(
        lambda c: put(c, offsets(c)[0], profile="tflite-x86"), "not among those certified"
    ),
    # Samples.
    "a sample left out": Forgery(samples(lambda s: s[:-1]), "the head says"),
    "a sample twice": Forgery(samples(lambda s: (*s, s[-1])), "more samples than the head says"),
    "one sample instead of another": Forgery(
        samples(lambda s: (*s[:3], s[2], *s[4:])), "index or label differs"
    ),
    "label": Forgery(relabelled, "index or label differs"),
    # The head.
    "radius": Forgery(part("property", radius="5"), "bounds of the logits differ"),
    "a profile left out": Forgery(part("arithmetic", profiles=NAMES[:2]), "bounds of the logits"),
    "a profile more": Forgery(
        part("arithmetic", profiles=(*NAMES, "tflite-x86")), "bounds of the logits"
    ),
    "hash of the model": Forgery(part("models", sha256="00" * 32), "sha256"),
    "fingerprint": Forgery(part("models", fingerprint="00" * 32), "fingerprint"),
    "hash of the data": Forgery(part("data", sha256="00" * 32), "of another hash"),
    "less effort than it took": Forgery(
        head(
            method="linear",
            verifier=certificate.VERIFIERS["linear"],
        ),
        "the strongest method was 'linear'",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=str)
def test_forgeries_are_rejected(honest: dict[str, Certificate], forgery: str) -> None:
    claim = honest["trees"]
    forged = FORGERIES[forgery].edit(claim)
    assert forged != claim, "nothing was forged"
    found = problems("trees", forged)
    assert any(FORGERIES[forgery].words in problem for problem in found), found
    lines = [forged.head, *forged.samples, claim.tail]  # with the digest of what it was
    reader = Reader(BytesIO(b"".join(map(line_of, lines))), "memory")
    assert len(list(reader.samples())) == len(forged.samples)
    assert any("digest" in problem for problem in reader.problems())


def test_a_weight_of_the_model_is_changed(honest: dict[str, Certificate]) -> None:
    made, claim = scene("trees"), honest["trees"]

    def change(op: Linear) -> Linear:
        values = op.weights.values.copy()
        values.flat[0] += 1 if values.flat[0] < 1 else -1
        return replace(op, weights=replace(op.weights, values=values))

    other = replace(made, graph=with_layer(made.graph, change)).model
    found = checked(encoded(claim.head, claim.samples), other, made.data).problems
    assert any("sha256" in problem for problem in found)


# ---------------------------------------------------------------- faults of the checker
def swallowed(patch: Patch) -> None:
    """Trees may end early."""
    true = check_linear.LinearChecker._leaves

    def lenient(self: check_linear.LinearChecker, given: Nodes) -> Iterator[object]:
        try:
            yield from true(self, given)
        except check_linear.Refused:
            return

    patch.setattr(check_linear.LinearChecker, "_leaves", lenient)


def everywhere(patch: Patch) -> None:
    """A counterexample may lie anywhere."""
    true = Facts._counterexample

    def lenient(self: Facts, sample: Sample) -> str:
        low, high = self.reach
        return true(replace(self, reach=(low - 999, high + 999)), sample)

    patch.setattr(Facts, "_counterexample", lenient)


def not_run(patch: Patch) -> None:
    """Every point but the sample itself counts as misclassified."""
    true = Facts._wrong

    def lenient(self: Facts, number: int, point: np.ndarray | None) -> bool:
        return point is not None or true(self, number, point)

    patch.setattr(Facts, "_wrong", lenient)


def any_margin(patch: Patch) -> None:
    """A leaf is closed by whatever bound it has."""
    fake = SimpleNamespace(**{**vars(check_margin), "proved": lambda *_: True})
    patch.setattr(check_linear, "check_margin", fake)


LENIENT: dict[str, tuple[Callable[[Patch], None], str]] = {
    "any margin closes a leaf": (any_margin, "signs of all multipliers"),
    "intervals close a leaf": (any_margin, "bounds that do not suffice"),
    "subtrees need not be where they belong": (any_margin, "a level changed"),
    "trees may end early": (swallowed, "a leaf left out"),
    "any number of points is run": (
        lambda p: p.setattr(check_linear, "POINTS", 1 << 20),
        "points of a large box",
    ),
    "counterexamples lie anywhere": (everywhere, "outside the box"),
    "counterexamples are not run": (not_run, "a level off a counterexample"),
    "models are not hashed": (
        lambda p: p.setattr(check_head, "_model", lambda *_: iter(())),
        "hash of the model",
    ),
    "data are not hashed": (
        lambda p: p.setattr(check_head, "_data", lambda *_: iter(())),
        "hash of the data",
    ),
}


@pytest.mark.parametrize("fault", LENIENT, ids=str)
def test_a_lenient_checker_lets_a_forgery_pass(honest: dict[str, Certificate], fault: str) -> None:
    """So the forgery is rejected by this test of the checker and by no other one."""
    loosen, forgery = LENIENT[fault]
    forged = FORGERIES[forgery].edit(honest["trees"])
    with pytest.MonkeyPatch.context() as patch:
        loosen(patch)
        assert problems("trees", forged) == ()
