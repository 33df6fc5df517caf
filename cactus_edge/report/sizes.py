"""Bytes of what ships beside what the same layers take otherwise, counted and not estimated.

Other forms hold the same weights and biases, zeros included, and nothing else: no file's structure,
no program. The constants of the generated C are those that ``export-c`` writes; what our kernels
pack, and the flash of a board, are known where a ``search`` has measured this very model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cactus_edge import profiles
from cactus_edge.csource import generate
from cactus_edge.errors import CactusEdgeError
from cactus_edge.graph import Graph, Linear
from cactus_edge.report.sources import Claim, Model, Search, Sources

_FLOAT32, _INT8, _BIAS = 4, 1, 4
_MOST_WEIGHTS = 1_000_000
"""Of models whose C is generated for a page; that of larger ones takes its time."""


@dataclass(frozen=True)
class Size:
    """One form; ``share`` is its bytes over those of the file that ships."""

    form: str
    bytes: int
    share: float  # float: reported


@dataclass(frozen=True)
class Sizes:
    """Of one model: ``weights`` are counted with zeros, ``nonzero`` without."""

    model: str
    weights: int
    nonzero: int
    forms: tuple[Size, ...]


def sizes(sources: Sources) -> tuple[Sizes, ...]:
    """Of each model that was given; equal files give equal sizes."""
    claim = sources.main
    return tuple(_of(model, claim, number, sources) for number, model in enumerate(sources.models))


def _of(model: Model, claim: Claim, number: int, sources: Sources) -> Sizes:
    layers = [op for op in model.graph.operators if isinstance(op, Linear)]
    weights = sum(op.weights.values.size for op in layers)
    biases = sum(len(op.bias) for op in layers)
    found = [
        (f"{model.path.name}, the file that ships", model.bytes),
        ("its weights and biases as float32", _FLOAT32 * (weights + biases)),
        ("its weights as plain int8, biases as int32", _INT8 * weights + _BIAS * biases),
    ]
    if weights <= _MOST_WEIGHTS:
        found += _generated(model.graph, claim.head.arithmetic[number].profiles)
    for search in sources.searches:
        found += _searched(search, model.sha256)
    return Sizes(
        model.path.name,
        weights,
        sum(int((op.weights.values != 0).sum()) for op in layers),
        tuple(Size(form, size, size / model.bytes) for form, size in dict.fromkeys(found)),
    )


def _generated(graph: Graph, covered: Sequence[str]) -> Iterator[tuple[str, int]]:
    """All constants of ``export-c``, under a profile of the certificate."""
    if not covered:
        return
    profile = profiles.DEFAULT if profiles.DEFAULT in covered else covered[0]
    try:
        source = generate(graph, profile)
    except CactusEdgeError:  # a model that has no C
        return
    layouts = ", ".join(dict.fromkeys(layer.layout for layer in source.layers if layer.layout))
    yield f"constants of its generated C ({layouts})", source.table_bytes


def _searched(search: Search, sha256: str) -> Iterable[tuple[str, int]]:
    for row in search.rows:
        if row.model.sha256 != sha256:
            continue
        if row.latency is not None:
            yield f"packed for our kernels on {search.device.processor}", row.latency.packed_bytes
        if row.model.firmware is not None:
            yield (
                f"all of its firmware's flash on {search.device.name}",
                (row.model.firmware.flash_bytes),
            )
