"""The tables of docs/runtimes.md are those of the profiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cactus_edge import profiles
from cactus_edge.scales import ScaleArithmetic
from cactus_edge.semantics import AddRounding, Rounding

ROUNDING_NAMES = dict(zip(Rounding, ("away", "up", "single", "float32", "float64"), strict=True))
SCALE_NAMES = {
    ScaleArithmetic.FLOAT64: "",
    ScaleArithmetic.FLOAT32_PRODUCT: " p",
    ScaleArithmetic.FLOAT32: " f",
    ScaleArithmetic.FLOAT32_REASSOCIATED: " r",
}


def label(*pair: profiles.Method) -> str:
    texts = [ROUNDING_NAMES[m.rounding] + SCALE_NAMES[m.scale] for m in pair]
    return " / ".join(dict.fromkeys(texts))


def exceptions(profile: profiles.Profile) -> str:
    notes: list[str] = []
    if profile.depthwise_vector:
        notes.append(f"first 8n depthwise channels {label(profile.depthwise_vector)}")
    if profile.vector:
        notes.append(f"FULLY_CONNECTED from 4 outputs and 8 inputs {label(*profile.vector)}")
    if profile.convolution_vector:
        method = label(profile.convolution_vector)
        notes.append(f"convolutions to one pixel from 4 channels of 8 weights {method}")
    if profile.one_channel:
        notes.append(f"convolutions to one channel {label(profile.one_channel)}")
    if profile.packed:
        which = " but FULLY_CONNECTED of even inputs" if profile.packed_fully_connected else ""
        notes.append(f"int4{which} as `{profile.packed}`")
    if profile.add_early_shift:
        notes.append("ADD not always covered")
    if profile.needs_covering_windows:
        notes.append("SAME not always covered")
    return "; ".join(notes)


def manual_table() -> str:
    lines = [
        "| profile | FULLY_CONNECTED | CONV_2D | DEPTHWISE_CONV_2D | ADD | except |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    adds = dict(zip(AddRounding, ("away", "single", "fixed point"), strict=False))
    for name, profile in profiles.PROFILES.items():
        cells = (
            f"`{name}`",
            label(*profile.fully_connected),
            label(*profile.convolution),
            label(profile.depthwise),
            adds[profile.add],
            exceptions(profile),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def table_of_tables() -> str:
    lines = ["| profile | tables | MEAN |", "| --- | --- | --- |"]
    for name, profile in profiles.PROFILES.items():
        tables = profile.arithmetic.value if profile.arithmetic else "-"
        mean = label(profile.mean) if profile.mean else "-"
        mean += "" if profile.mean_keeps else " where it keeps no dimensions"
        lines.append(f"| `{name}` | {tables} | {mean} |")
    return "\n".join(lines)


@pytest.mark.parametrize("make", [manual_table, table_of_tables])
def test_the_manual_has_the_table_of_profiles(make: Callable[[], str]) -> None:
    manual = Path(__file__).parent.parent / "docs" / "runtimes.md"
    table = make()
    assert table in manual.read_text(encoding="utf-8"), f"docs/runtimes.md lacks\n{table}"
