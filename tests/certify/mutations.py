"""Deliberate faults of the certifier: what somebody who maintains it could get wrong.

``FAULTS`` lists them with the scene in which they lead to a false certificate, and the words with
which the independent checker rejects it. A fault is put into the names that the certifier looks up,
never into what the checker stands on; where both stand on the same text (``SHARED``), only running
every point of a box can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cactus_edge import decision, flatbuffer, inputs, profiles
from cactus_edge.certificate import Method
from cactus_edge.certificate_stream import Certificate
from cactus_edge.certify import Request, Settings, engine, margin
from cactus_edge.certify.attack import search as true_search
from cactus_edge.certify.decide import Decider
from cactus_edge.certify.intervals import IntervalSession
from cactus_edge.certify.linear import bounds, goals
from cactus_edge.certify.linear import search as tree
from cactus_edge.certify.linear.bounds import Line
from cactus_edge.certify.linear.network import Stairs, network
from cactus_edge.certify.linear.search import Budget
from cactus_edge.datasets import Dataset
from cactus_edge.execute import execute
from cactus_edge.graph import Activation, Graph, Linear, Quantization, Requantization
from cactus_edge.inputs import Perturbation
from cactus_edge.proofs import Leaf
from cactus_edge.semantics import Rounding
from tests.certificates import certified
from tests.certify.constructed import CASES, ZERO
from tests.graphs import random_graph

Patch = pytest.MonkeyPatch
# Functions of the same names hide these modules in ``cactus_edge.certify``.
runs = import_module("cactus_edge.certify.run")
networks = import_module("cactus_edge.certify.linear.network")
decides = import_module("cactus_edge.certify.decide")
NAMES = ("tflite-micro", "single-rounding", "litert-xnnpack-arm")


# ---------------------------------------------------------------- scenes
@dataclass(frozen=True, eq=False)
class Scene:
    """What is certified; the request names the method and the profiles."""

    graph: Graph
    data: Dataset
    request: Request

    @property
    def model(self) -> bytes:
        """The file."""
        return flatbuffer.write_tflite(self.graph)

    def certificate(self) -> Certificate:
        """What the certifier, as it is at the moment, writes about it."""
        return certified(self.model, self.request)


def steady(patch: Patch) -> None:
    """Certificates that are the same on every machine, and that have trees.

    A tree ends after so many cases, not seconds; multipliers come from ascent, not from a solver
    whose next version may find others; and boxes that could be run are divided instead.
    """
    patch.setattr(runs, "Budget", partial(Budget, cases=30))
    patch.setattr(Decider, "relaxation", None)
    patch.setattr(tree, "POINTS", 1)


def labelled(graph: Graph, count: int, radius: int, **options: Any) -> Scene:
    """Random samples that are labelled by the model, one of them wrongly."""
    images = np.random.default_rng(1).random(
        (count, *graph.tensors[graph.input].shape[1:]), dtype=np.float32
    )
    resolved = profiles.resolve(graph, NAMES[0])
    logits = execute(resolved, inputs.stored(graph, images)).reshape(count, -1)
    labels = logits.argmax(axis=1)
    labels[-1] = (labels[-1] + 1) % logits.shape[1]
    data = Dataset("made-up", images, labels, logits.shape[1], "test", "5e" * 32)
    return Scene(graph, data, Request(data, Perturbation.levels(radius), profiles=NAMES, **options))


def constructed(name: str, method: Method, centre: int | None = None, radius: int = 0) -> Scene:
    """A case that real arithmetic gets wrong, on its own box or around another one's input."""
    case = CASES[name]
    middle = case.centre - ZERO if centre is None else np.full_like(case.centre, centre)
    levels = Perturbation.levels(radius or case.radius)
    return around(case.graph, middle, case.label, levels, method)


def around(
    graph: Graph, middle: np.ndarray, label: int, levels: Perturbation, method: Method
) -> Scene:
    """One sample, of the input ``middle`` above the zero point."""
    images = (middle / 256).astype(np.float32)[None]
    classes = graph.tensors[graph.logits].size
    data = Dataset("constructed", images, np.array([label]), classes, "test", "c0" * 32)
    return Scene(graph, data, Request(data, levels, profiles=NAMES, method=method))


