"""Faults that no certificate shows, shown by points and by constructed cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cactus_edge import (
    decision,
    inputs,
    profiles,
)
from cactus_edge.certify import engine
from cactus_edge.certify.engine import cover
from cactus_edge.certify.linear import bounds
from cactus_edge.certify.linear.network import Stairs, network
from cactus_edge.certify.linear.search import Budget
from cactus_edge.execute import accumulate, execute, requantize
from cactus_edge.graph import Graph, Linear
from tests.certificates import checked, encoded
from tests.certify import test_linear as linear
from tests.certify.constructed import CASES
from tests.certify.exhaustion import tiny_graph
from tests.certify.mutations import (
    NAMES,
    Patch,
    bound_is_more,
    constructed,
    float_luck,
    half_of_a_split,
    hull,
    hull_of_ends,
    in_intervals,
    margin_one_short,
    needs_less,
    no_bias,
    solver_is_believed,
    steady,
    thresholds_moved,
    ties_win_later,
    weights_unsplit,
)
from tests.graphs import enumerate_box, random_box, random_graph

Comparison = Callable[[], bool]


def accumulators_break_a_line() -> bool:
    """Lines that stand for staircases, at every accumulator of their ranges, for any multipliers.

    And the bound of a sum of the first layer, which is attained, at every point of the box.
    """
    for seed in range(10):
        rng = np.random.default_rng(seed)
        graph = cover(tiny_graph(seed), None).groups[0].graph
        net = network(graph)
        lower, upper = random_box(rng, graph, 4)
        state = bounds.propagate(net, linear.offsets(graph, lower, upper))
        assert state is not None
        layers = {op.output: op for op in graph.core if isinstance(op, Linear)}
        codes = {
            index: rng.integers(-(1 << 15), 1 << 16, node.bias.size)
            for index, node in enumerate(net.nodes)
            if isinstance(node, Stairs)
        }
        weights = rng.integers(-5, 6, net.sizes[graph.logits]) << 12
        target = bounds.Target(len(net.nodes), weights, 1 << 12, 15)
        found = bounds.lower_bound(net, state, target, codes)
        for index, line in found.lines.items():
            op = layers.get(net.nodes[index].output)
            if op is not None and _crosses(graph, op, state.ranges[index], line):
                return True
        first = net.nodes[0]
        if isinstance(first, Stairs) and first.output in layers:
            op = layers[first.output]
            own = rng.integers(-5, 6, first.bias.size)
            value = bounds.lower_bound(net, state, bounds.Target(0, own, 1, 0)).value
            points = enumerate_box(lower, upper)
            sums = accumulate(op, graph.tensors[op.inputs[0]], points).reshape(len(points), -1)
            if value > (sums @ own).min():
                return True
    return False


def _crosses(graph: Graph, op: Linear, ranges: np.ndarray, line: bounds.Line) -> bool:
    """Whether a line lies above its staircase at some accumulator."""
    assert op.requantization is not None
    zero_point = graph.tensors[op.output].zero_point
    for element in range(ranges.shape[1]):
        places = np.arange(ranges[0, element], ranges[1, element] + 1)
        wide = np.repeat(places[:, None], op.channels, axis=1)
        stored = requantize(wide, op.requantization, zero_point, graph.output_range(op))
        values = line.coefficients[element] * (stored[:, element % op.channels] - zero_point)
        if (values - line.multipliers[element] * places < line.offsets[element]).any():
            return True
    return False


def points_break_a_proof() -> bool:
    """Pairs of logits that are proved, at every point of the box, and before the checker.

    On networks in which many a pair is all but proved.
    """
    tally = dict.fromkeys(("pairs", "true", "proved", "broken"), 0)
    effort = replace(linear.COMPLETE, budget=Budget(cases=20))
    kinds = ("FULLY_CONNECTED",)
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        for seed in (18, 45, 49):
            rng = np.random.default_rng(seed)
            graph = random_graph(rng, shape=(1, 2), depth=2, operators=kinds, channels=8, classes=4)
            try:
                linear.decide_all(graph, seed, 12, effort, tally)
            except AssertionError:
                return True
    return False


def points_break_an_interval() -> bool:
    """The propagated bounds and the margins that are proved, at every point of the box."""
    for seed in range(25):
        graph = cover(tiny_graph(seed), None).groups[0].graph
        lower, upper = random_box(np.random.default_rng(seed), graph, 4)
        points = enumerate_box(lower, upper)
        logits = execute(graph, points).reshape(len(points), -1)
        labels = np.arange(logits.shape[1])
        gaps = np.stack([decision.gaps(graph, label, labels.size) for label in labels.tolist()])
        ends = (np.repeat(end[None], labels.size, axis=0) for end in (lower, upper))
        low, high, _, proved = engine._Engine(graph, None).prove(*ends, labels, gaps)
        if (logits < low[0]).any() or (logits > high[0]).any():
            return True
        leads = (logits.T[:, :, None] >= logits + gaps[:, None]).all(axis=1)
        if (proved & ~leads).any():
            return True
    return False


COMPARED: dict[str, tuple[Callable[[Patch], None], Comparison]] = {
    "the left ends of steps are off by one": (hull(left=1), accumulators_break_a_line),
    "the right ends of steps are off by one": (hull(right=1), accumulators_break_a_line),
    "the steps between the ends are passed over": (hull_of_ends, accumulators_break_a_line),
    "a linear bound is one too high": (bound_is_more, accumulators_break_a_line),
    "steps begin an accumulator too late": (thresholds_moved(1), accumulators_break_a_line),
    "steps begin an accumulator too early": (thresholds_moved(-1), accumulators_break_a_line),
    "a case needs no more than a positive margin": (needs_less, points_break_a_proof),
    "ties are wins in linear bounds": (ties_win_later, points_break_a_proof),
    "the float search is believed": (float_luck, points_break_a_proof),
    "half of each split is not looked at": (half_of_a_split, points_break_a_proof),
    "no counterexample is a proof": (solver_is_believed, points_break_a_proof),
    "negative weights read the wrong ends": (weights_unsplit, points_break_an_interval),
    "the bias is dropped": (in_intervals(no_bias), points_break_an_interval),
    "a margin one short is enough": (margin_one_short, points_break_an_interval),
}


@pytest.mark.parametrize("comparison", dict.fromkeys(c for _, c in COMPARED.values()))
def test_without_a_mutation_no_point_breaks_anything(comparison: Comparison) -> None:
    assert not comparison()


@pytest.mark.parametrize("fault", COMPARED, ids=str)
def test_points_show_what_is_a_little_wrong(fault: str) -> None:
    break_it, comparison = COMPARED[fault]
    with pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        assert comparison()


# ---------------------------------------------------------------- what both stand on
def lead_of_none(patch: Patch) -> None:
    patch.setattr(decision, "lead", lambda graph: 0)


def one_rounding(patch: Patch) -> None:
    """Every runtime is taken for the one that rounds once."""
    true = profiles.resolve
    patch.setattr(profiles, "resolve", lambda graph, _: true(graph, "single-rounding"))


def narrow_box(patch: Patch) -> None:
    """The perturbation set without its ends."""
    true = inputs.around
    patch.setattr(inputs, "around", lambda graph, centre, levels: true(graph, centre, levels - 1))


SHARED: dict[str, tuple[Callable[[Patch], None], str]] = {
    "a tie is a win": (lead_of_none, "last_label"),
    "all runtimes round alike": (one_rounding, "profile"),
    "the ends of the box are left out": (narrow_box, "profile"),
}


@pytest.mark.parametrize("fault", SHARED, ids=str)
def test_constructed_cases_show_what_the_checker_cannot(fault: str) -> None:
    """Certifier and checker agree on what a device refutes: only the truth about a case tells."""
    break_it, name = SHARED[fault]
    assert "refuted" in {CASES[name].expected[profile] for profile in NAMES}
    made = constructed(name, "interval")
    verdicts: list[str] = []
    for change in (lambda _: None, break_it):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            claim = made.certificate()
            found = checked(encoded(claim.head, claim.samples), made.model, made.data)
        assert found.agrees
        verdicts.append(claim.samples[0].verdict)
    assert verdicts == ["unknown", "certified"]
