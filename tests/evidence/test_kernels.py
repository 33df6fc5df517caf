"""Compiled kernels against the reference executor, on every tier of this machine, in bulk."""

from __future__ import annotations

from collections import Counter

import joblib
import numpy as np
import pytest

from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.program import build
from cactus_edge.kernels.simd.tiers import Tier, available
from cactus_edge.kernels.threads import ParallelWorker
from cactus_edge.semantics import Rounding
from tests.evidence import results
from tests.kernels.cases import COUNTS, PROFILES, Case, assert_equal, extreme_case, random_case

GRAPHS = 1600
LEAST_CASES = 100_000
_BLOCK = 20
_EXTREME = 8
"""Every eighth graph is a layer with the largest accumulators."""


def drawn(seed: int) -> Case:
    """A graph with its inputs: profiles and numbers of images in turn."""
    if seed % _EXTREME == 0:
        roundings = list(Rounding)
        rounding = roundings[seed // _EXTREME % len(roundings)]
        return extreme_case(np.random.default_rng(seed), rounding, 2)
    return random_case(seed, COUNTS[seed % len(COUNTS)], PROFILES[seed // 3 % len(PROFILES)])


def compared(first: int) -> Counter[str]:
    """A block of graphs, each under every tier and layout; fails on any element that differs."""
    tally: Counter[str] = Counter()
    for seed in range(first, first + _BLOCK):
        case = drawn(seed)
        expected = case.expected()
        tally["graphs"] += 1
        for op in case.graph.core:
            tally[f"operators: {op.kind}"] += 1
        for tier in available():
            tally[f"cases on {tier}"] += len(case.inputs)
            for layout in Layout:
                threads = 1 + seed % 3
                run = (case, tier, layout, threads, expected)
                tally["elements compared"] += assert_equal(*run)
                tally["logits compared alone"] += assert_equal(*run, tensors=[case.graph.logits])
                tally["sessions"] += 2
            if seed % 4 == 1:
                tally["runs on several threads"] += run_on_threads(case, tier, seed)
    return tally


def run_on_threads(case: Case, tier: Tier, seed: int) -> int:
    """A single image on two to four threads, all steps divided, against one thread."""
    program = build(case.graph, core_tensors(case.graph), 1, Layout.DENSE, tier)
    batch = np.random.default_rng(seed).integers(0, 256, (8, program.image_bytes), dtype=np.uint8)
    outcomes: list[np.ndarray] = []
    for threads in (1, 2 + seed % 3):
        worker = ParallelWorker(program, threads, grain=0)
        outcomes.append(np.zeros((len(batch), program.result_bytes), np.uint8))
        worker.run(batch, outcomes[-1])
        worker.close()
    np.testing.assert_array_equal(*outcomes)
    return len(batch)


@pytest.mark.evidence
def test_kernels_equal_the_reference() -> None:
    parts = joblib.Parallel(n_jobs=2)(
        joblib.delayed(compared)(first) for first in range(0, GRAPHS, _BLOCK)
    )
    total: Counter[str] = sum(parts, Counter())
    cases = sum(count for name, count in total.items() if name.startswith("cases on"))
    assert cases >= LEAST_CASES
    assert total["graphs"] == GRAPHS
    rows = [{"figure": "cases", "count": f"{cases:,}"}]
    rows += [{"figure": name, "count": f"{total[name]:,}"} for name in sorted(total)]
    rows.append({"figure": "elements that differ", "count": "0"})
    results.write(
        "kernels-equality",
        "Compiled kernels equal the reference",
        "Random graphs over all operators, profiles, weight widths and patterns of zeros, and "
        "layers whose accumulators come close to their proved limit. A case is one input of one "
        "graph on one tier of this machine; every activation of it is compared with the reference "
        "executor's, under each layout of the weights. Asked for the logits alone, sessions leave "
        "out channels that do not matter. The test ends at the first difference.",
        rows,
    )
