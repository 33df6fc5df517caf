"""Search for integer counterexamples: gradients to corners, then hops from valley to valley.

The network is evaluated in its own integers. What is returned is an integer input inside the box;
the caller verifies it with the reference executor. See ``attack_network`` for the gradient,
``attack_routes`` for what is driven down, ``attack_moves`` for how.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

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
from cactus_edge.errors import UsageError
from cactus_edge.execute import windows
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    Conv2D,
    DepthwiseConv2D,
    FullyConnected,
    Graph,
    Int64Array,
    Linear,
    MaxPool2D,
    Operator,
    Pad,
    Pool2D,
    Stored,
)
from cactus_edge.semantics import AddRounding, Rounding

FloatArray = npt.NDArray[np.float32]

_BLOCK = 64
"""Samples that are attacked together; it bounds memory and changes nothing else."""
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
        threads: as many as the process may use if None.
    """
    network, ways = _attacker(graph)
    found: dict[int, Points] = {}
    workers = max(1, min(threads or network.threads, len(labels)))
    size = max(1, min(_BLOCK, -(-len(labels) // workers)))

    def attack(start: int) -> None:
        owners = np.arange(start, min(start + size, len(labels)))
        boxes = (array[owners].reshape(owners.size, -1) for array in (stored, lower, upper))
        _attack(Search(network, ways, found), owners, tuple(boxes), labels[owners], settings)

    with ThreadPoolExecutor(workers) as executor:
        for _ in executor.map(attack, range(0, len(labels), size)):
            pass
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
) -> None:
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
        turn = chain * settings.hops
        current = rows = attack.alive(rows)
        if chain:
            current = rows.take(np.arange(rows.owner.size))
            current.deficit[:] = NOT_FOUND
            current = descend(attack, current, anywhere(current, _RESTART + chain), settings.steps)
        for hops in range(settings.hops):
            if not current.owner.size:
                break
            current = hop(attack, current, turn + hops)


def _enumerated(attack: Search, rows: Rows, limit: int) -> Rows:
    """Search boxes of up to ``limit`` points completely; the rows that are larger."""
    extents = rows.upper.astype(np.int64) - rows.lower + 1
    bits = np.array([sum(map(int.bit_length, row)) for row in (extents - 1).tolist()])
    small = np.flatnonzero(bits < 32)
    small = small[extents[small].prod(axis=1) <= limit]
    for row in small.tolist():
        count = int(extents[row].prod())
        offsets = np.stack(np.unravel_index(np.arange(count), tuple(extents[row])), axis=-1)
        points = (rows.lower[row] + offsets).astype(np.int16)
        attack.look(rows.take(np.full(count, row)), points)
    return rows.take(~np.isin(np.arange(len(extents)), small))


def backward(
    graph: Graph, op: Operator, values: Mapping[int, Stored], outgoing: FloatArray
) -> list[FloatArray]:
    """Gradients with respect to the operator's inputs, one for each."""
    shape = (len(outgoing), *graph.tensors[op.inputs[0]].shape[1:])
    match op:
        case FullyConnected():
            scaled = outgoing * _factors(op)
            return [(scaled @ op.weights.values.astype(np.float32)).reshape(shape)]
        case Conv2D():
            return [_convolution(op, outgoing * _factors(op), shape)]
        case Add():
            assert op.requantization is not None
            m_a, s_a, m_b, s_b, m_o, s_o = op.requantization.integers
            if op.requantization.rounding is AddRounding.FIXED_POINT:
                return [outgoing * (m / 2.0**s_o) for m in (m_a, m_b)]
            base = 0 if op.requantization.rounding is AddRounding.SINGLE else 31
            out = m_o / 2.0 ** (s_o + base) * 2.0**20
            return [outgoing * (out * m / 2.0 ** (s + base)) for m, s in ((m_a, s_a), (m_b, s_b))]
        case Pool2D():
            return [_pool(op, values, outgoing, shape)]
        case Pad():
            (top, _), (left, _) = op.paddings[1], op.paddings[2]
            return [outgoing[:, top : top + shape[1], left : left + shape[2]]]
        case _:
            return [outgoing.reshape(shape)]


def _factors(op: Linear) -> FloatArray:
    parameters = op.requantization
    assert parameters is not None, "graph is not resolved"
    double = np.isin(
        parameters.rounding, [int(Rounding.DOUBLE_HALF_AWAY), int(Rounding.DOUBLE_HALF_UP)]
    )
    shift = parameters.shift + np.where(double, 31, 0)
    return (parameters.multiplier / np.exp2(shift.astype(np.float64))).astype(np.float32)


def _taps(op: Conv2D | Pool2D, kernel: tuple[int, ...], shape: tuple[int, ...]):  # noqa: ANN202
    """For each kernel tap: the flat input position that each output element reads, or -1."""
    dilation = op.dilation if isinstance(op, Conv2D) else (1, 1)
    position = np.arange(shape[1] * shape[2], dtype=np.int64).reshape(1, shape[1], shape[2], 1)
    return windows(position, kernel, op.stride, dilation, op.padding, fill=-1)


def _convolution(op: Conv2D, scaled: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    weights = op.weights.values.astype(np.float32)
    incoming = np.zeros((shape[0], shape[1] * shape[2] + 1, shape[3]), np.float32)
    for (row, column), position in _taps(op, weights.shape[1:3], shape):
        where = position.reshape(-1)
        if isinstance(op, DepthwiseConv2D):
            product = scaled * weights[0, row, column]
            product = product.reshape(*product.shape[:3], shape[3], -1).sum(axis=-1)
        else:
            product = scaled @ weights[:, row, column]
        # Within one tap every output element reads another input element: += loses nothing.
        incoming[:, where] += product.reshape(shape[0], where.size, shape[3])
        incoming[:, -1] = 0
    return incoming[:, :-1].reshape(shape)


def _pool(
    op: Pool2D, values: Mapping[int, Stored], outgoing: FloatArray, shape: tuple[int, ...]
) -> FloatArray:
    incoming = np.zeros((shape[0], shape[1] * shape[2] + 1, shape[3]), np.float32)
    taps = _taps(op, op.window, shape)
    flat = values[op.inputs[0]].reshape(shape[0], -1, shape[3])
    count = np.sum([position >= 0 for _, position in taps], axis=0)
    for _, position in taps:
        where = position.reshape(-1)
        share = outgoing
        if isinstance(op, AveragePool2D):
            share = outgoing / count
        else:
            assert isinstance(op, MaxPool2D)
            read = flat[:, where].reshape(outgoing.shape)
            share = outgoing * (read == values[op.output]) * (position >= 0)
        incoming[:, where] += share.reshape(shape[0], where.size, shape[3])
        incoming[:, -1] = 0
    return incoming[:, :-1].reshape(shape)
