"""Compiled kernels against the reference executor, on every tier, in bulk.

Tiers that this machine lacks run with their instructions replaced, in processes of their own:
``python -m tests.evidence.test_kernels``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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
from tests.kernels import substitutes
from tests.kernels.cases import COUNTS, PROFILES, Case, assert_equal, extreme_case, random_case

GRAPHS = 1000
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


def compared(first: int, tiers: Sequence[Tier]) -> Counter[str]:
    """A block of graphs, each under these tiers and all layouts; fails on a difference."""
    tally: Counter[str] = Counter()
    for seed in range(first, first + _BLOCK):
        case = drawn(seed)
        expected = case.expected()
        tally["graphs"] += 1
        for op in case.graph.core:
            tally[f"operators: {op.kind}"] += 1
        for tier in tiers:
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


def compared_replaced(first: int, tiers: Sequence[Tier]) -> Counter[str]:
    """The same for tiers that the machine lacks; not in a process that does anything else."""
    substitutes.install()
    return compared(first, tiers)


def lacking() -> list[Tier]:
    """Tiers whose instructions this machine does not have."""
    return [tier for tier in substitutes.REPLACED if tier not in available()]


def replaced() -> Counter[str]:
    """All graphs under the tiers that this machine lacks."""
    parts = joblib.Parallel(n_jobs=2)(
        joblib.delayed(compared_replaced)(first, lacking()) for first in range(0, GRAPHS, _BLOCK)
    )
    return sum(parts, Counter())


@pytest.mark.evidence
def test_kernels_equal_the_reference() -> None:
    parts = joblib.Parallel(n_jobs=2)(
        joblib.delayed(compared)(first, available()) for first in range(0, GRAPHS, _BLOCK)
    )
    total: Counter[str] = sum(parts, Counter())
    with tempfile.TemporaryDirectory() as cache:
        completed = subprocess.run(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"NUMBA_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            check=True,
        )
    others: Counter[str] = Counter(json.loads(completed.stdout))
    for tier in lacking():
        total[f"cases on {tier}, instructions replaced"] = others[f"cases on {tier}"]
    for name in ("elements compared", "logits compared alone"):
        total[f"{name}, instructions replaced"] = others[name]
    per_tier = {name: n for name, n in total.items() if name.startswith("cases on")}
    assert set(per_tier.values()) == {total[f"cases on {Tier.PLAIN}"]}
    cases = sum(per_tier.values())
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
        "graph on one tier; every activation of it is compared with the reference executor's, "
        "under each layout of the weights. Asked for the logits alone, sessions leave out channels "
        "that do not matter. Tiers that the machine lacks run their own tiles, tables and loops, "
        "with plain code in place of each instruction that is missing "
        "(`tests/kernels/substitutes.py`). The test ends at the first difference.",
        rows,
    )


if __name__ == "__main__":
    from tests.evidence import test_kernels  # by its name, as workers import it

    print(json.dumps(test_kernels.replaced()))
