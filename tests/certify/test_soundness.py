"""The certifier against the truth: every point of small boxes, over all operators and profiles."""

from __future__ import annotations

import numpy as np
import pytest

from cactus_edge.profiles import PROFILES
from tests.certify.exhaustion import Tally, exhaust, tiny_graph
from tests.graphs import CORE_OPERATORS, random_graph


def assert_sound(tally: Tally) -> None:
    assert tally.violations == 0, "a point lies outside its bounds"
    assert tally.false_proofs == 0, "a margin was proved that a point breaks"
    assert tally.checker_differences == 0, "checker and certifier differ"


def test_bounds_and_margins_hold_at_every_point() -> None:
    tally = Tally()
    for seed in range(45):
        exhaust(tiny_graph(seed), seed, tally)
    assert_sound(tally)
    assert set(tally.operators) == set(CORE_OPERATORS)
    assert tally.boxes > tally.graphs, "profiles were never told apart"
    assert 2 * tally.attained > tally.bounds, "bounds are hardly ever attained: suspicious"


def test_margins_prove_more_than_bounds_and_never_too_much() -> None:
    tally = Tally()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph = random_graph(
            rng, shape=(1, 2), depth=2, operators=("FULLY_CONNECTED",), channels=8, classes=4
        )
        exhaust(graph, seed, tally, radius=12)
    assert_sound(tally)
    assert tally.proved_by_margin > tally.proved_by_bounds


@pytest.mark.parametrize("seed", range(12))
def test_softmax_gap_is_part_of_the_decision(seed: int) -> None:
    """With SOFTMAX a lower index needs a larger lead; a proof never claims what the gap denies."""
    rng = np.random.default_rng(seed)
    graph = random_graph(
        rng, shape=(1, 2), depth=1, operators=("FULLY_CONNECTED",), classes=3, edges=("SOFTMAX",)
    )
    assert graph.has_softmax
    tally = Tally()
    exhaust(graph, seed, tally, radius=10)
    assert_sound(tally)


def test_twelve_profiles_are_covered() -> None:
    """The exhaustion above runs every group of the profiles; none may be left out of the table."""
    assert len(PROFILES) == 12
