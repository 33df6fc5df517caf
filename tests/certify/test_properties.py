"""Every kind of property against every point of small boxes, under every profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge import decision, inputs, profiles, scales, specification
from cactus_edge.certify import sweep as sweeping
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import Certifier
from cactus_edge.certify.query import POINTS, Answer, Verifier
from cactus_edge.certify.radius import radii
from cactus_edge.errors import DataError, OutputError, UsageError
from cactus_edge.execute import execute
from cactus_edge.graph import BoolArray, Graph, Int64Array, Quantization
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf, Proof
from cactus_edge.specification import Atom, Specification
from tests.certify.constructed import CASES
from tests.graphs import TINY_SHAPES, enumerate_box, random_box, random_graph

SETTINGS = Settings(steps=12, restarts=1)


def under_every_profile(graph: Graph, points: Int64Array) -> Int64Array:
    """Stored logits, int64 [profiles, points, classes]."""
    outside = profiles.uncovered(graph)
    names = [name for name in profiles.PROFILES if name not in outside]
    return np.stack([execute(graph, points, name).reshape(len(points), -1) for name in names])


@dataclass(frozen=True)
class Truth:
    """Whatever stored logits some point of a box has under some profile, int64 [found, classes]."""

    logits: Int64Array

    @staticmethod
    def of(graph: Graph, lower: Int64Array, upper: Int64Array) -> Truth:
        found = np.concatenate(under_every_profile(graph, enumerate_box(lower, upper)))
        return Truth(np.unique(found, axis=0))


def tiny(seed: int, radius: int, **options: object) -> tuple[Graph, Int64Array, Int64Array]:
    rng = np.random.default_rng(seed)
    shape = TINY_SHAPES[int(rng.integers(len(TINY_SHAPES)))]
    graph = random_graph(
        rng, shape=shape, depth=int(rng.integers(1, 4)), channels=5, **{"classes": 4, **options}
    )  # type: ignore[arg-type]
    return graph, *random_box(rng, graph, radius)


def random_atom(rng: np.random.Generator, truth: Truth) -> Atom:
    """About one, two or all logits, with a bound near what the box attains."""
    classes = truth.logits.shape[1]
    if rng.random() < 0.4:
        label, rival = rng.choice(classes, 2, replace=False).tolist()
        weights = {label: -1, rival: 1}
    else:
        chosen = rng.choice(classes, int(rng.integers(1, classes + 1)), replace=False)
        weights = {int(k): int(rng.integers(-9, 10)) for k in chosen}
    sums = sum((c * truth.logits[:, k] for k, c in weights.items()), np.zeros(1, np.int64))
    low, high = int(sums.min()), int(sums.max())
    bound = int(rng.integers(low - 2, high + max(4, (high - low) // 2)))
    return specification.atom(weights, bound, strict=bool(rng.random() < 0.3))


def random_specification(rng: np.random.Generator, truth: Truth) -> Specification:
    disjuncts = tuple(
        tuple(random_atom(rng, truth) for _ in range(int(rng.integers(1, 3))))
        for _ in range(int(rng.integers(1, 5)))
    )
    return Specification(disjuncts, allowed=int(rng.integers(0, 2)))


def unsafe(spec: Specification, logits: Int64Array) -> BoolArray:
    """The definition, spelled out in NumPy: bool [rows] of logits [rows, classes]."""
    count = np.zeros(len(logits), np.int64)
    for disjunct in spec.unsafe:
        ok = np.ones(len(logits), bool)
        for atom in disjunct:
            weights = np.zeros(logits.shape[1], np.int64)
            for k, c in atom.terms:
                weights[k] += c
            ok &= logits @ weights >= atom.bound
        count += ok
    return count > spec.allowed


def check_answer(
    graph: Graph, answer: Answer, lower: Int64Array, upper: Int64Array, broken: bool, sure: bool
) -> None:
    """``broken``: some point is surely unsafe; ``sure``: every point is surely safe."""
    if answer.verdict == "certified":
        assert sure and not broken
    if answer.verdict == "refuted":
        assert broken
        point = answer.counterexample
        assert point is not None and ((lower <= point) & (point <= upper)).all()
        logits = execute(graph, point[None], answer.profile).reshape(-1)
        assert logits.tolist() == list(answer.logits)


# ---------------------------------------------------------------- specification and decision
@given(seed=st.integers(0, 2**32 - 1))
def test_bounds_exclude_only_what_holds_nowhere_and_all_that_one_atom_excludes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower = rng.integers(-6, 5, 3)
    upper = lower + rng.integers(0, 4, 3)
    points = enumerate_box(lower, upper)
    truth = Truth(points)
    spec = random_specification(rng, truth)
    for disjunct, excluded in zip(spec.unsafe, spec.holds_on_bounds(lower, upper), strict=True):
        alone = [any(atom.holds(p.tolist()) for p in points) for atom in disjunct]
        # Intervals are exact for one atom, so a disjunct is excluded when one of its atoms is.
        assert excluded == (not all(alone))
    for point, is_unsafe in zip(points, unsafe(spec, points), strict=True):
        assert spec.violated(point) == is_unsafe != spec.satisfied(point)


@given(
    weights=st.lists(st.fractions(-3, 3, max_denominator=12), min_size=2, max_size=2),
    bound=st.fractions(-20, 20, max_denominator=12),
    strict=st.booleans(),
)
def test_rational_atoms_hold_for_the_same_integers(
    weights: list[Fraction], bound: Fraction, strict: bool
) -> None:
    found = specification.atom(dict(enumerate(weights)), bound, strict=strict)
    for a in range(-7, 8):
        for b in range(-7, 8):
            total = weights[0] * a + weights[1] * b
            assert found.holds([a, b]) == (total > bound if strict else total >= bound)


def test_real_outputs_are_what_stored_logits_stand_for() -> None:
    graph, _, _ = tiny(3, 2)
    quantization = graph.tensors[graph.logits].quantization
    assert quantization is not None
    scale = scales.decode_float32(quantization.scale_bits).fraction()
    weights, bound = {0: Fraction(3, 2), 2: Fraction(-1)}, Fraction(1, 7)
    for strict in (False, True):
        found = specification.real_atom(graph, weights, bound, strict=strict)
        for a in range(-128, 128, 5):
            for b in range(-128, 128, 5):
                real = [scale * (q - quantization.zero_point) for q in (a, b)]
                total = weights[0] * real[0] + weights[2] * real[1]
                assert found.holds([a, 0, b]) == (total > bound if strict else total >= bound)


@given(
    logits=st.lists(st.integers(-3, 3), min_size=2, max_size=6),
    label=st.integers(0, 5),
    top=st.integers(1, 6),
)
def test_top_k_is_a_stable_sort(logits: list[int], label: int, top: int) -> None:
    label %= len(logits)
    graph = random_graph(
        np.random.default_rng(0), shape=(1, 2), depth=0, classes=len(logits), channels=2
    )
    order = sorted(range(len(logits)), key=lambda k: (-logits[k], k))
    inside = label in order[:top]
    array, labels = np.array([logits]), np.array([label])
    assert decision.within(array, labels, top)[0] == inside
    assert decision.surely_wrong(graph, array, labels, top)[0] == (not inside)
    spec = specification.top(graph, label, top)
    assert spec.violated(logits) != spec.satisfied(logits) == inside
    assert spec.excluded_needed == max(len(logits) - top, 0)
    if top == 1:
        assert inside == (decision.predict(array)[0] == label)


def test_top_k_equals_the_list_of_all_sets_of_k_rivals() -> None:
    graph = random_graph(np.random.default_rng(0), shape=(1, 2), depth=0, classes=5)
    for top in (2, 3):
        spec = specification.top(graph, 2, top)
        every = Specification(tuple(sum(c, ()) for c in combinations(spec.unsafe, top)))
        for logits in np.random.default_rng(1).integers(-2, 3, (300, 5)):
            assert spec.violated(logits) == every.violated(logits)


def softmax_outcomes(logits: Sequence[int], scale: Fraction) -> list[range]:
    """What each stored probability can be: within one step of the exact one."""
    real = np.exp(np.array([float(scale * (q - max(logits))) for q in logits]))
    exact = 256 * real / real.sum()
    return [range(max(int(np.ceil(e - 1)), 0), min(int(np.floor(e + 1)), 255) + 1) for e in exact]


def with_logit_scale(graph: Graph, scale: float) -> Graph:
    tensors = list(graph.tensors)
    old = tensors[graph.logits]
    tensors[graph.logits] = replace(old, quantization=Quantization.of(scale, old.zero_point))
    return replace(graph, tensors=tuple(tensors))


def softmax_logits(rng: np.random.Generator, gap: int) -> Int64Array:
    """Anywhere; close to one another; or two close ones far below the third."""
    kind = int(rng.integers(3))
    if kind == 0:
        return rng.integers(-128, 128, 3)
    if kind == 1:
        return rng.integers(-2, gap + 2, 3)
    close = rng.integers(-100, -98 + gap, 3)
    close[int(rng.integers(3))] = 100
    return close


@pytest.mark.parametrize("scale", [1 / 8, 1 / 64])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_softmax_is_sure_only_where_every_implementation_agrees(top: int, scale: float) -> None:
    """Stored probabilities within a step of the exact ones, monotone in the logits."""
    graph = random_graph(
        np.random.default_rng(5), shape=(1, 2), depth=0, classes=3, edges=("SOFTMAX",)
    )
    graph = with_logit_scale(graph, scale)
    rng = np.random.default_rng(top)
    seen = {"right": 0, "wrong": 0, "unsure": 0}
    for _ in range(300):
        logits = softmax_logits(rng, decision.lead(graph))
        choices = softmax_outcomes(logits.tolist(), Fraction(scale))
        outcomes = set()
        for stored in product(*choices):
            if all(
                stored[a] <= stored[b] and (logits[a] != logits[b] or stored[a] == stored[b])
                for a in range(3)
                for b in range(3)
                if logits[a] <= logits[b]
            ):
                order = sorted(range(3), key=lambda k: (-stored[k], k))
                outcomes.add(frozenset(order[:top]))
        assert outcomes
        for label in range(3):
            spec = specification.top(graph, label, top)
            wrong = decision.surely_wrong(graph, logits[None], np.array([label]), top)[0]
            always = all(label in kept for kept in outcomes)
            never = not any(label in kept for kept in outcomes)
            assert not spec.satisfied(logits) or always
            assert not wrong or never
            # The decision sees at least as many wrong answers as the linear atoms.
            assert not spec.violated(logits) or wrong
            seen["right"] += spec.satisfied(logits)
            seen["wrong"] += bool(wrong)
            seen["unsure"] += not (wrong or spec.satisfied(logits))
    assert seen["right"] > 100
    assert top == 3 or seen["wrong"] > 20
    # Where a single step separates the greatest probability, top-1 leaves nothing open.
    assert top == 3 or (seen["unsure"] > 20) == (top == 2 or decision.lead(graph) > 1)


def test_bad_specifications() -> None:
    graph, _, _ = tiny(1, 1)
    with pytest.raises(DataError, match="label 9, the model has 4 logits"):
        specification.top(graph, 9)
    with pytest.raises(UsageError, match="give at least 1"):
        specification.top(graph, 1, 0)
    with pytest.raises(UsageError, match="allowed"):
        Specification((), allowed=-1)
    with pytest.raises(DataError, match="logit 7, the model has 4"):
        Specification(((Atom(((7, 1),), 0),),)).check(4)


# ---------------------------------------------------------------- the verifier
@pytest.mark.parametrize("seed", range(15))
def test_answers_to_random_properties_are_the_truth(seed: int) -> None:
    graph, lower, upper = tiny(seed, 7, universal=seed % 3 == 0)
    truth = Truth.of(graph, lower, upper)
    assert (upper - lower + 1).prod() <= POINTS
    rng = np.random.default_rng(1000 + seed)
    verifier = Verifier(graph)
    for _ in range(12):
        spec = random_specification(rng, truth)
        (answer,) = verifier.answer(lower[None], upper[None], spec)
        broken = bool(unsafe(spec, truth.logits).any())
        assert answer.verdict == ("refuted" if broken else "certified")
        check_answer(graph, answer, lower, upper, broken, not broken)


def test_every_point_of_a_wide_input_of_which_most_is_fixed() -> None:
    """More elements than an array may have axes, some free, or none."""
    rng = np.random.default_rng(5)
    graph = random_graph(rng, shape=(1, 6, 7, 1), depth=1, classes=3)
    lower = rng.integers(-100, 90, size=(6, 7, 1))
    verifier = Verifier(graph)
    for free in (0, 3):
        upper = lower.copy()
        upper.reshape(-1)[rng.permutation(42)[:free]] += 6
        truth = Truth.of(graph, lower, upper)
        for _ in range(12):
            spec = random_specification(rng, truth)
            broken = bool(unsafe(spec, truth.logits).any())
            (answer,) = verifier.answer(lower[None], upper[None], spec)
            assert answer.verdict == ("refuted" if broken else "certified")
            check_answer(graph, answer, lower, upper, broken, not broken)


@pytest.mark.parametrize("seed", range(12))
def test_cascade_without_enumeration_says_no_more_than_the_truth(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cactus_edge.certify.query.POINTS", 0)
    edges = ("SOFTMAX",) if seed % 4 == 3 else ()
    graph, lower, upper = tiny(seed, 6, edges=edges)
    truth = Truth.of(graph, lower, upper)
    rng = np.random.default_rng(2000 + seed)
    verifier = Verifier(graph)
    specs = [random_specification(rng, truth) for _ in range(8)]
    specs += [specification.top(graph, label, top) for label in range(4) for top in (1, 2, 3)]
    for spec in specs:
        (answer,) = verifier.answer(lower[None], upper[None], spec, settings=SETTINGS)
        broken = any(spec.violated(logits) for logits in truth.logits)
        sure = all(spec.satisfied(logits) for logits in truth.logits)
        check_answer(graph, answer, lower, upper, broken, sure)


def test_margins_and_attacks_close_what_intervals_leave_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all boxes that are open by intervals, many are proved by margins and refuted by search."""
    monkeypatch.setattr("cactus_edge.certify.query.POINTS", 0)
    counts: dict[str, int] = {}
    refutable = refuted = 0
    for seed in range(26):
        graph, lower, upper = tiny(seed, 8)
        truth = Truth.of(graph, lower, upper)
        verifier = Verifier(graph)
        for label in range(4):
            spec = specification.top(graph, label, 1 + seed % 2)
            (answer,) = verifier.answer(lower[None], upper[None], spec, settings=SETTINGS)
            broken = any(spec.violated(logits) for logits in truth.logits)
            refutable += broken
            refuted += answer.verdict == "refuted"
            counts[answer.method] = counts.get(answer.method, 0) + 1
            check_answer(graph, answer, lower, upper, broken, not broken)
    assert counts.get("elided-margin", 0) >= 3
    assert refuted >= 0.9 * refutable > 20


