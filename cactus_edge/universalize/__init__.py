"""A finished model in a form that every rounding profile computes alike.

Each layer with weights keeps its real weights as well as its width allows: they are quantized anew
for a scale nearby at which all profiles step at the same accumulators (see ``snap``), and so is the
bias. Channels on which all agree already stay as they are. ``rewrite`` says what becomes of layers
that go below their zero point and of MEAN, ``sums`` of ADD. Where profiles still disagree (tables,
MUL, factors near 1) the operator is named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cactus_edge import decision, files, flatbuffer, inputs, universal
from cactus_edge.constraints import validate
from cactus_edge.datasets import Dataset
from cactus_edge.graph import Graph
from cactus_edge.runtime import Session
from cactus_edge.universalize.rewrite import Change, Rewriter

__all__ = ["MovedLayer", "Universalized", "make_universal", "universalize"]

Progress = Callable[[int, int], None]
_BATCH = 500
_SAMPLES_ALONE = 1000


class MovedLayer(msgspec.Struct, frozen=True):
    """An operator that is computed in another way, or on which profiles disagree.

    Attributes:
        name: of the operator.
        kind: of the operator.
        channels: that it has; what has no weights has one.
        moved: channels whose scale was moved, or 1 of 1 where they share one.
        median_change: of the moved scales, relative.
        largest_change: of the moved scales, relative.
        weights_changed: share of the layer's stored weights that are other integers now.
        added: operators that were put around it: copies, another scale for an operand.
        remaining: channels on which profiles still disagree.
        samples_alone: on which the model was run with nothing else changed; 0 without data.
        lost_alone: of these, how many fewer are classified correctly. Negative: more are.
        decisions_changed_alone: of these, how many are decided differently.
    """

    name: str
    kind: str
    channels: int
    moved: int
    median_change: float
    largest_change: float
    weights_changed: float
    remaining: int
    added: int = 0
    samples_alone: int = 0
    lost_alone: int = 0
    decisions_changed_alone: int = 0


class Universalized(msgspec.Struct, frozen=True):
    """What was moved, and what it cost.

    Attributes:
        universal: whether all profiles agree now.
        layers: what was changed, and where profiles still disagree.
        samples: of the comparison; 0 without data.
        correct_before: samples that the model classified correctly, under the default profile.
        correct_after: the same of the new model.
        decisions_changed: samples on which the two models decide differently.
        bytes: of the new file.
        sha256: of the new file.
    """

    universal: bool
    layers: tuple[MovedLayer, ...]
    samples: int = 0
    correct_before: int = 0
    correct_after: int = 0
    decisions_changed: int = 0
    bytes: int = 0
    sha256: str = ""


def universalize(
    graph: Graph, progress: Progress | None = None, *, even_pools: bool = False
) -> tuple[Graph, tuple[MovedLayer, ...]]:
    """The graph in universal form, and a report of every operator that is another one now.

    Args:
        graph: as read from a file.
        even_pools: for ONNX Runtime, which no profile describes, see ``Rewriter``.
        progress: called with (operators done, operators in all).

    Raises:
        InvalidGraphError: the graph breaks a constraint.
    """
    result, changes = _rewritten(graph, progress, even_pools)
    return result, _layers(result, changes)


def _rewritten(
    graph: Graph, progress: Progress | None, even_pools: bool
) -> tuple[Graph, list[Change]]:
    rewriter = Rewriter(graph, even_pools=even_pools)
    result = rewriter.run(progress)
    validate(result)
    return result, rewriter.changes


def _layers(result: Graph, changes: list[Change]) -> tuple[MovedLayer, ...]:
    """One entry for each change, and for each operator on which profiles still disagree."""
    left = {entry.name: entry for entry in universal.agreement(result) if entry.disagreeing}
    layers: list[MovedLayer] = []
    for change in changes:
        names = (change.name, *change.added)
        shifts = change.scale_change[change.scale_change != 0]
        layers.append(
            MovedLayer(
                name=change.name,
                kind=change.kind,
                channels=change.channels,
                moved=int(shifts.size) if change.scale_bits is not None else 1,
                median_change=float(np.median(shifts)) if shifts.size else 0.0,
                largest_change=float(shifts.max(initial=0.0)),
                weights_changed=change.weights_changed,
                remaining=sum(len(left.pop(n).disagreeing) for n in names if n in left),
                added=len(change.added),
            )
        )
    for entry in left.values():
        kind = next(op.kind for op in result.core if op.name == entry.name)
        count = len(entry.disagreeing)
        layers.append(MovedLayer(entry.name, kind, entry.channels, 0, 0.0, 0.0, 0.0, count))
    return tuple(layers)


def make_universal(
    model: Path,
    output: Path,
    data: Dataset | None = None,
    *,
    even_pools: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Universalized:
    """Write a ``.tflite`` with moved scales, and compare both on samples.

    The file is written last: there is none where the comparison fails or is stopped.

    Raises:
        DataError: the samples do not fit the model.
        OutputError: ``output`` exists, or cannot be written.
        UnsupportedModelError: the model cannot be read.
    """
    files.refuse_existing(output, force)
    graph, _ = flatbuffer.load(model)
    moved, changes = _rewritten(graph, progress, even_pools)
    layers = _layers(moved, changes)
    content = flatbuffer.write_tflite(moved)
    report = Universalized(
        universal=universal.is_universal(flatbuffer.read_tflite(content)),
        layers=layers,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    if data is not None:
        before, after = (_decisions(g, data) for g in (graph, moved))
        report = msgspec.structs.replace(
            report,
            layers=_costs(graph, layers, changes, data, before, even_pools, progress),
            samples=len(data.labels),
            correct_before=int((before == data.labels).sum()),
            correct_after=int((after == data.labels).sum()),
            decisions_changed=int((before != after).sum()),
        )
    files.write(output, content, force=force)
    return report


def _costs(
    graph: Graph,
    layers: tuple[MovedLayer, ...],
    changes: list[Change],
    data: Dataset,
    before: npt.NDArray[np.int64],
    even_pools: bool,
    progress: Progress | None,
) -> tuple[MovedLayer, ...]:
    """``layers`` with what each change costs by itself, on the first samples."""
    count = min(len(data.labels), _SAMPLES_ALONE)
    labels, before = data.labels[:count], before[:count]
    known = {change.name: change.scale_bits for change in changes if change.scale_bits is not None}
    changed = {change.name for change in changes}
    priced: list[MovedLayer] = []
    for number, layer in enumerate(layers):
        if progress is not None:
            progress(number, len(layers))
        if layer.name not in changed:
            priced.append(layer)
            continue
        chosen = layer.name.__eq__
        alone = Rewriter(graph, chosen, known, even_pools=even_pools).run()
        after = _decisions(alone, data, count)
        priced.append(
            msgspec.structs.replace(
                layer,
                samples_alone=count,
                lost_alone=int((before == labels).sum()) - int((after == labels).sum()),
                decisions_changed_alone=int((before != after).sum()),
            )
        )
    return tuple(priced)


def _decisions(graph: Graph, data: Dataset, count: int | None = None) -> npt.NDArray[np.int64]:
    session = Session(graph)
    found: list[npt.NDArray[np.int64]] = []
    count = len(data.labels) if count is None else count
    for start in range(0, count, _BATCH):
        stored = inputs.stored(graph, data.images[start : min(start + _BATCH, count)])
        logits = session.run(stored).reshape(len(stored), -1).astype(np.int64)
        found.append(decision.predict(logits))
    return np.concatenate(found)
