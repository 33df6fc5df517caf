"""Samples with the boxes around them, and the lines that a certificate has about them.

A sample's set is the union of its boxes: one box for a ball, one for each placement of a patch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from cactus_edge.certificate import Bounds, Sample
from cactus_edge.graph import Int64Array
from cactus_edge.proofs import Proof

Counterexample = tuple[Int64Array, str, str, int]
"""Stored input, how it was found, profile and number of the model that misclassify it."""


class Boxes(NamedTuple):
    """A row for each box.

    Attributes:
        stored: integers [boxes, *input shape], the samples around which they lie.
        lower: integers, like ``stored``; ``upper`` likewise.
        upper: see ``lower``.
        labels: integers [boxes], below the number of logits.
        owner: int64 [boxes], ascending from 0 without gaps: the number of the sample.
        top: the label has to be among that many largest logits.
    """

    stored: Int64Array
    lower: Int64Array
    upper: Int64Array
    labels: Int64Array
    owner: Int64Array
    top: int = 1

    @property
    def firsts(self) -> Int64Array:
        """Int64 [samples]: the first box of each sample."""
        return np.flatnonzero(np.diff(self.owner, prepend=-1))

    def parts(self) -> list[slice]:
        """The boxes of each sample."""
        ends = [*self.firsts.tolist(), len(self.owner)]
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def of(self, part: slice) -> Boxes:
        """The boxes of one sample by itself."""
        stored, lower, upper, labels, _, top = self
        owner = np.zeros(part.stop - part.start, np.int64)
        return Boxes(stored[part], lower[part], upper[part], labels[part], owner, top)


def line_about(
    head: tuple[int, int, int],
    proof: tuple[bool, str],
    witness: tuple[Bounds, ...],
    stored: Int64Array,
    broken: Counterexample | None,
    proofs: tuple[Proof, ...] = (),
) -> Sample:
    """A line of a certificate.

    Args:
        head: index, label, prediction.
        proof: whether the sample is certified, and by which method.
        witness: bounds of the logits.
        stored: the sample, of which a counterexample is written as a difference.
        broken: what refutes it.
        proofs: what certifies it beyond bounds and margins.
    """
    certified, method = proof
    if certified and broken is not None:
        raise AssertionError(f"sample {head[0]} is both certified and refuted: a defect")
    if certified:
        return Sample(*head, "certified", method, witness, proofs=proofs)
    if broken is not None:
        point, method, profile, model = broken
        moved = method != "sample"
        return Sample(
            *head,
            "refuted",
            method,
            witness,
            counterexample=difference(point, stored) if moved else "",
            profile=profile,
            model=model,
        )
    return Sample(*head, "unknown", method, witness)


def difference(point: Int64Array, stored: Int64Array) -> str:
    """A counterexample as a certificate writes it."""
    return (point - stored).astype("<i2").tobytes().hex()


def every_point(lower: Int64Array, upper: Int64Array) -> Int64Array:
    """All integer points of a box that has few of them, int64 [points, elements].

    Args:
        lower: int64 [elements]; ``upper`` likewise, and nowhere below it.
        upper: see ``lower``.
    """
    free = np.flatnonzero(upper > lower)  # most elements of a large input may be fixed
    numbers = np.arange(math.prod((upper - lower + 1)[free].tolist()), dtype=np.int64)
    points = np.tile(lower.astype(np.int64), (numbers.size, 1))
    for element in free.tolist():
        extent = int(upper[element] - lower[element]) + 1
        points[:, element] += numbers % extent
        numbers //= extent
    return points
