"""At least 1,000 random graphs: every point of every box, under every rounding profile."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.certify.exhaustion import Tally, exhaust, tiny_graph
from tests.certify.test_soundness import assert_sound
from tests.evidence import results
from tests.graphs import CORE_OPERATORS

GRAPHS = 1000


@pytest.mark.evidence
def test_soundness_by_exhaustion() -> None:
    tally = Tally()
    for seed in range(GRAPHS):
        exhaust(tiny_graph(10_000 + seed), seed, tally)
    assert_sound(tally)
    assert tally.graphs >= GRAPHS
    assert set(tally.operators) == set(CORE_OPERATORS)
    figures = asdict(tally)
    operators = figures.pop("operators")
    rows = [{"figure": name.replace("_", " "), "count": f"{n:,}"} for name, n in figures.items()]
    share = 100 * tally.attained / tally.bounds
    rows.append({"figure": "bounds attained by a point of the box", "count": f"{share:.1f} %"})
    rows += [{"figure": f"operators: {kind}", "count": n} for kind, n in operators.items()]
    results.write(
        "soundness",
        "Soundness by exhaustion",
        "Random graphs over all operators, each under every group of rounding profiles that "
        "computes other integers. Every point of a box of up to three inputs is executed: "
        "`violations` counts logits outside the twin's bounds, `false proofs` margins that a point "
        "breaks, `checker differences` anything in which the independent checker differs.",
        rows,
    )