def negative_half() -> Scene:
    """Logit 1 is (a - 50)/4 with a from 48: the least one is -1/2, which two profiles round to -1.

    First doubled and rounded to -1, then halved: the second rounding is the one that has a tie.
    """
    graph = with_layer(
        CASES["profile"].graph,
        lambda op: replace(
            op,
            bias=np.array([-40, -50], np.int32),
            weights=replace(op.weights, scale_bits=np.array([0.25], np.float32).view(np.uint32)),
        ),
    )
    output = graph.tensors[graph.output]
    assert output.quantization is not None
    output = replace(output, quantization=Quantization(output.quantization.scale_bits, 0))
    graph = replace(graph, tensors=(*graph.tensors[:-1], output))
    return around(graph, np.array([58]), 1, Perturbation.levels(10), "interval")


SCENES: dict[str, Callable[[], Scene]] = {
    # Every verdict and method, with trees that divide inputs and hidden values.
    "trees": lambda: labelled(
        random_graph(np.random.default_rng(17), shape=(1, 5), depth=3, channels=8, classes=4),
        16,
        4,
        method="complete",
        budget=1000,
    ),
    "images": lambda: labelled(
        random_graph(np.random.default_rng(5), shape=(1, 4, 4, 2), depth=3, classes=4, bits=(8,)),
        20,
        3,
        attack=Settings(steps=8, restarts=0, hops=10),
    ),
    "saturation": lambda: constructed("saturation", "interval"),
    "tie": lambda: constructed("last_label", "interval"),
    "tie, linear": lambda: constructed("last_label", "linear"),
    "half": lambda: constructed("profile", "interval"),
    "halves": negative_half,
    "residual": lambda: constructed("residual", "linear"),
    # The claim breaks inside the box, from 10 to 14, and holds in both of its corners.
    "middle": lambda: constructed("rounding", "complete", 16, 8),
    # It breaks at the greatest input alone, where two units round up.
    "last step": lambda: constructed("rounding", "linear", 6, 4),
}


@cache
def scene(name: str) -> Scene:
    """A scene, made once."""
    return SCENES[name]()


# ---------------------------------------------------------------- faults in a graph
def with_layer(graph: Graph, change: Callable[[Linear], Linear]) -> Graph:
    """The first linear layer changed."""
    index = next(i for i, op in enumerate(graph.operators) if isinstance(op, Linear))
    op = graph.operators[index]
    assert isinstance(op, Linear)
    operators = (*graph.operators[:index], change(op), *graph.operators[index + 1 :])
    return replace(graph, operators=operators)


def no_bias(graph: Graph) -> Graph:
    return with_layer(graph, lambda op: replace(op, bias=np.zeros_like(op.bias)))


def no_clamp(graph: Graph) -> Graph:
    return replace(
        graph,
        operators=tuple(
            replace(op, activation=Activation.NONE, clamp=None) if isinstance(op, Linear) else op
            for op in graph.operators
        ),
    )


def moved_zero(graph: Graph) -> Graph:
    """The zero point of the first layer's output one too high."""
    first = next(op.output for op in graph.core if isinstance(op, Linear))
    tensors = list(graph.tensors)
    quantization = tensors[first].quantization
    assert quantization is not None
    moved = Quantization(quantization.scale_bits, quantization.zero_point + 1)
    tensors[first] = replace(tensors[first], quantization=moved)
    return replace(graph, tensors=tuple(tensors))


def rounded(op: Linear, code: Rounding, instead: Rounding) -> Linear:
    own = op.requantization
    assert own is not None
    codes = np.where(own.rounding == code, int(instead), own.rounding)
    return replace(op, requantization=Requantization(codes, own.multiplier, own.shift))


def halves_up(graph: Graph) -> Graph:
    """Negative halves of the second rounding towards zero."""
    away, up = Rounding.DOUBLE_HALF_AWAY, Rounding.DOUBLE_HALF_UP
    operators = (rounded(op, away, up) if isinstance(op, Linear) else op for op in graph.operators)
    return replace(graph, operators=tuple(operators))


def one_sign_lost(graph: Graph) -> Graph:
    def change(op: Linear) -> Linear:
        values = op.weights.values.copy()
        values.flat[0] *= -1
        return replace(op, weights=replace(op.weights, values=values))

    return with_layer(graph, change)


def float_as_double(graph: Graph) -> Graph:
    """The runtime that rounds in float32 is taken for one that rounds twice."""
    single, double = Rounding.FLOAT32, Rounding.DOUBLE_HALF_UP
    operators = (
        rounded(op, single, double) if isinstance(op, Linear) else op for op in graph.operators
    )
    return replace(graph, operators=tuple(operators))


