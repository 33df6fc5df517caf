"""Linear bounds and complete search against the truth: every point of small boxes is run."""

from __future__ import annotations

import numpy as np
import pytest

from cactus_edge import decision
from cactus_edge.certify import margin
from cactus_edge.certify.decide import Decider, Effort
from cactus_edge.certify.engine import cover
from cactus_edge.certify.linear.bounds import Target, lower_bound, propagate
from cactus_edge.certify.linear.network import Stairs, network
from cactus_edge.certify.linear.search import Budget
from cactus_edge.check_linear import LinearChecker
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph
from cactus_edge.profiles import PROFILES
from tests.certify.exhaustion import tiny_graph
from tests.graphs import enumerate_box, random_box, random_graph

COMPLETE = Effort("complete", Budget(seconds=20, cases=400))
LINEAR = Effort("linear", Budget(seconds=20))


def offsets(graph: Graph, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    zero_point = graph.tensors[graph.core_input].zero_point
    return lower.reshape(-1) - zero_point, upper.reshape(-1) - zero_point


@pytest.mark.parametrize("seed", range(60))
def test_bounds_hold_at_every_point_whatever_the_multipliers(seed: int) -> None:
    """Intervals of every tensor, and combinations of logits under the rule and random codes."""
    rng = np.random.default_rng(seed)
    graph = tiny_graph(seed)
    lower, upper = random_box(rng, graph, 4)
    points = enumerate_box(lower, upper)
    for group in cover(graph, None).groups[:3]:
        net = network(group.graph)
        state = propagate(net, offsets(graph, lower, upper))
        assert state is not None
        values = execute_all(group.graph, points)
        for tensor, (low, high) in state.values.items():
            held = values[tensor].reshape(len(points), -1) - net.zero_points[tensor]
            assert (low <= held).all()
            assert (held <= high).all()
        logits = values[graph.logits].reshape(len(points), -1) - net.zero_points[graph.logits]
        for _ in range(4):
            weights = rng.integers(-5, 6, logits.shape[1])
            target = Target(len(net.nodes), weights << 12, 1 << 12, 15)
            truth = int((logits @ weights).min())
            by_rule = lower_bound(net, state, target).value
            assert by_rule <= truth
            codes = {
                index: rng.integers(-(1 << 15), 1 << 16, node.bias.size)
                for index, node in enumerate(net.nodes)
                if isinstance(node, Stairs)
            }
            assert lower_bound(net, state, target, codes).value <= truth


def decide_all(
    graph: Graph,
    seed: int,
    radius: int,
    effort: Effort,
    tally: dict[str, int],
    most: int = len(PROFILES),
) -> None:
    """Every pair of logits under every group: proofs are true and accepted, breaks are real.

    ``most`` of the groups, from one seed to the next by turns.
    """
    rng = np.random.default_rng(seed)
    lower, upper = random_box(rng, graph, radius)
    points = enumerate_box(lower, upper)
    groups = cover(graph, None).groups
    for number in ((seed + turn) % len(groups) for turn in range(min(most, len(groups)))):
        group = groups[number]
        logits = execute(group.graph, points).reshape(len(points), -1)
        decider = Decider(group.graph)
        checker = LinearChecker(group.graph)
        label = int(logits[rng.integers(len(logits))].argmax())
        gaps = decision.gaps(group.graph, label, logits.shape[1])
        for rival in range(logits.shape[1]):
            if rival == label:
                continue
            truth = bool((logits[:, label] >= logits[:, rival] + gaps[rival]).all())
            found = decider.decide(number, (lower, upper), label, [rival], effort)
            tally["pairs"] += 1
            tally["true"] += truth
            if found.closed:
                tally["proved"] += 1
                assert truth, "a proof of what is false"
                [proof] = found.proofs
                assert checker.excluded((lower, upper), label, rival, proof.nodes) == ""
            elif found.counterexample is not None:
                tally["broken"] += 1
                assert (lower <= found.counterexample).all()
                assert (found.counterexample <= upper).all()
                wrong = execute(group.graph, found.counterexample[None]).reshape(1, -1)
                assert decision.surely_wrong(group.graph, wrong, np.array([label]))[0]


def test_complete_search_decides_every_pair() -> None:
    tally = dict.fromkeys(("pairs", "true", "proved", "broken"), 0)
    for seed in (*range(28), 36, 54, 62, 85):  # in the last ones rivals win
        decide_all(tiny_graph(seed), seed, 6, COMPLETE, tally, most=2)
    assert tally["proved"] == tally["true"], "small boxes can always be run"
    assert tally["broken"] > 4


def tight_graph(seed: int) -> Graph:
    """Fully connected, with wide boxes: many steps between the ends of every staircase."""
    return random_graph(
        np.random.default_rng(seed),
        shape=(1, 2),
        depth=2,
        operators=("FULLY_CONNECTED",),
        channels=8,
        classes=4,
    )


def test_steps_between_the_ends_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a staircase taken for its chord, or a split that loses a case, proves what is false."""
    monkeypatch.setattr("cactus_edge.certify.linear.search.POINTS", 1)
    tally = dict.fromkeys(("pairs", "true", "proved", "broken"), 0)
    for seed in (*range(12), 18, 45, 49):
        decide_all(tight_graph(seed), seed, 12, COMPLETE, tally, most=2)
    assert tally["proved"] > 20
    assert tally["broken"] > 0


def test_linear_bounds_prove_more_than_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """With boxes too large to be run, in the eyes of the search."""
    monkeypatch.setattr("cactus_edge.certify.linear.search.POINTS", 1)
    tally = dict.fromkeys(("pairs", "true", "proved", "broken"), 0)
    for seed in range(40):
        decide_all(tiny_graph(seed), seed, 6, LINEAR, tally, most=2)
    assert 4 * tally["proved"] > 3 * tally["true"]


@pytest.mark.parametrize("seed", range(12))
def test_trees_are_sound_without_running_points(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits, prices of cuts and infeasible cases, all of which the checker derives again."""
    monkeypatch.setattr("cactus_edge.certify.linear.search.POINTS", 1)
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=(1, 3), depth=3, channels=8, classes=4)
    tally = dict.fromkeys(("pairs", "true", "proved", "broken"), 0)
    decide_all(graph, seed, 7, COMPLETE, tally)
    assert tally["pairs"] > 0


@pytest.mark.parametrize("seed", range(8))
def test_trees_on_images(seed: int) -> None:
    """Convolutions, pools, residual ADD and PAD, with boxes that cannot be run."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, shape=(1, 5, 5, 2), depth=4, channels=6, classes=3)
    group = cover(graph, None).groups[0]
    lower, upper = random_box(rng, graph, 3)
    centre = (lower + upper) // 2
    label = int(execute(group.graph, centre[None]).argmax())
    decider, checker = Decider(group.graph), LinearChecker(group.graph)
    assert margin.last_layer(group.graph) is not None
    effort = Effort("complete", Budget(seconds=10, cases=40))
    sampled = rng.integers(lower, upper + 1, (2000, *lower.shape))
    logits = execute(group.graph, sampled).reshape(len(sampled), -1)
    gaps = decision.gaps(group.graph, label, 3)
    for rival in range(3):
        if rival == label:
            continue
        found = decider.decide(0, (lower, upper), label, [rival], effort)
        if found.closed:
            assert (logits[:, label] >= logits[:, rival] + gaps[rival]).all()
            nodes = found.proofs[0].nodes
            assert checker.excluded((lower, upper), label, rival, nodes) == ""
