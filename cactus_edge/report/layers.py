"""Where bounds grow: interval widths layer by layer, and an estimate of the margin that each costs.

The margin of a sample is how far the label's lower bound lies above the greatest upper bound of a
rival, in stored logit levels; from 0 on it is certified. Intervals lose margin because they forget
how activations hang together. To say in which layer, the intervals behind each layer are replaced
by the least and greatest values that a number of points of the box reach there, and propagated on:
what the margin gains from one layer to the next is what that layer's intervals cost. Widths are
exact. Costs are an estimate, since points do not reach all that can be reached; together with that
of comparing logits they are the margin over the points less that of the intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from cactus_edge import decision, inputs
from cactus_edge.certify.intervals import Box, IntervalSession
from cactus_edge.errors import InvalidGraphError
from cactus_edge.graph import Graph, Int64Array, Operator, Reshape
from cactus_edge.report.explorer import Explored

SAMPLES = 32
POINTS = 64
_SEED = 0

Progress = Callable[[int, int], None]


class LayerWidths(msgspec.Struct, frozen=True):
    """A layer, or layers that several paths lead through.

    Attributes:
        names: of the operators.
        kinds: of the operators.
        elements: of the output.
        mean: width of an interval, in stored levels, over elements and samples.
        largest: width.
        reached: mean of the widths that the points reach.
        cost: stored logit levels of margin that are lost here, mean over the samples; estimated.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    elements: int
    mean: float
    largest: int
    reached: float
    cost: float


class Widths(msgspec.Struct, frozen=True):
    """All means over samples, in stored logit levels.

    Attributes:
        samples: that were measured.
        points: in the box of each.
        margin: of the intervals.
        reached: least over the points.
        comparing: lost because a bound of one logit is compared with a bound of another, which
            elided margins avoid.
        layers: see ``LayerWidths``.
    """

    samples: int
    points: int
    margin: float
    reached: float
    comparing: float
    layers: tuple[LayerWidths, ...]


@dataclass(frozen=True, eq=False)
class _Cut:
    """A tensor through which everything behind depends on the input, and what leads there."""

    tensor: int
    operators: tuple[Operator, ...]
    rest: IntervalSession | None


def widths(explored: Explored, *, progress: Progress | None = None) -> Widths:
    """Measure on the first samples that are shown, under the first group of profiles.

    Args:
        explored: a claim without a patch.
        progress: called with (layers done, in all).
    """
    certifier = explored.certifier
    graph = certifier.groups[0].graph
    images, labels = explored.images[:SAMPLES], explored.labels[:SAMPLES]
    lower, upper = inputs.box(certifier.graph, images, explored.perturbation)
    cuts = _cuts(graph)
    tensors = [cut.tensor for cut in cuts]
    session = IntervalSession(graph, tensors=tensors)
    bounds = session.run(lower, upper)
    points = _points(lower, upper)
    values = session.run(points, points)  # the bounds of a point are its activations
    gaps = np.stack([_gaps(graph, label) for label in labels.tolist()])
    margins = [_margins(bounds[graph.logits], labels, gaps)]
    rows: list[LayerWidths] = []
    for number, cut in enumerate(cuts):
        hull = _hull(values[cut.tensor][0], len(labels))
        ends = hull
        if cut.rest is not None:
            shape = graph.tensors[cut.tensor].shape[1:]
            least, most = (end.reshape(len(labels), *shape) for end in hull)
            ends = cut.rest.run(least, most)[graph.logits]
        margins.append(_margins(ends, labels, gaps))
        low, high = bounds[cut.tensor]
        rows.append(
            LayerWidths(
                names=tuple(op.name for op in cut.operators),
                kinds=tuple(op.kind for op in cut.operators),
                elements=low.shape[1],
                mean=float((high - low).mean()),
                largest=int((high - low).max()),
                reached=float((hull[1] - hull[0]).mean()),
                cost=float((margins[-1] - margins[-2]).mean()),
            )
        )
        if progress:
            progress(number + 1, len(cuts))
    logits = values[graph.logits][0]
    owner = np.repeat(np.arange(len(labels)), POINTS)
    leads = _margins((logits, logits), labels[owner], gaps[owner])
    reached = leads.reshape(len(labels), -1).min(axis=1)
    return Widths(
        samples=len(labels),
        points=POINTS,
        margin=float(margins[0].mean()),
        reached=float(reached.mean()),
        comparing=float((reached - margins[-1]).mean()),
        layers=tuple(rows),
    )


def _gaps(graph: Graph, label: int) -> Int64Array:
    return decision.gaps(graph, label, graph.tensors[graph.logits].size)


def _margins(bounds: Box, labels: Int64Array, gaps: Int64Array) -> Int64Array:
    """Int64 [samples]: the label's least lead over a rival, beyond the gap."""
    low, high = bounds
    rows = np.arange(len(labels))
    leads = low[rows, labels][:, None] - high - gaps
    leads[rows, labels] = np.iinfo(np.int64).max
    return leads.min(axis=1)


def _points(lower: Int64Array, upper: Int64Array) -> Int64Array:
    """Int64 [samples * POINTS, ...]: corners of the boxes, the same choice at every call."""
    random = np.random.default_rng(_SEED)
    chosen = random.integers(0, 2, (len(lower), POINTS, *lower.shape[1:]), dtype=np.int64)
    points = np.where(chosen == 1, upper[:, None], lower[:, None])
    return points.reshape(-1, *lower.shape[1:])


def _hull(values: Int64Array, samples: int) -> Box:
    """Least and greatest values [samples, elements] over the points of each sample."""
    grouped = values.reshape(samples, -1, values.shape[1])
    return grouped.min(axis=1), grouped.max(axis=1)


def _cuts(graph: Graph) -> list[_Cut]:
    """The places where all that follows depends on one tensor, the logits last."""
    cuts: list[_Cut] = []
    pending: list[Operator] = []
    for position, op in enumerate(graph.core):
        if isinstance(op, Reshape):  # moves nothing, so it belongs to what follows
            continue
        pending.append(op)
        rest = graph.core[position + 1 :]
        if all(isinstance(later, Reshape) for later in rest):
            cuts.append(_Cut(graph.logits, tuple(pending), None))
            break
        session = _rest(graph, op.output, rest)
        if session is not None:
            cuts.append(_Cut(op.output, tuple(pending), session))
            pending = []
    return cuts


def _rest(graph: Graph, tensor: int, operators: Sequence[Operator]) -> IntervalSession | None:
    """The operators behind a tensor; None where they read another one too."""
    inside = {tensor, *(op.output for op in operators)}
    if any(source not in inside for op in operators for source in op.inputs):
        return None
    if graph.tensors[tensor].dtype.is_wide:
        return None
    try:
        return IntervalSession(Graph(graph.tensors, tuple(operators), tensor, graph.logits))
    except InvalidGraphError:  # without its producer's clamp a tensor may seem to overflow
        return None
