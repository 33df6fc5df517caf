"""The tiers of a Raspberry Pi 4 and 5, element for element, on an emulated CPU.

Correctness is what an emulator can show. Speed is that of LLVM's model of the CPU, for the
innermost loop of each tile: what the loop costs if every load hits the first cache.
"""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.evidence import emulator, results

GRAPHS = 200
_PIECES = 2
"""Processes for each tier; each of them reads the compiled kernels from the cache."""
_SECONDS = 4 * 3600


@pytest.fixture(scope="module", autouse=True)
def emulated() -> None:
    try:
        emulator.prepare()
    except emulator.Unavailable as error:
        pytest.skip(str(error))


def compared(tier: str, first: int, count: int) -> Counter[str]:
    arguments = ["-m", "tests.evidence.emulated", "cases", tier, str(first), str(count)]
    return Counter(json.loads(emulator.run(tier, arguments, _SECONDS)))


def loops(tier: str) -> list[dict[str, object]]:
    """A row for each tile that the tier has."""
    answer = emulator.run(tier, ["-m", "tests.evidence.emulated", "loops", tier], _SECONDS)
    rows: list[dict[str, object]] = []
    for loop in json.loads(answer):
        if not loop["dots"]:
            continue
        cycles = emulator.cycles(tier, loop["body"])
        rows.append(
            {
                "tier": tier,
                "figure": f"loop of {loop['tile'].replace('_', ' ')}",
                "value": f"{loop['instructions']} instructions, {loop['products']} products, "
                f"{cycles:.1f} cycles",
                "products a cycle": f"{loop['products'] / cycles:.1f}",
            }
        )
    return rows


@pytest.mark.evidence
def test_emulated_tiers() -> None:
    tiers = list(emulator.CPUS)
    # The first case of each tier compiles; the others must find its code in the cache.
    with ThreadPoolExecutor(len(tiers)) as executor:
        totals = dict(zip(tiers, executor.map(lambda t: compared(t, 0, 1), tiers), strict=True))
        size = GRAPHS // _PIECES
        pieces = [(tier, 1 + size * i) for tier in tiers for i in range(_PIECES)]
        parts = executor.map(lambda piece: compared(*piece, size), pieces)
        for (tier, _), part in zip(pieces, parts, strict=True):
            totals[tier] += part
    rows: list[dict[str, object]] = []
    for tier, total in totals.items():
        assert total["graphs"] == GRAPHS + 1
        assert total["elements"] > 0 < total["threaded"]
        for name, count in total.items():
            rows.append(
                {"tier": tier, "figure": name, "value": f"{count:,}", "products a cycle": ""}
            )
        model = loops(tier)
        assert {"loop of dense wide", "loop of stream"} <= {str(row["figure"]) for row in model}
        rows += model
    names = ", ".join(f"`{tier}` on {cpu}" for tier, cpu in emulator.CPUS.items())
    results.write(
        "aarch64",
        "The tiers of 64-bit Arm",
        f"Python, Numba and the kernels for arm64 under qemu-user: {names}. `elements` are "
        "activations that a session computed and that equal the reference executor's, over "
        "`runs` sessions (each graph densely, sparsely, by blocks and as measured); `threaded` "
        "graphs were also run on two threads. The loops are what LLVM makes of each tile for that "
        "CPU; cycles are llvm-mca's for its model of the CPU (Neoverse N1 for Cortex-A76), not "
        "measurements. At most 32 products a cycle are possible on Cortex-A76.",
        rows,
    )
