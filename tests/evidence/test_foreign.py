"""Models of another converter in every installed runtime, whole and layer by layer.

And in those of 64-bit Arm on an emulated Cortex-A72, but for the reference kernels, which are the
same code.
"""

from __future__ import annotations

from collections import Counter

import pytest

from cactus_edge.validate import Peer
from tests.evidence import results
from tests.evidence.matrix.places import LITERT, NATIVE, places
from tests.foreign import FAMILY
from tests.test_foreign import RUNTIMES, compared

pytestmark = pytest.mark.evidence

WANTED = 10_000_000
SAMPLES = 160


def everywhere() -> list[tuple[str, Peer]]:
    """Machines and runtimes; the newest release of each that runs there."""
    found = [(NATIVE, peer) for peer in RUNTIMES]
    for place in places():
        newest = place.peer.installed in ("2.14.0", LITERT[0])
        stock = newest and place.peer.mode != "BUILTIN_REF"
        if place.machine == "Cortex-A72" and stock and not place.missing:
            found.append((place.machine, place.peer))
    return found


def test_ten_million_elements_in_every_runtime() -> None:
    rows: list[dict[str, object]] = []
    for machine, peer in everywhere():
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
                "machine": machine,
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
        "describes it; every element is compared with the reference executor under that profile. "
        "The Cortex-A72 is emulated."
    )
    results.write("foreign", "Models of other converters", text, rows)
    assert all(row["mismatches"] == 0 for row in rows), rows
