"""Models with int16 activations in every installed runtime, whole and layer by layer."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.evidence import results
from tests.foreign_int16 import FAMILY
from tests.test_int16 import RUNTIMES, compared

pytestmark = pytest.mark.evidence

WANTED = 1_000_000
SAMPLES = 80


def test_a_million_elements_in_every_runtime() -> None:
    rows: list[dict[str, object]] = []
    for peer in RUNTIMES:
        if peer.absence:
            pytest.skip(f"{peer.name}: {peer.absence}")
        elements, wrong, seed = 0, Counter[str](), 0
        models: set[str] = set()
        while elements < WANTED:
            for name, count, different in compared(peer, seed, SAMPLES, SAMPLES):
                elements += count
                wrong[name] += different
                models.add(name)
            seed += 1
        rows.append(
            {
                "runtime": peer.name,
                "version": peer.version,
                "profile": peer.profile,
                "models": len(models),
                "scales drawn": seed,
                "elements": elements,
                "mismatches": wrong.total(),
            }
        )
    text = (
        f"A family of {len(FAMILY)} models with int16 activations and int8 weights; scales, "
        "weights and inputs are drawn. Each model runs as its file says, and up to each of its "
        "layers, in every runtime whose profile describes it; every element is compared with the "
        "reference executor under that profile."
    )
    results.write("int16", "Int16 activations", text, rows)
    assert all(row["mismatches"] == 0 for row in rows), rows
