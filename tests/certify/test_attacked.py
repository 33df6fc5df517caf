"""Deeper graphs, which nobody can enumerate: what is certified is attacked hard, and must stand."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cactus_edge import decision
from cactus_edge.certify import Certifier, Settings
from cactus_edge.certify.attack import search
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.linear.search import Budget
from cactus_edge.execute import execute
from cactus_edge.graph import Graph
from tests.graphs import graphs, random_inputs

BOXES = 4
HARD = Settings(steps=12, restarts=1)


ATTACKED = {
    "graph": graphs(depth=st.integers(3, 7), channels=6, classes=4, sparsity=0.3),
    "seed": st.integers(0, 2**32 - 1),
    "radius": st.integers(0, 6),
    "method": st.sampled_from(("interval", "linear", "complete")),
}


@settings(
    max_examples=2,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(**ATTACKED)
def test_nothing_certified_is_broken(graph: Graph, seed: int, radius: int, method: str) -> None:
    attack_what_is_certified(graph, seed, radius, method)


def attack_what_is_certified(graph: Graph, seed: int, radius: int, method: str) -> int:
    """Fails where a certified box is broken; the number of certified boxes."""
    rng = np.random.default_rng(seed)
    stored = random_inputs(rng, graph, BOXES)
    least, greatest = graph.tensors[graph.core_input].dtype.range
    lower, upper = np.maximum(stored - radius, least), np.minimum(stored + radius, greatest)
    effort = Effort(method, Budget(seconds=2, cases=12))  # type: ignore[arg-type]
    certifier = Certifier(graph, None, effort)
    labels = certifier.predictions(stored)
    samples = certifier.verdicts(0, stored, lower, upper, labels)
    certified = np.array([s.index for s in samples if s.verdict == "certified"], np.int64)
    if not certified.size:
        return 0
    for group in certifier.groups:
        box = stored[certified], lower[certified], upper[certified], labels[certified]
        assert search(group.graph, *box, HARD) == [None] * certified.size
        for i in certified.tolist():
            points = rng.integers(lower[i], upper[i] + 1, (300, *lower[i].shape))
            logits = execute(group.graph, points).reshape(len(points), -1)
            wrong = decision.surely_wrong(group.graph, logits, np.full(len(points), labels[i]))
            assert not wrong.any()
    return certified.size