def in_intervals(change: Callable[[Graph], Graph]) -> Callable[[Patch], None]:
    """The propagation of intervals runs a changed graph."""

    def changed(graph: Graph, **given: Any) -> IntervalSession:
        return IntervalSession(change(graph), **given)

    return lambda patch: patch.setattr(engine, "IntervalSession", changed)


def in_network(change: Callable[[Graph], Graph]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(decides, "network", lambda graph: network(change(graph)))


# ---------------------------------------------------------------- faults in the code
def another_profile(patch: Patch) -> None:
    """Every profile is resolved as its neighbour in the list."""
    following = dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True))
    patch.setattr(engine, "_resolved", lambda graph, name: profiles.resolve(graph, following[name]))


def weights_unsplit(patch: Patch) -> None:
    """Lower bounds are computed from lower ends alone, whatever the sign of a weight."""
    true = IntervalSession.run

    def faulty(self: IntervalSession, lower: Any, upper: Any) -> dict[int, Any]:
        least, most = true(self, lower, lower), true(self, upper, upper)
        return {tensor: (least[tensor][0], most[tensor][1]) for tensor in least}

    patch.setattr(IntervalSession, "run", faulty)


def smaller_box(patch: Patch) -> None:
    """The upper ends of the perturbation set are left out."""

    def faulty(*given: Any) -> tuple[np.ndarray, np.ndarray]:
        lower, upper = inputs.box(*given)
        return lower, np.maximum(lower, upper - 1)

    fake = SimpleNamespace(**{**vars(inputs), "box": faulty})
    patch.setattr(import_module("cactus_edge.certify.tasks"), "inputs", fake)


def no_gaps(graph: Graph, label: int, classes: int, top: int = 1) -> np.ndarray:
    return np.zeros(classes, np.int64)


def ties_win(patch: Patch) -> None:
    """A tie counts as won, whichever index is lower."""
    patch.setattr(engine, "decision", SimpleNamespace(**{**vars(decision), "gaps": no_gaps}))


def unsaturated(patch: Patch) -> None:
    """Margins as if the last layer had no clamp: accumulators are compared and that is all."""
    true = margin.wins

    def faulty(layer: Any, lower: Any, upper: Any, labels: Any, gaps: Any) -> Any:
        steps = replace(layer.staircases, limits=(-1023, 1024))
        wide = replace(layer, staircases=steps, thresholds=margin._thresholds(steps))
        return true(wide, lower, upper, labels, gaps)

    patch.setattr(engine, "margin", SimpleNamespace(**{**vars(margin), "wins": faulty}))


def ties_win_later(patch: Patch) -> None:
    """The same in linear bounds alone."""
    patch.setattr(decides, "decision", SimpleNamespace(**{**vars(decision), "gaps": no_gaps}))


def margin_one_short(patch: Patch) -> None:
    """The margin that is needed, one too small."""
    true = margin._needed
    patch.setattr(margin, "_needed", lambda *given: true(*given) - 1)


def proved_without(leave_out: Callable[[Any, Any], None]) -> Callable[[Patch], None]:
    """``leave_out`` sets what ``_Engine.prove`` returns for a group: plain, and pairs."""

    def patch_it(patch: Patch) -> None:
        true = engine._Engine.prove

        def faulty(self: Any, *given: Any) -> Any:
            low, high, plain, pairs = true(self, *given)
            leave_out(self, pairs)
            return low, high, plain, pairs

        patch.setattr(engine._Engine, "prove", faulty)

    return patch_it


def first_rival(_: Any, pairs: np.ndarray) -> None:
    pairs[:, 0] = True


def other_group(self: Any, pairs: np.ndarray) -> None:
    """The group that rounds in float32 counts as proved, whatever was computed."""
    codes = {int(c) for op in self.graph.core if isinstance(op, Linear) for c in [_code(op)]}
    if int(Rounding.FLOAT32) in codes:
        pairs[:] = True


def _code(op: Linear) -> int:
    assert op.requantization is not None
    return int(op.requantization.rounding[0])


def thresholds_moved(by: int) -> Callable[[Patch], None]:
    def patch_it(patch: Patch) -> None:
        true = networks.thresholds
        patch.setattr(networks, "thresholds", lambda *given: true(*given) + by)

    return patch_it


