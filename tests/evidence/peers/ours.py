"""Our methods, each as a function of one box of stored integers; a new one is a line here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cactus_edge import decision
from cactus_edge.certificate import Method, Sample
from cactus_edge.certify import Certifier, Settings
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.linear.search import Budget
from cactus_edge.execute import execute
from cactus_edge.graph import Graph, Int64Array

SECONDS = 10
"""Budget of the complete search for one image."""
Box = tuple[Int64Array, Int64Array, Int64Array, int]
"""Stored sample, lower, upper [...], label."""
Prover = Callable[[Box], tuple[bool, Sample | None]]
"""Whether robustness was proved, and the whole answer where there is more."""


def interval(graph: Graph) -> Prover:
    """Bounds of the stored logits alone."""
    certifier = Certifier(graph)

    def prove(box: Box) -> tuple[bool, Sample | None]:
        _, lower, upper, label = box
        bounds = certifier.bounds(lower[None], upper[None])
        gaps = decision.gaps(graph, label, bounds[0][0].shape[-1])
        rivals = np.arange(len(gaps)) != label
        leads = [(low[0, label] >= high[0] + gaps)[rivals].all() for low, high in bounds]
        return all(leads), None

    return prove


def _up_to(method: Method) -> Callable[[Graph], Prover]:
    def make(graph: Graph) -> Prover:
        certifier = Certifier(graph, None, Effort(method, Budget(seconds=SECONDS)))

        def prove(box: Box) -> tuple[bool, Sample | None]:
            stored, lower, upper, label = box
            one = (stored[None], lower[None], upper[None], np.array([label]))
            sample = certifier.verdicts(0, *one)[0]
            return sample.verdict == "certified", sample

        return prove

    return make


OURS: dict[str, Callable[[Graph], Prover]] = {
    "interval": interval,
    "margin": _up_to("interval"),
    "linear": _up_to("linear"),
    "complete": _up_to("complete"),
}
"""Each tries the ones before it first."""


def counterexample(graph: Graph, box: Box, sample: Sample | None) -> Int64Array | None:
    """The stored input of a refutation, once more checked by the reference executor."""
    if sample is None or sample.verdict != "refuted":
        return None
    stored, lower, upper, label = box
    change = np.frombuffer(bytes.fromhex(sample.counterexample), "<i2").astype(np.int64)
    point = stored + change.reshape(stored.shape) if change.size else stored
    assert ((lower <= point) & (point <= upper)).all()
    assert decision.predict(execute(graph, point[None], sample.profile))[0] != label
    return point


def attacked(graph: Graph, boxes: dict[int, Box], settings: Settings) -> dict[int, Int64Array]:
    """Counterexamples that the attack finds, by sample."""
    if not boxes:
        return {}
    stored, lower, upper = (np.stack([box[k] for box in boxes.values()]) for k in range(3))
    labels = np.array([label for *_, label in boxes.values()])
    samples = Certifier(graph).verdicts(0, stored, lower, upper, labels, settings)
    points = {
        i: counterexample(graph, boxes[i], sample) for i, sample in zip(boxes, samples, strict=True)
    }
    return {i: point for i, point in points.items() if point is not None}
