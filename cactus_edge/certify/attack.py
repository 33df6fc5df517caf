"""Search for integer counterexamples: projected gradient, then coordinates.

The network is evaluated in its own integers; the gradient passes straight through every rounding
and stops where a clamp is active. Floating point only steers the search: what is returned is an
integer input inside the box, and the caller verifies it with the reference executor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge import decision
from cactus_edge.errors import UsageError
from cactus_edge.execute import windows
from cactus_edge.graph import (
    Add,
    AveragePool2D,
    BoolArray,
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
    Reshape,
    Stored,
)
from cactus_edge.runtime import Session
from cactus_edge.semantics import AddRounding, Rounding

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """Strength of the search: gradient steps, restarts, rounds and width of coordinate search."""

    steps: int = 20
    restarts: int = 2
    rounds: int = 4
    coordinates: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: no step, or a negative number.
        """
        if self.steps < 1 or min(self.restarts, self.rounds, self.coordinates) < 0:
            raise UsageError("an attack needs at least one step, and no negative number")


def search(
    graph: Graph,
    stored: Int64Array,
    lower: Int64Array,
    upper: Int64Array,
    labels: Int64Array,
    settings: Settings,
) -> list[Int64Array | None]:
    """For each sample an integer input in its box that is surely misclassified, or None.

    Args:
        graph: resolved.
        stored: int64 [samples, ...], the samples.
        lower: int64, the boxes' lower ends; ``upper`` likewise.
        upper: see ``lower``.
        labels: int64 [samples].
        settings: strength of the search.
    """
    network = _Network(graph)
    random = np.random.default_rng(settings.seed)
    found: list[Int64Array | None] = [None] * len(labels)
    open_ = np.arange(len(labels))
    best = stored.copy()
    for restart in range(settings.restarts + 1):
        point = stored[open_].copy()
        if restart:
            point = random.integers(lower[open_], upper[open_] + 1)
        box = lower[open_], upper[open_]
        point, broken = _descend(network, point, box, labels[open_], settings.steps)
        best[open_] = point
        open_ = _collect(found, open_, point, broken)
        if not open_.size:
            return found
    for _ in range(settings.rounds):
        point, broken = _coordinates(
            network, best[open_], (lower[open_], upper[open_]), labels[open_], settings.coordinates
        )
        best[open_] = point
        open_ = _collect(found, open_, point, broken)
        if not open_.size:
            break
    return found


def _collect(
    found: list[Int64Array | None], open_: Int64Array, point: Int64Array, broken: BoolArray
) -> Int64Array:
    for position in np.flatnonzero(broken).tolist():
        found[int(open_[position])] = point[position].copy()
    return open_[~broken]


def _descend(
    network: _Network,
    point: Int64Array,
    box: tuple[Int64Array, Int64Array],
    labels: Int64Array,
    steps: int,
) -> tuple[Int64Array, BoolArray]:
    """Signed gradient steps of shrinking integer size; keeps the best point of each sample."""
    lower, upper = box
    best, best_score = point.copy(), np.full(len(labels), -np.inf, np.float32)
    broken = np.zeros(len(labels), bool)
    width = int((upper - lower).max(initial=0))
    for step in range(steps):
        values = network.forward(point)
        score, gradient, wrong = network.ascent(values, labels)
        better = (score > best_score) & ~broken
        better |= wrong & ~broken
        best[better], best_score[better] = point[better], score[better]
        broken |= wrong
        if broken.all():
            break
        size = max(1, round(width * (0.5 if step < 2 else 0.25 * (1 - step / steps))))
        point = np.clip(point + size * np.sign(gradient).astype(np.int64), lower, upper)
    return best, broken


def _coordinates(
    network: _Network,
    point: Int64Array,
    box: tuple[Int64Array, Int64Array],
    labels: Int64Array,
    width: int,
) -> tuple[Int64Array, BoolArray]:
    """Try both ends of the coordinates with the largest gradient, each alone; keep the best."""
    lower, upper = (b.reshape(len(labels), -1) for b in box)
    values = network.forward(point)
    score, gradient, broken = network.ascent(values, labels)
    best = point.reshape(len(labels), -1).copy()
    flat_gradient = gradient.reshape(len(labels), -1)
    inside = np.where(flat_gradient > 0, upper, lower) != best
    order = np.argsort(-np.abs(flat_gradient) * inside, axis=1)[:, :width]
    rows = np.arange(len(labels))
    for column in range(order.shape[1]):
        chosen = order[:, column]
        for ends in (lower, upper):
            trial = best.copy()
            trial[rows, chosen] = ends[rows, chosen]
            trial_values = network.forward(trial.reshape(point.shape))
            trial_score, _, wrong = network.score(trial_values, labels)
            accept = ~broken & (wrong | (trial_score > score))
            best[accept], score[accept] = trial[accept], trial_score[accept]
            broken |= wrong
    return best.reshape(point.shape), broken


class _Network:
    """Forward in integers, backward straight through, for one resolved graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        wanted = [op.output for op in graph.core]
        self.session = Session(graph, tensors=wanted)

    def forward(self, point: Int64Array) -> Mapping[int, Stored]:
        return {**self.session.run_tensors(point), self.graph.core_input: point}

    def score(
        self, values: Mapping[int, Stored], labels: Int64Array
    ) -> tuple[FloatArray, Int64Array, BoolArray]:
        """Lead of the strongest rival (its index, too) and whether the decision is surely wrong."""
        logits = values[self.graph.logits].reshape(len(labels), -1).astype(np.int64)
        rows = np.arange(len(labels))
        # A rival of lower index wins ties, so it counts as half a step stronger.
        lead = (
            logits
            - logits[rows, labels][:, None]
            + 0.5 * (np.arange(logits.shape[1]) < labels[:, None])
        )
        lead[rows, labels] = -np.inf
        rival = lead.argmax(axis=1)
        wrong = decision.surely_wrong(self.graph, logits, labels)
        return lead[rows, rival].astype(np.float32), rival, wrong

    def ascent(
        self, values: Mapping[int, Stored], labels: Int64Array
    ) -> tuple[FloatArray, FloatArray, BoolArray]:
        """Score, its gradient with respect to the stored input, and the verdict on the point."""
        score, rival, wrong = self.score(values, labels)
        rows = np.arange(len(labels))
        seed = np.zeros((len(labels), self.graph.tensors[self.graph.logits].size), np.float32)
        seed[rows, rival], seed[rows, labels] = 1, -1
        shape = self.graph.tensors[self.graph.logits].shape[1:]
        gradients: dict[int, FloatArray] = {self.graph.logits: seed.reshape(-1, *shape)}
        for op in reversed(self.graph.core):
            outgoing = gradients.pop(op.output, None)
            if outgoing is None:
                continue
            if op.output != self.graph.logits:
                outgoing = outgoing * self._passes(op, values[op.output])
            for index, incoming in zip(
                op.inputs, backward(self.graph, op, values, outgoing), strict=True
            ):
                gradients[index] = gradients[index] + incoming if index in gradients else incoming
        return score, gradients[self.graph.core_input], wrong

    def _passes(self, op: Operator, output: Stored) -> FloatArray:
        if isinstance(op, (Pad, Reshape)):
            return np.ones((), np.float32)
        lower, upper = self.graph.output_range(op)
        return ((output > lower) & (output < upper)).astype(np.float32)


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
