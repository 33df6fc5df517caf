"""The named byte strings of a file: how inputs are stored, where it is from, who agrees on it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import cactus_edge
from cactus_edge import universal
from cactus_edge.graph import Graph
from cactus_edge.inputs import METADATA


def metadata_of(
    graph: Graph, provenance: Mapping[str, object], *, pixels: bool
) -> tuple[tuple[str, bytes], ...]:
    """Metadata of a converted graph; ``pixels``: its inputs are uint8 pixels less 128."""
    mapping: dict[str, object] = (
        {"kind": "pixel", "levels_per_unit": 255, "offset": -128} if pixels else {"kind": "affine"}
    )
    disagreeing = {e.name: e.disagreeing for e in universal.agreement(graph) if e.disagreeing}
    rounding: object = {"disagreeing channels": disagreeing} if disagreeing else "universal"
    entries: dict[str, object] = {
        METADATA: mapping,
        "cactus_edge.provenance": {
            "tool": f"cactus-edge {cactus_edge.__version__}",
            **provenance,
        },
        "cactus_edge.rounding": rounding,
    }
    return tuple(
        (name, json.dumps(value, sort_keys=True).encode()) for name, value in entries.items()
    )