@pytest.mark.parametrize("name", sorted(CASES))
def test_constructed_traps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    for points in (0, POINTS):
        monkeypatch.setattr("cactus_edge.certify.query.POINTS", points)
        for rounding, expected in case.expected.items():
            verifier = Verifier(case.graph, [rounding])
            spec = specification.top(verifier.graph, case.label)
            (answer,) = verifier.answer(
                case.lower[None], case.upper[None], spec, settings=Settings()
            )
            # A universal model's answer is about all profiles, whichever is asked for.
            assert answer.verdict in (expected, "unknown")
            if points:
                assert answer.verdict == expected
        verdicts = set(case.expected.values())
        together = next(v for v in ("refuted", "unknown", "certified") if v in verdicts)
        verifier = Verifier(case.graph)
        spec = specification.top(verifier.graph, case.label)
        (answer,) = verifier.answer(case.lower[None], case.upper[None], spec, settings=Settings())
        assert answer.verdict in (together, "unknown" if not points else together)


def test_prover_is_asked_for_what_is_open_and_its_proofs_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cactus_edge.certify.query.POINTS", 0)
    graph, lower, upper = tiny(4, 6)
    verifier = Verifier(graph)
    spec = Specification(((Atom(((0, 1), (1, 1)), -1000),), (Atom(((0, 1),), 1000),)))
    asked: list[Graph] = []

    def prove(
        resolved: Graph, low: Int64Array, high: Int64Array, asked_for: Specification
    ) -> tuple[set[int], tuple[Proof, ...]]:
        assert (low.shape, high.shape) == ((1, *lower.shape),) * 2 and asked_for == spec
        asked.append(resolved)
        return {0, 99}, (Proof(0, 0, (Leaf("rule"),)),)

    (answer,) = verifier.answer(lower[None], upper[None], spec, prove=prove)
    assert (answer.verdict, answer.method) == ("certified", "linear")
    assert asked == [group.graph for group in verifier.coverage.groups]
    assert [proof.group for proof in answer.proofs] == list(range(len(asked)))
    (answer,) = verifier.answer(lower[None], upper[None], spec, prove=lambda *_: ({99}, ()))
    assert (answer.verdict, answer.method) == ("unknown", "linear")