def hull(left: int = 0, right: int = 0, inner: bool = True) -> Callable[[Patch], None]:
    """``bounds._line`` in Python: steps begin ``left`` later and end ``right`` earlier."""

    def patch_it(patch: Patch) -> None:
        true = bounds._line

        def faulty(node: Stairs, ranges: Any, coefficients: Any, codes: Any, unit: int) -> Line:
            line = true(node, ranges, coefficients, codes, unit)
            offsets = line.offsets.copy()
            for i in np.flatnonzero((ranges[2] < ranges[3]) & (coefficients != 0)).tolist():
                steps = node.staircase
                least, most, first, last = (int(end) for end in ranges[:4, i])
                rises = steps.thresholds[steps.kinds[i]][first:last]
                begins = np.concatenate([[least], rises + left])
                ends = np.concatenate([rises - 1 - right, [most]])
                levels = coefficients[i] * (steps.lowest + np.arange(first, last + 1))
                price = line.multipliers[i]
                values = levels - price * (ends if price > 0 else begins)
                offsets[i] = values.min() if inner else min(values[0], values[-1])
            return Line(line.coefficients, line.multipliers, offsets)

        patch.setattr(bounds, "_line", faulty)

    return patch_it


def hull_of_ends(patch: Patch) -> None:
    """Only the first and the last step of a staircase are looked at, as if it were convex."""
    hull(inner=False)(patch)


def bound_is_more(patch: Patch) -> None:
    """Each linear bound is rounded up once too often."""
    true = bounds.lower_bound

    def faulty(*given: Any) -> Any:
        bound = true(*given)
        return replace(bound, value=bound.value + 1)

    for module in (bounds, tree):
        patch.setattr(module, "lower_bound", faulty)


def needs_less(patch: Patch) -> None:
    """Cases are closed without the staircase argument: a positive margin is enough."""

    def faulty(*_: Any) -> int:
        return 1

    patch.setattr(goals, "margin", SimpleNamespace(**{**vars(margin), "needed_margin": faulty}))


def float_luck(patch: Patch) -> None:
    """What the float search hopes for counts as proved, and it hopes for a little too much.

    Nothing is computed again in integers.
    """
    true = tree.Ascent.run

    def hopeful(self: Any, *given: Any) -> float:
        true(self, *given)
        self.best += 200.0
        return self.best

    def faulty(self: Any, case: Any, state: Any, found: Any) -> None:
        codes = found(self.goal.aim(state, 26).target)
        case.leaf = Leaf("multipliers", tree.codec.pack(self.network, state, codes), 26)

    patch.setattr(tree.Ascent, "run", hopeful)
    patch.setattr(tree.Tree, "_close", faulty)


def half_of_a_split(patch: Patch) -> None:
    """The second case of every division is called closed without a look."""
    true = tree.Tree._treat

    def faulty(self: Any, index: int, steps: int) -> int:
        if index and index % 2 == 0:
            self.cases[index].leaf = Leaf("bounds")
            return 0
        return true(self, index, steps)

    patch.setattr(tree.Tree, "_treat", faulty)


def corners_alone(patch: Patch) -> None:
    """Of a small box only the corners are run."""
    patch.setattr(tree, "POINTS", 4096)
    patch.setattr(tree, "every_point", lambda low, high: np.stack([low, high]))


def solver_is_believed(patch: Patch) -> None:
    """A search that ends without a counterexample is a proof."""
    true = tree.Tree.run

    def faulty(self: Any, *given: Any) -> Any:
        outcome = true(self, *given)
        if outcome.nodes is None and outcome.counterexample is None:
            return replace(outcome, nodes=(Leaf("bounds"),))
        return outcome

    patch.setattr(tree.Tree, "run", faulty)


def borrowed_proofs(patch: Patch) -> None:
    """Proofs are remembered by group and rival, but not by sample."""
    true, known = Decider.search, dict[int, Any]()

    def faulty(self: Decider, box: Any, goal: Any, *given: Any) -> Any:
        outcome = true(self, box, goal, *given)
        if outcome.nodes is not None:
            known.setdefault(id(self), outcome.nodes)
        elif id(self) in known:
            return replace(outcome, nodes=known[id(self)], counterexample=None)
        return outcome

    patch.setattr(Decider, "search", faulty)


