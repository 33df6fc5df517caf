"""The moves of an attack: corners along a gradient, and hops to other valleys.

A *row* is one sample on one route (see ``attack_routes``) with the best point it has found. Rows
never look at each other, their random numbers are a hash of the sample's content, and all
arithmetic is in integers: what a row finds depends neither on the batch nor on the machine.

A hop throws a share of the coordinates to other values and walks back uphill: along the gradient,
every coordinate or only those that gain more than the mean go to their end of the box, whichever is
best. Where the last accumulator units are decided by roundings, this finds in a tenth of the time
what restarted gradient ascent finds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cactus_edge import decision
from cactus_edge.certify.attack_network import Network, Values, transposed
from cactus_edge.certify.attack_routes import Routes
from cactus_edge.graph import BoolArray, DType, Int64Array

Points = npt.NDArray[np.int16]
UInt64Array = npt.NDArray[np.uint64]
NOT_FOUND = 1 << 61

_RIVALS = 16
_LEAK = 2
_GAINS = (0, 1)
"""A candidate moves the coordinates that gain more than this many means."""
_SHARES = (32, 64, 16, 128)
"""Of 256 coordinates, hops throw this many, in turn, and one coordinate at the least."""
_RANKS = (0, 0, 0, 1, 0, 0, 0, 2)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(eq=False)
class Rows:
    """A sample on a route in each row of these arrays.

    ``owner``, ``label``, ``code`` (the route), ``deficit`` (of ``point``) and ``key`` are [rows],
    ``lower``, ``upper`` and ``point`` [rows, elements].
    """

    owner: Int64Array
    label: Int64Array
    code: Int64Array
    lower: Points
    upper: Points
    point: Points
    deficit: Int64Array
    key: UInt64Array

    def take(self, index: Int64Array | BoolArray) -> Rows:
        """The chosen rows, in the order of ``index``."""
        return Rows(**{name: array[index] for name, array in vars(self).items()})

    def improve(self, point: Points, deficit: Int64Array) -> None:
        """Keep what is at least as good as what was known."""
        better = deficit <= self.deficit
        self.point[better] = point[better]
        self.deficit[better] = deficit[better]


@dataclass(frozen=True, eq=False)
class Trial:
    """Points that were evaluated: deficits on the row's route, and which are surely wrong."""

    values: Values
    scores: Int64Array
    deficit: Int64Array
    wrong: BoolArray

    def take(self, index: Int64Array | BoolArray) -> Trial:
        """The chosen points."""
        values = {tensor: stored[index] for tensor, stored in self.values.items()}
        return Trial(values, self.scores[index], self.deficit[index], self.wrong[index])


@dataclass(eq=False)
class Search:
    """The network under attack and the counterexamples found so far, by the sample's number."""

    network: Network
    routes: Routes
    found: dict[int, Points] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what the network's input looks like."""
        tensor = self.network.graph.tensors[self.network.graph.core_input]
        self._shape = tensor.shape[1:]
        types = {DType.UINT8: np.uint8, DType.INT8: np.int8, DType.INT16: np.int16}
        self._type = types[tensor.dtype]

    def look(self, rows: Rows, point: Points) -> Trial:
        """Evaluate one point for each row and note what is wrong."""
        values = self.network.forward(point.astype(self._type).reshape(-1, *self._shape))
        scores = self.network.scores(values)
        logits = self.network.logits(values)
        wrong = decision.surely_wrong(self.network.graph, logits, rows.label)
        for row in np.flatnonzero(wrong).tolist():
            self.found.setdefault(int(rows.owner[row]), point[row].copy())
        return Trial(values, scores, self.routes.deficits(scores, rows.label, rows.code), wrong)

    def alive(self, rows: Rows) -> Rows:
        """The rows whose sample is still open."""
        done = np.array(list(self.found), np.int64)
        return rows.take(~np.isin(rows.owner, done)) if done.size else rows

    def uphill(self, rows: Rows, trial: Trial) -> Int64Array:
        """Gradient that lowers the deficit, int64 [rows, elements].

        Where clamps stop all of it, some leaks through.
        """
        seeds = self.routes.seeds(trial.scores, rows.label, rows.code)
        gradient = transposed(self.network, trial.values, seeds).reshape(len(seeds), -1)
        flat = np.flatnonzero(~gradient.any(axis=1))
        if flat.size:
            part = trial.take(flat)
            leaked = transposed(self.network, part.values, seeds[flat], _LEAK)
            gradient[flat] = leaked.reshape(flat.size, -1)
        return gradient.astype(np.int64)


def keys(seed: int, samples: list[bytes]) -> UInt64Array:
    """A key for each sample from its content."""
    return np.array(
        [
            int.from_bytes(
                hashlib.blake2b(content, digest_size=8, key=seed.to_bytes(8, "little")).digest(),
                "little",
            )
            for content in samples
        ],
        np.uint64,
    )


def random(key: UInt64Array, turn: int, elements: int) -> UInt64Array:
    """Uniform 32-bit numbers, uint64 [rows, elements]: SplitMix64 of key, turn and position."""
    with np.errstate(over="ignore"):
        start = _mix(key + np.uint64(turn + 1) * _GOLDEN)
        state = start[:, None] + np.arange(1, elements + 1, dtype=np.uint64) * _GOLDEN
        return _mix(state) >> np.uint64(32)