def test_a_union_is_refuted_by_its_first_counterexample_and_certified_by_all() -> None:
    graph, lower, upper = tiny(6, 4)
    truth = Truth.of(graph, lower, upper)
    verifier = Verifier(graph)
    least = int(truth.logits[:, 0].min())
    safe = Specification(((Atom(((0, -1),), 1 - least),),))
    broken = Specification(((Atom(((0, -1),), -least),),))
    box = lower[None], upper[None]
    seen: list[tuple[int, int]] = []
    union = [(*box, safe), (*box, broken), (*box, safe)]
    answer = verifier.decide(union, total=3, progress=lambda *done: seen.append(done))
    assert (answer.verdict, answer.box, seen) == ("refuted", 1, [(1, 3)])
    answer = verifier.decide([(*box, safe)] * 2)
    assert answer.verdict == "certified"
    with pytest.raises(DataError, match="no input at all"):
        verifier.decide([])
    with pytest.raises(DataError, match="empty"):
        verifier.answer(
            upper[None] + 1 - 1, lower[None] - 1 if lower.min() > -128 else lower[None], safe
        )


# ---------------------------------------------------------------- perturbation sets
@pytest.mark.parametrize("seed", range(6))
def test_patches_are_certified_placement_by_placement(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=(1, 3, 3, 1), depth=2, classes=3)
    image = rng.integers(0, 256, (1, 3, 3, 1)).astype(np.uint8)
    perturbation = Perturbation.levels(3).patched(2, 1)
    ((low, high),) = inputs.boxes(graph, image, perturbation)
    assert len(low) == 2 * 3
    label = int(decision.predict(execute(graph, inputs.stored(graph, image)))[0])
    verifier = Verifier(graph)
    answers = verifier.answer(low, high, specification.top(verifier.graph, label))
    for answer, lower, upper in zip(answers, low, high, strict=True):
        truth = Truth.of(graph, lower, upper)
        right = bool((decision.predict(truth.logits) == label).all())
        assert answer.verdict == ("certified" if right else "refuted")