def attack_unverified(shift: int) -> Callable[[Patch], None]:
    """The attack's point is believed; it lies ``shift`` levels off the sample."""

    def patch_it(patch: Patch) -> None:
        def faulty(graph: Graph, stored: Any, *_: Any, **__: Any) -> list[Any]:
            low, high = graph.tensors[graph.core_input].dtype.range
            return [np.clip(point + shift, low, high) for point in stored]

        patch.setattr(engine, "search", faulty)
        patch.setattr(engine, "_breaks", lambda *given: True)

    return patch_it


def attack_unbounded(patch: Patch) -> None:
    """The attack looks in a box of twice the radius, and nobody asks where its point lies."""

    def faulty(
        graph: Graph, stored: Any, lower: Any, upper: Any, *given: Any, **named: Any
    ) -> list[Any]:
        low, high = graph.tensors[graph.core_input].dtype.range
        wide = np.maximum(2 * lower - stored, low), np.minimum(2 * upper - stored, high)
        return true_search(graph, stored, *wide, *given, **named)

    def wrong(group: Any, point: Any, box: Any, i: int) -> bool:
        logits = execute(group.graph, point[None])
        return bool(decision.surely_wrong(group.graph, logits, box[3][i : i + 1])[0])

    patch.setattr(engine, "search", faulty)
    patch.setattr(engine, "_breaks", wrong)


# ---------------------------------------------------------------- the table
@dataclass(frozen=True)
class Fault:
    """``patch`` breaks the certifier; its certificate of ``scene`` is rejected with ``words``."""

    patch: Callable[[Patch], None]
    scene: str
    words: str


BOUNDS = "bounds of the logits differ"
NOT_DERIVED = "'certified' cannot be re-derived"
NOT_CLOSED = "is not closed"
FAULTS: dict[str, Fault] = {
    # The propagation of intervals.
    "profiles are mixed up": Fault(another_profile, "images", BOUNDS),
    "halves are rounded up, not away from zero": Fault(in_intervals(halves_up), "halves", BOUNDS),
    "the zero point of a layer is off by one": Fault(in_intervals(moved_zero), "trees", BOUNDS),
    "the bias is dropped": Fault(in_intervals(no_bias), "images", BOUNDS),
    "the clamp of an activation is dropped": Fault(in_intervals(no_clamp), "images", BOUNDS),
    "negative weights read the wrong ends": Fault(weights_unsplit, "trees", BOUNDS),
    "the box is a level too small": Fault(smaller_box, "last step", BOUNDS),
    # The decision.
    "a tie is a win": Fault(ties_win, "tie", NOT_DERIVED),
    "a tie is a win in linear bounds": Fault(ties_win_later, "tie, linear", NOT_CLOSED),
    "a margin is enough, saturated or not": Fault(unsaturated, "saturation", NOT_DERIVED),
    "a rival is left out": Fault(proved_without(first_rival), "tie", NOT_DERIVED),
    "a group of profiles is left out": Fault(proved_without(other_group), "half", NOT_DERIVED),
    # Linear bounds.
    "steps begin an accumulator too late": Fault(thresholds_moved(1), "last step", NOT_CLOSED),
    "steps begin an accumulator too early": Fault(thresholds_moved(-1), "trees", NOT_CLOSED),
    "the zero point is off by one behind it": Fault(in_network(moved_zero), "trees", NOT_CLOSED),
    "a weight's sign is lost behind it": Fault(in_network(one_sign_lost), "trees", NOT_CLOSED),
    "a half is rounded as elsewhere behind it": Fault(
        in_network(float_as_double), "trees", NOT_CLOSED
    ),
    "a case needs no more than a positive margin": Fault(needs_less, "tie, linear", NOT_CLOSED),
    # The search.
    "the float search is believed": Fault(float_luck, "residual", NOT_CLOSED),
    "half of each split is not looked at": Fault(half_of_a_split, "trees", NOT_CLOSED),
    "only the corners of a case are run": Fault(
        corners_alone, "middle", "a point of a leaf breaks the claim"
    ),
    "no counterexample is a proof": Fault(solver_is_believed, "residual", NOT_CLOSED),
    "a proof is remembered for another sample": Fault(borrowed_proofs, "trees", NOT_CLOSED),
    # The attack.
    "a correct point is a counterexample": Fault(
        attack_unverified(0), "images", "the counterexample is classified as labelled"
    ),
    "a point far away is a counterexample": Fault(
        attack_unverified(200), "images", "outside the perturbation set"
    ),
    "the attack leaves the box": Fault(attack_unbounded, "images", "outside the perturbation set"),
}
