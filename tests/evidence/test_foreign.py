"""Models of another converter in every installed runtime, whole and layer by layer."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.evidence import results
from tests.foreign import FAMILY
from tests.test_foreign import RUNTIMES, compared

pytestmark = pytest.mark.evidence

WANTED = 10_000_000
SAMPLES = 160


def test_ten_million_elements_in_every_runtime() -> None:
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
        f"A family of {len(FAMILY)} models, written table by table as other converters write them, "
        "covers every supported operator and option; scales, weights and inputs are drawn. Each "
        "model runs as its file says, and up to each of its layers, in every runtime whose profile "
        "describes it; every element is compared with the reference executor under that profile."
    )
    results.write("foreign", "Models of other converters", text, rows)
    assert all(row["mismatches"] == 0 for row in rows), rows