# ---------------------------------------------------------------- radii and sweeps
def data(graph: Graph, seed: int, count: int) -> tuple[np.ndarray, Int64Array]:
    rng = np.random.default_rng(seed)
    shape = graph.tensors[graph.core_input].shape[1:]
    images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    for image in images[1::2]:
        image.flat[0] = 0  # this element can only grow
    labels = decision.predict(execute(graph, inputs.stored(graph, images)))
    labels[::5] = (labels[::5] + 1) % 3
    return images, labels.astype(np.int64)


@pytest.mark.parametrize("seed", range(6))
def test_radii_are_true_and_counterexamples_lie_at_their_distance(seed: int) -> None:
    graph, _, _ = tiny(seed, 1, classes=3)
    images, labels = data(graph, seed, 6)
    certifier = Certifier(graph)
    seen: list[tuple[int, int]] = []
    found = radii(
        certifier,
        images,
        labels,
        largest=6,
        first=5,
        settings=SETTINGS,
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(6, 6)] and [r.index for r in found] == list(range(5, 11))
    stored = inputs.stored(graph, images)
    for i, result in enumerate(found):
        points = enumerate_box(*inputs.around(graph, stored[i], np.int64(6)))
        logits = under_every_profile(graph, points)
        wrong = (decision.predict(np.concatenate(logits)) != labels[i]).reshape(len(logits), -1)
        away = np.abs(points - stored[i]).reshape(len(points), -1).max(axis=1)
        distance = int(away[wrong.any(axis=0)].min(initial=6 + 1))
        assert -1 <= result.certified < distance
        assert (result.refuted == 0) == (result.prediction != labels[i])
        if result.refuted is not None:
            point = result.counterexample
            assert point is not None and distance <= result.refuted <= 6
            assert int(np.abs(point - stored[i]).max()) == result.refuted
            logits = execute(graph, point[None], result.profile)
            assert decision.predict(logits)[0] != labels[i]
    assert sum(r.refuted is not None for r in found) >= 2
    plain = radii(certifier, images, labels, largest=6)
    assert all(a.certified <= b.certified for a, b in zip(plain, found, strict=True))


