"""Search for integer counterexamples: gradients to corners, then hops from valley to valley.

The network is evaluated in its own integers. What is returned is an integer input inside the box;
the caller verifies it with the reference executor. See ``attack_network`` for the gradient,
``attack_routes`` for what is driven down, ``attack_moves`` for how.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cactus_edge.certify.attack_moves import (
    NOT_FOUND,
    Points,
    Rows,
    Search,
    anywhere,
    corners,
    descend,
    hop,
    keys,
)
from cactus_edge.certify.attack_network import Network
from cactus_edge.certify.attack_routes import Routes, routes
from cactus_edge.certify.boxes import every_point
from cactus_edge.errors import UsageError
from cactus_edge.graph import Graph, Int64Array

_BLOCK = 64
"""Samples that are attacked together; it bounds memory and changes nothing else."""
_WIDEST = (1 << 15) - 1
"""Of a box: differences of points, and a certificate's counterexample, are int16."""
_FIRST_STEPS = 3
_RESTART = 1 << 32
"""Restarts draw from turns that no hop reaches."""


@dataclass(frozen=True)
class Settings:
    """Strength of the search.

    ``steps``: gradient steps of each descent. ``restarts``: chains of hops after the first one,
    each begun by a descent from a random point. ``hops``: length of a chain. ``routes``: how many
    routes to a wrong decision are followed, of those that look shortest. ``points``: a box of up
    to so many points is searched completely. ``seed``: of all that is random, 0 to 2**64 - 1.
    """

    steps: int = 20
    restarts: int = 2
    hops: int = 100
    routes: int = 3
    points: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: no step, no route, or a negative number.
        """
        if (
            min(self.steps, self.routes) < 1
            or min(self.restarts, self.hops, self.points, self.seed) < 0
        ):
            raise UsageError("an attack needs a step and a route at least, and no negative number")
        if self.seed >= 1 << 64:
            raise UsageError(f"seed {self.seed} has more than 64 bits")

    @staticmethod
    def strong() -> Settings:
        """Some twenty times the work: for the last few samples that stay open."""
        return Settings(steps=40, restarts=4, hops=1000, routes=5, points=1 << 16)


def search(
    graph: Graph,
    stored: Int64Array,
    lower: Int64Array,
    upper: Int64Array,
    labels: Int64Array,
    settings: Settings,
    *,
    threads: int | None = None,
) -> list[Int64Array | None]:
    """For each sample an integer input in its box that is surely misclassified, or None.

    What is found for a sample depends on that sample and the settings alone.

    Args:
        graph: resolved.
        stored: int64 [samples, ...], the samples.
        lower: int64, the boxes' lower ends; ``upper`` likewise.
        upper: see ``lower``.
        labels: int64 [samples].
        settings: strength of the search.
        threads: among which the samples are divided; as many as the process may use if None.

    Raises:
        UsageError: less than one thread.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads; give at least 1")
    if graph.tensors[graph.logits].size < 2:
        return [None] * len(labels)  # without a rival nothing is wrong
    if int((upper - lower).max(initial=0)) > _WIDEST:
        return [None] * len(labels)
    network, ways = _attacker(graph)
    workers = max(1, min(threads or network.threads, len(labels)))
    size = max(1, min(_BLOCK, -(-len(labels) // workers)))

    def attack(start: int) -> dict[int, Points]:
        owners = np.arange(start, min(start + size, len(labels)))
        boxes = tuple(array[owners].reshape(owners.size, -1) for array in (stored, lower, upper))
        return _attack(Search(network, ways), owners, boxes, labels[owners], settings)

    found: dict[int, Points] = {}
    with ThreadPoolExecutor(workers) as executor:
        for part in executor.map(attack, range(0, len(labels), size)):
            found |= part
    shape = stored.shape[1:]
    return [
        found[i].astype(np.int64).reshape(shape) if i in found else None for i in range(len(labels))
    ]


@lru_cache(maxsize=4)
def _attacker(graph: Graph) -> tuple[Network, Routes]:
    """A compiled network; certificates attack the same few graphs chunk after chunk."""
    network = Network(graph)
    return network, routes(network)


def _attack(
    attack: Search,
    owners: Int64Array,
    boxes: tuple[Int64Array, ...],
    labels: Int64Array,
    settings: Settings,
) -> dict[int, Points]:
    """What is found for a block of samples, by the sample's number."""
    point, lower, upper = (np.ascontiguousarray(array, np.int16) for array in boxes)
    contents = [
        b"".join(array[i].astype("<i8").tobytes() for array in (*boxes, labels[:, None]))
        for i in range(len(owners))
    ]
    rows = Rows(
        owner=owners,
        label=labels,
        code=labels.copy(),
        lower=lower,
        upper=upper,
        point=point,
        deficit=np.full(len(owners), NOT_FOUND),
        key=keys(settings.seed, contents),
    )
    rows = corners(attack, _enumerated(attack, rows, settings.points), settings.routes)
    rows = descend(attack, rows, rows.point.copy(), _FIRST_STEPS)
    for chain in range(settings.restarts + 1):
        current = rows = attack.alive(rows)
        if chain:
            current = rows.take(np.arange(rows.owner.size))
            current.deficit[:] = NOT_FOUND
            current = descend(attack, current, anywhere(current, _RESTART + chain), settings.steps)
        for step in range(settings.hops):
            if not current.owner.size:
                break
            current = hop(attack, current, chain * settings.hops + step)
    return attack.found


def _enumerated(attack: Search, rows: Rows, limit: int) -> Rows:
    """Search boxes of up to ``limit`` points completely; the rows that are larger."""
    extents = rows.upper.astype(np.int64) - rows.lower + 1
    bits = np.array([sum(map(int.bit_length, row)) for row in (extents - 1).tolist()])
    small = np.flatnonzero(bits < 32)
    small = small[extents[small].prod(axis=1) <= limit]
    for row in small.tolist():
        points = every_point(rows.lower[row].astype(np.int64), rows.upper[row].astype(np.int64))
        attack.look(rows.take(np.full(len(points), row)), points.astype(np.int16))
    return rows.take(~np.isin(np.arange(len(extents)), small))