def _mix(x: UInt64Array) -> UInt64Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def anywhere(rows: Rows, turn: int) -> Points:
    """A uniform point of each row's box."""
    drawn = random(rows.key, turn, rows.point.shape[1])
    extent = (rows.upper.astype(np.int64) - rows.lower + 1).astype(np.uint64)
    return (rows.lower + ((drawn * extent) >> np.uint64(32)).astype(np.int64)).astype(np.int16)


def thrown(rows: Rows, turn: int) -> Points:
    """Each row's point with a share of its coordinates elsewhere: at the other end of the box.

    In every fourth turn they are anywhere instead.
    """
    elements = rows.point.shape[1]
    drawn = random(rows.key, 2 * turn, elements)
    share = max(_SHARES[turn % len(_SHARES)], 256 // elements)
    chosen = (drawn & np.uint64(255)) < np.uint64(share)
    if turn % 4 == 3:
        target = anywhere(rows, 2 * turn + 1)
    else:
        high = (rows.point - rows.lower) <= (rows.upper - rows.point)
        target = np.where(high, rows.upper, rows.lower)
    return np.where(chosen, target, rows.point)


def corners(search: Search, rows: Rows, count: int) -> Rows:
    """Rows for the ``count`` shortest routes of each sample that stays open, shortest first.

    From the sample the signed gradient leads to a corner for each rival; at all of these points all
    routes are measured, and each begins where it is shortest.
    """
    if not rows.owner.size:
        return rows
    trial = search.look(rows, rows.point)
    classes = trial.scores.shape[1]
    rest = np.flatnonzero(~trial.wrong)
    rows, trial = rows.take(rest), trial.take(rest)
    if not rest.size:
        return rows
    margins = search.routes.every(trial.scores, rows.label)[:, :classes]
    rivals = np.argsort(margins, axis=1, kind="stable")[:, : min(classes - 1, _RIVALS)]
    width = rivals.shape[1]
    index = np.repeat(np.arange(len(rest)), width)
    spread = rows.take(index)
    spread.code = rivals.reshape(-1)
    point = ends(spread, search.uphill(spread, trial.take(index)))
    reached = search.look(spread, point)
    measured = search.routes.every(reached.scores, spread.label).reshape(len(rest), width, -1)
    begin = measured.argmin(axis=1)
    measured = measured.min(axis=1)
    codes = np.argsort(measured, axis=1, kind="stable")[:, :count]
    index = np.repeat(np.arange(len(rest)), codes.shape[1])
    codes = codes.reshape(-1)
    result = rows.take(index)
    result.code = codes
    result.deficit = measured[index, codes]
    result.point = point[index * width + begin[index, codes]]
    return search.alive(result.take(search.routes.exists(result.deficit)))


def ends(rows: Rows, uphill: Int64Array) -> Points:
    """The end of the box that the gradient points to; the row's point where it is 0."""
    return np.where(uphill > 0, rows.upper, np.where(uphill < 0, rows.lower, rows.point))


def descend(search: Search, rows: Rows, point: Points, steps: int) -> Rows:
    """Signed gradient steps from ``point``, half the box wide at first; the rows still open."""
    if not rows.owner.size:
        return rows
    width = (rows.upper - rows.lower).max(axis=1, initial=0).astype(np.int64)[:, None]
    for step in range(steps + 1):
        trial = search.look(rows, point)
        rows.improve(point, trial.deficit)
        if trial.wrong.all() or step == steps:
            break
        size = np.maximum(1, width * (steps - step) // (2 * steps))
        moved = point + size * np.sign(search.uphill(rows, trial))
        point = np.clip(moved, rows.lower, rows.upper).astype(np.int16)
    return search.alive(rows)


def hop(search: Search, rows: Rows, turn: int) -> Rows:
    """One hop of one row of each sample; the rows still open.

    Mostly it is the row with the least deficit, now and then the second or the third.
    """
    rank = _RANKS[turn % len(_RANKS)]
    order = np.lexsort((rows.code, rows.deficit, rows.owner))
    _, start, count = np.unique(rows.owner[order], return_index=True, return_counts=True)
    chosen = order[start + np.minimum(rank, count - 1)]
    part = rows.take(chosen)
    point = thrown(part, turn)
    point, trial = _climb(search, part, point, search.look(part, point))
    part.improve(point, trial.deficit)
    rows.point[chosen], rows.deficit[chosen] = part.point, part.deficit
    return search.alive(rows)


def _climb(search: Search, rows: Rows, point: Points, trial: Trial) -> tuple[Points, Trial]:
    """The best of one candidate for each of ``_GAINS``, and its trial."""
    uphill = search.uphill(rows, trial)
    target = np.where(uphill > 0, rows.upper, np.where(uphill < 0, rows.lower, point))
    gain = np.abs(uphill) * np.abs(target - point)
    moving = np.count_nonzero(gain, axis=1)
    mean = gain.sum(axis=1) // np.maximum(moving, 1)
    options = [np.where(gain > (means * mean)[:, None], target, point) for means in _GAINS]
    every = np.concatenate(options)
    count = len(_GAINS)
    index = np.tile(np.arange(len(point)), count)
    trials = search.look(rows.take(index), every)
    best = trials.deficit.reshape(count, -1).argmin(axis=0)
    chosen = best * len(point) + np.arange(len(point))
    return every[chosen], trials.take(chosen)