def test_radius_is_the_largest_that_the_certifier_certifies() -> None:
    """Intervals and margins are monotone on these, so that bisection has to find the last one."""
    graph, _, _ = tiny(2, 1, classes=3)
    images, labels = data(graph, 2, 8)
    certifier = Certifier(graph)
    stored = inputs.stored(graph, images)
    by_level = np.stack(
        [
            [
                s.verdict == "certified"
                for s in certifier.verdicts(
                    0, stored, *inputs.around(graph, stored, np.int64(level)), labels
                )
            ]
            for level in range(21)
        ]
    )
    found = np.array([r.certified for r in radii(certifier, images, labels, largest=20)])
    assert (by_level.sum(axis=0) - 1 == found).all()
    assert found.max() > 0


def test_bad_radii(tmp_path: Path) -> None:
    graph, _, _ = tiny(2, 1, classes=3)
    images, labels = data(graph, 2, 3)
    certifier = Certifier(graph)
    with pytest.raises(UsageError, match="outside 0..255"):
        radii(certifier, images, labels, largest=256)
    with pytest.raises(DataError, match="3 samples and 2 labels"):
        radii(certifier, images, labels[:2])
    with pytest.raises(UsageError, match="at least one radius"):
        sweeping.sweep(certifier, images, labels, [])


def test_sweep_counts_what_the_certifier_says_and_draws_it(tmp_path: Path) -> None:
    graph, _, _ = tiny(9, 1, classes=3)
    images, labels = data(graph, 9, 10)
    certifier = Certifier(graph)
    perturbations = [Perturbation.levels(level) for level in (8, 0, 2)]
    curve = sweeping.sweep(certifier, images, labels, perturbations, settings=SETTINGS)
    stored = inputs.stored(graph, images)
    for point, perturbation in zip(curve.points, perturbations, strict=True):
        box = inputs.box(graph, images, perturbation)
        verdicts = [s.verdict for s in certifier.verdicts(0, stored, *box, labels, SETTINGS)]
        assert (point.kind, point.radius) == ("levels", str(perturbation.radius))
        assert point.certified == verdicts.count("certified")
        assert point.refuted == verdicts.count("refuted")
        assert point.certified + point.refuted + point.unknown + point.errors == curve.samples
    assert curve.correct == 8
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in (first, second):
        sweeping.draw(curve, path, "a model")
    assert first.read_bytes() == second.read_bytes()
    assert b"<svg" in first.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        sweeping.draw(curve, first, "a model")
