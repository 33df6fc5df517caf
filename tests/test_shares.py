"""Shares as they are shown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cactus_edge.report.charts import Series, chart
from cactus_edge.shares import percent


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_shares_are_rounded_down(counts: tuple[int, int]) -> None:
    count, total = counts
    whole, hundredths = divmod(10_000 * count // total, 100)
    shown = f"{whole}.{hundredths:02}"
    assert percent(count / total) == shown
    drawn = chart("", "", "", [Series("one", ((0.5, 100 * (count / total)),))])
    assert drawn.series[0].marks[0][2] == f"one: 0.5, {shown} %"


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.29, "29.00"), (0.57, "57.00"), (0.99999999, "99.99"), (1.0, "100.00"), (math.nan, "NaN")],
)
def test_shares_that_floats_spoil(fraction: float, shown: str) -> None:
    assert percent(fraction) == shown
