"""Enumerate every point of a box and compare with what the certifier says about the box."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cactus_edge import check_bounds, check_margin, decision
from cactus_edge.certify import margin
from cactus_edge.certify.engine import cover
from cactus_edge.certify.twin import twin
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Graph
from tests.graphs import TINY_SHAPES, enumerate_box, random_box, random_graph


@dataclass
class Tally:
    """Counts over boxes; ``violations`` and ``false_proofs`` must stay 0."""

    graphs: int = 0
    boxes: int = 0
    points: int = 0
    violations: int = 0
    bounds: int = 0
    attained: int = 0
    pairs: int = 0
    true_pairs: int = 0
    proved_by_bounds: int = 0
    proved_by_margin: int = 0
    false_proofs: int = 0
    checker_differences: int = 0
    operators: dict[str, int] = field(default_factory=dict)


def tiny_graph(seed: int) -> Graph:
    """A random graph whose input has two or three elements."""
    rng = np.random.default_rng(seed)
    shape = TINY_SHAPES[int(rng.integers(len(TINY_SHAPES)))]
    return random_graph(
        rng,
        shape=shape,
        depth=int(rng.integers(1, 5)),
        channels=6,
        classes=int(rng.integers(2, 5)),
        universal=bool(rng.random() < 0.2),
    )


def exhaust(graph: Graph, seed: int, tally: Tally, radius: int = 3) -> None:
    """One random box under every group of profiles: bounds, margins and the checker's bounds."""
    rng = np.random.default_rng(seed)
    lower, upper = random_box(rng, graph, radius)
    points = enumerate_box(lower, upper)
    tally.graphs += 1
    for op in graph.core:
        tally.operators[op.kind] = tally.operators.get(op.kind, 0) + 1
    for group in cover(graph, None).groups:
        tally.boxes += 1
        tally.points += len(points)
        logits = execute(group.graph, points).reshape(len(points), -1)
        doubled = twin(group.graph)
        values = execute_all(doubled.graph, doubled.stack(lower[None], upper[None]))
        low, high = doubled.split(graph.logits, values[graph.logits])
        tally.violations += int((logits < low).sum() + (logits > high).sum())
        tally.bounds += 2 * low.size
        tally.attained += int((logits.min(axis=0) == low[0]).sum())
        tally.attained += int((logits.max(axis=0) == high[0]).sum())
        (check_low, check_high), _ = check_bounds.logits_box(
            group.graph, (lower[None], upper[None])
        )
        tally.checker_differences += int((check_low != low).sum() + (check_high != high).sum())
        layer = margin.last_layer(group.graph)
        assert layer is not None, "every tiny graph ends in FULLY_CONNECTED"
        source = doubled.split(layer.source, values[layer.source])
        _margins(group.graph, layer, source, logits, (low, high), tally)


def _margins(
    graph: Graph,
    layer: margin.LastLayer,
    source: tuple[np.ndarray, np.ndarray],
    logits: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    tally: Tally,
) -> None:
    """``source`` and ``bounds`` are lower and upper ends of the last layer's input and output."""
    labels = np.arange(logits.shape[1])
    gaps = np.stack([decision.gaps(graph, label, labels.size) for label in labels.tolist()])
    ends = (np.repeat(end.reshape(1, -1), labels.size, axis=0) for end in source)
    plain, proved = margin.wins(layer, *ends, labels, gaps)
    truth = (logits.T[:, :, None] >= logits + gaps[:, None]).all(axis=1)
    rivals = labels[:, None] != labels
    tally.pairs += int(rivals.sum())
    tally.true_pairs += int((truth & rivals).sum())
    tally.proved_by_bounds += int((plain & rivals).sum())
    tally.proved_by_margin += int((proved & rivals).sum())
    tally.false_proofs += int((proved & ~truth & rivals).sum())
    for label in labels.tolist():
        whole = check_margin.holds(
            graph, (bounds[0][0], bounds[1][0]), (source[0][0], source[1][0]), label
        )
        tally.checker_differences += int(whole != bool(proved[label].all()))
