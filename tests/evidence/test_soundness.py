"""At least 2,000 random graphs a method: every point of every box, under every profile."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import joblib
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from cactus_edge.certify.decide import Effort
from cactus_edge.certify.linear import search
from cactus_edge.certify.linear.search import Budget
from cactus_edge.graph import Graph
from tests.certify.exhaustion import Tally, exhaust, tiny_graph
from tests.certify.test_attacked import ATTACKED, attack_what_is_certified
from tests.certify.test_linear import decide_all, tight_graph
from tests.certify.test_soundness import assert_sound
from tests.evidence import results
from tests.graphs import CORE_OPERATORS

GRAPHS = 2000


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


BLOCK = 50


def decided(method: str, first: int) -> dict[str, int]:
    """A block of graphs under one method; every third is tight. Boxes are too large to be run."""
    search.POINTS = 1
    tally = dict.fromkeys(("graphs", "pairs", "true", "proved", "broken"), 0)
    effort = Effort(method, Budget(seconds=20, cases=60))  # type: ignore[arg-type]
    for seed in range(first, first + BLOCK):
        tight = seed % 3 == 0
        graph = tight_graph(seed) if tight else tiny_graph(20_000 + seed)
        decide_all(graph, seed, 9 if tight else 5, effort, tally)
        tally["graphs"] += 1
    return tally


@pytest.mark.evidence
@pytest.mark.parametrize("method", ["linear", "complete"])
def test_soundness_of_proofs(method: str) -> None:
    """``decide_all`` fails on a false proof, an unreal counterexample, or a checker that balks."""
    parts = joblib.Parallel(n_jobs=2)(
        joblib.delayed(decided)(method, first) for first in range(0, GRAPHS, BLOCK)
    )
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert total["graphs"] >= GRAPHS
    rows = [{"figure": name, "count": f"{count:,}"} for name, count in total.items()]
    results.write(
        f"soundness-{method}",
        f"Soundness of {method} proofs by exhaustion",
        "Random graphs, each under every group of rounding profiles, a random box and a label that "
        "wins somewhere in it. `pairs` are (label, rival); `true` those in which every point of "
        "the box, all of them executed, keeps the label ahead; `proved` were proved, and each "
        "proof was true and accepted by the checker (0 violations, or this page would not have "
        "been written); `broken` got a counterexample, executed. Closing a case by running its "
        "points was switched off.",
        rows,
    )


@pytest.mark.evidence
def test_deeper_graphs_are_attacked() -> None:
    """``attack_what_is_certified`` fails where an attack breaks what was certified."""
    attacked: Counter[str] = Counter()
    certified: Counter[str] = Counter()

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(**ATTACKED)
    def attack(graph: Graph, seed: int, radius: int, method: str) -> None:
        certified[method] += attack_what_is_certified(graph, seed, radius, method)
        attacked[method] += 1

    attack()
    rows = [
        {"method": method, "graphs": attacked[method], "certified boxes": certified[method]}
        for method in ("interval", "linear", "complete")
    ]
    results.write(
        "soundness-attacked",
        "What is certified, attacked",
        "Random graphs of 3 to 7 layers, 6 boxes each. Every box that was certified was attacked "
        "under every group of rounding profiles, and 300 of its points were run. None was broken, "
        "or this page would not have been written.",
        rows,
    )
