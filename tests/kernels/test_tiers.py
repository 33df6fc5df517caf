"""Every tier that this CPU has, element for element against the reference executor."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.simd.tiers import available
from cactus_edge.semantics import Rounding
from tests.kernels.cases import COUNTS, PROFILES, assert_equal, extreme_case, random_case

SEEDS = st.integers(0, 2**32 - 1)
layouts, counts = st.sampled_from(Layout), st.sampled_from(COUNTS)


@settings(max_examples=80)
@given(SEEDS, counts, st.sampled_from(PROFILES), layouts, st.integers(1, 3))
def test_random_graphs(seed: int, count: int, profile: str, layout: Layout, threads: int) -> None:
    case = random_case(seed, count, profile)
    expected = case.expected()
    for tier in available():
        assert_equal(case, tier, layout, threads, expected)


@settings(max_examples=40)
@given(SEEDS, st.sampled_from((1, 2, 9)), st.sampled_from(Rounding), layouts)
def test_largest_accumulators(seed: int, count: int, rounding: Rounding, layout: Layout) -> None:
    case = extreme_case(np.random.default_rng(seed), rounding, count)
    expected = case.expected()
    for tier in available():
        assert_equal(case, tier, layout, 1, expected)
