"""Which modules read a target's files: their branches guide a search."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "cactus_edge"

GUIDED = {
    "tflite": (
        "cactus_edge.flatbuffer.reader",
        "cactus_edge.flatbuffer.node",
        "cactus_edge.flatbuffer.operators",
        "cactus_edge.flatbuffer.imported",
        "cactus_edge.flatbuffer.packing",
        "cactus_edge.flatbuffer.wire",
        "cactus_edge.constraints",
    ),
    "onnx": ("cactus_edge.onnx_io",),
    "checkpoint": ("cactus_edge.train.checkpoint", "cactus_edge.train.recipe"),
    "recipe": ("cactus_edge.train.recipe", "tomllib"),
    "certificate": ("cactus_edge.certificate", "cactus_edge.check", "cactus_edge.inputs"),
    "query": ("cactus_edge.vnnlib", "cactus_edge.specification", "cactus_edge.inputs"),
    "arrays": ("cactus_edge.datasets", "zipfile", "numpy.lib.format"),
    "radii": ("cactus_edge.radii", "cactus_edge.inputs"),
    "images": ("cactus_edge.datasets", "gzip"),
    "archive": ("cactus_edge.datasets", "tarfile"),
    "flights": ("cactus_edge.datasets",),
    "faults": ("cactus_edge.fault_report",),
    "signature": ("cactus_edge.signing",),
}
"""Prefixes of the names of modules."""


def guide(target: str) -> tuple[str, ...]:
    """Those of a target; one with a second word reads the same files as the one without."""
    return GUIDED[target.partition("-")[0]]


def readers(target: str) -> str:
    """A digest of the target's modules of this package, with which its executions are counted."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name.startswith(guide(target)):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
