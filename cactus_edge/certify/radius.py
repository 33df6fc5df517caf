"""The largest certified radius of each sample, in stored integer levels, and the smallest refuted.

Boxes of growing radius contain one another, so what is certified at a radius holds at every smaller
one, and a counterexample refutes every radius from its own distance on. Whether a *method* succeeds
need not be monotone, and nothing here relies on it: what is reported is the largest radius that was
certified, and the distance of the nearest counterexample that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cactus_edge import inputs
from cactus_edge.certificate import Sample
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import Certifier, chunks
from cactus_edge.errors import DataError, UsageError
from cactus_edge.graph import Int64Array

LARGEST = 255
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Radius:
    """What is known about one sample.

    ``certified``: the largest radius that was certified, -1 where not even 0 was. ``refuted``: the
    least distance of a counterexample that was found, None for none; ``counterexample`` is that
    stored input [*input shape], misclassified under ``profile``. Between the two nothing is known.
    """

    index: int
    label: int
    prediction: int
    certified: int
    refuted: int | None = None
    counterexample: Int64Array | None = None
    profile: str = ""


def radii(
    certifier: Certifier,
    images: npt.NDArray[np.generic],
    labels: Int64Array,
    *,
    largest: int = 64,
    first: int = 0,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> list[Radius]:
    """Search the radii of many samples together, by bisection.

    Args:
        certifier: of the model; its profiles are those that a radius holds for.
        images: samples as for ``inputs.stored``.
        labels: int64 [samples].
        largest: where to stop; a sample certified there is reported with that radius.
        first: index of the first sample, for the result.
        settings: strength of the attack; None for no ``refuted``, but for what is wrong at once.
        progress: called with (samples done, samples in all).

    Raises:
        DataError: the samples do not fit the model.
        UsageError: ``largest`` is outside 0..255.
    """
    if not 0 <= largest <= LARGEST:
        raise UsageError(f"the largest radius {largest} is outside 0..{LARGEST} levels")
    if len(images) != len(labels):
        raise DataError(f"{len(images)} samples and {len(labels)} labels")
    found: list[Radius] = []
    for part in chunks(len(labels)):
        stored = inputs.stored(certifier.graph, images[part])
        search = _Bisection(certifier, first + part.start, stored, labels[part], largest)
        search.certify()
        if settings is not None:
            search.refute(settings)
        found += search.result()
        if progress:
            progress(part.stop, len(labels))
    return found


def lines(
    certifier: Certifier,
    first: int,
    stored: Int64Array,
    labels: Int64Array,
    largest: int,
    settings: Settings | None,
) -> list[Sample]:
    """What a certificate says about samples and their radii.

    ``certified``: at ``largest``; ``refuted``: a counterexample is that near. ``radius`` is the
    largest one that was certified; bounds and proofs are those at that radius.

    Args:
        certifier: of the models.
        first: index of the first sample.
        stored: integers [samples, *input shape].
        labels: int64 [samples].
        largest: where to stop.
        settings: strength of the attack; None for no attack.
    """
    search = _Bisection(certifier, first, stored, labels, largest)
    search.certify()
    if settings is not None:
        search.refute(settings)
    return search.lines()


class _Bisection:
    """``certified`` and ``refuted`` int64 [samples]; ``refuted`` is ``largest + 1`` for none.

    ``best``, ``broken``, ``errors``: by sample, the verdict at the largest certified radius, that
    of the nearest counterexample, and one that could not be had.
    """

    def __init__(
        self,
        certifier: Certifier,
        first: int,
        stored: Int64Array,
        labels: Int64Array,
        largest: int,
    ) -> None:
        self.certifier, self.first, self.largest = certifier, first, largest
        self.stored, self.labels = stored, labels
        self.certified = np.full(len(labels), -1, np.int64)
        self.refuted = np.full(len(labels), largest + 1, np.int64)
        self.best: dict[int, Sample] = {}
        self.broken: dict[int, Sample] = {}
        self.errors: dict[int, Sample] = {}
        self.predictions = certifier.predictions(stored)

    def verdicts(
        self, chosen: Int64Array, levels: Int64Array, settings: Settings | None
    ) -> list[Sample]:
        """Of the chosen samples, each within its own number of levels; keeps what it learns."""
        stored, labels = self.stored[chosen], self.labels[chosen]
        broadcast = levels.reshape(-1, *(1,) * (stored.ndim - 1))
        lower, upper = inputs.around(self.certifier.graph, stored, broadcast)
        samples = self.certifier.verdicts(0, stored, lower, upper, labels, settings)
        for i, level, sample in zip(chosen.tolist(), levels.tolist(), samples, strict=True):
            if sample.verdict == "error":
                self.errors[i] = sample
            if sample.verdict == "certified" and level > self.certified[i]:
                self.certified[i], self.best[i] = level, sample
            if sample.verdict == "refuted":
                distance = int(np.abs(_difference(sample)).max(initial=0))
                if distance < self.refuted[i]:
                    self.refuted[i], self.broken[i] = distance, sample
        return samples

    def certify(self) -> None:
        """Between what was certified last and what failed last."""
        failed = np.full(len(self.labels), self.largest + 1, np.int64)
        # Intervals close most samples early, so the first probe is at 0, not in the middle.
        levels = np.zeros(len(self.labels), np.int64)
        while (chosen := np.flatnonzero(self.certified + 1 < failed)).size:
            samples = self.verdicts(chosen, levels[chosen], None)
            proved = np.array([sample.verdict == "certified" for sample in samples])
            failed[chosen[~proved]] = levels[chosen[~proved]]
            failed = np.minimum(failed, np.maximum(self.refuted, self.certified + 1))
            levels = (self.certified + failed) >> 1

    def refute(self, settings: Settings) -> None:
        """Between what is certified and the nearest counterexample, for as long as attacks succeed.

        An attack that fails at a radius is taken as a hint that it fails below, no more.
        """
        survived = self.certified.copy()
        levels = np.full(len(self.labels), self.largest, np.int64)
        while (chosen := np.flatnonzero(survived + 1 < self.refuted)).size:
            before = self.refuted[chosen].copy()
            self.verdicts(chosen, levels[chosen], settings)
            failed = chosen[self.refuted[chosen] == before]
            survived[failed] = np.maximum(survived[failed], levels[failed])
            survived = np.maximum(survived, self.certified)
            levels = (survived + self.refuted) >> 1

    def result(self) -> list[Radius]:
        """One for each sample."""
        found: list[Radius] = []
        for i, label in enumerate(self.labels.tolist()):
            self._check(i)
            refuted, point, profile = None, None, ""
            if i in self.broken:
                difference = _difference(self.broken[i])
                refuted, profile = int(self.refuted[i]), self.broken[i].profile
                point = self.stored[i].copy()
                point += difference.reshape(point.shape) if difference.size else 0
            head = self.first + i, label, int(self.predictions[i]), int(self.certified[i])
            found.append(Radius(*head, refuted, point, profile))
        return found

    def lines(self) -> list[Sample]:
        """One for each sample, see the function of this name."""
        return [self._line(i) for i in range(len(self.labels))]

    def _line(self, i: int) -> Sample:
        head = self.first + i, int(self.labels[i])
        if i in self.errors:
            return Sample(*head, -1, "error", "none", message=self.errors[i].message)
        self._check(i)
        best, broken = self.best.get(i), self.broken.get(i)
        certified = int(self.certified[i])
        whole = best is not None and certified == self.largest
        return Sample(
            *head,
            int(self.predictions[i]),
            "refuted" if broken else "certified" if whole else "unknown",
            broken.method if broken else best.method if best and whole else "elided-margin",
            best.bounds if best else (),
            counterexample=broken.counterexample if broken else "",
            profile=broken.profile if broken else "",
            model=broken.model if broken else 0,
            radius=certified if best else None,
            proofs=best.proofs if best else (),
        )

    def _check(self, i: int) -> None:
        """Raise AssertionError where a counterexample lies inside what is certified, a defect."""
        if self.refuted[i] <= self.certified[i]:
            raise AssertionError(f"sample {self.first + i} is certified and refuted: a defect")


def _difference(sample: Sample) -> Int64Array:
    return np.frombuffer(bytes.fromhex(sample.counterexample), "<i2").astype(np.int64)
