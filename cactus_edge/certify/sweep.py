"""Certified and attack accuracy over a list of radii, and the curve they make.

Every radius is certified on its own; nothing is carried from one to the next, so that each figure
is what ``certify`` reports for that radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from cactus_edge import files, inputs
from cactus_edge.certify.attack import Settings
from cactus_edge.certify.engine import Certifier, chunks
from cactus_edge.errors import DataError, MissingExtraError, UsageError, counted
from cactus_edge.graph import Int64Array
from cactus_edge.inputs import Perturbation

Progress = Callable[[int, int], None]


class Point(msgspec.Struct, frozen=True):
    """Counts at one radius; ``refuted`` counts what is wrong at once, and what attacks found."""

    kind: str
    radius: str
    certified: int
    refuted: int
    unknown: int
    errors: int


class Curve(msgspec.Struct, frozen=True):
    """``correct``: samples that are classified as labelled; ``attacked``: whether attacks ran.

    ``model_sha256`` and ``data`` (name and split) say what it is about, where a file was asked for.
    """

    samples: int
    correct: int
    attacked: bool
    points: tuple[Point, ...]
    model_sha256: str = ""
    data: str = ""


def sweep(
    certifier: Certifier,
    images: npt.NDArray[np.generic],
    labels: Int64Array,
    perturbations: Sequence[Perturbation],
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Curve:
    """Verdicts of all samples at each radius.

    Args:
        certifier: of the model.
        images: samples as for ``inputs.stored``.
        labels: int64 [samples].
        perturbations: radii, without patches, in any order.
        settings: strength of the attack on what stays open; None for no attack.
        progress: called with (samples done, samples in all), over all radii.

    Raises:
        DataError: the samples do not fit the model.
        UsageError: no radius.
    """
    if not perturbations:
        raise UsageError("a sweep needs at least one radius")
    if not len(labels) == len(images) > 0:
        raise DataError(f"{len(images)} samples and {len(labels)} labels")
    total = len(labels) * len(perturbations)
    correct = 0
    points: list[Point] = []
    for number, perturbation in enumerate(perturbations):
        verdicts: list[str] = []
        correct = 0
        for part in chunks(len(labels)):
            stored = inputs.stored(certifier.graph, images[part])
            lower, upper = inputs.box(certifier.graph, images[part], perturbation)
            samples = certifier.verdicts(part.start, stored, lower, upper, labels[part], settings)
            verdicts += [sample.verdict for sample in samples]
            correct += sum(sample.label == sample.prediction for sample in samples)
            if progress:
                progress(number * len(labels) + part.stop, total)
        radius = "one for each element" if perturbation.radii else str(perturbation.radius)
        counts = [verdicts.count(v) for v in ("certified", "refuted", "unknown", "error")]
        points.append(Point(perturbation.kind, radius, *counts))
    return Curve(len(labels), correct, settings is not None, tuple(points))


def draw(curve: Curve, path: Path, title: str, *, force: bool = False) -> None:
    """The curve as an SVG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file exists already, or cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "verify", "drawing a curve") from None
    files.refuse_existing(path, force)
    kinds = {point.kind for point in curve.points}
    if len(kinds) != 1:
        raise UsageError("a curve has one axis: give either --eps or --levels")
    points = sorted(curve.points, key=lambda point: inputs.rational(point.radius))
    radius = [float(inputs.rational(point.radius)) for point in points]  # float: a drawing
    share = 100 / curve.samples  # float: a drawing
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(radius, [share * point.certified for point in points], marker="o", label="certified")
    if curve.attacked:
        survived = [share * (point.certified + point.unknown) for point in points]
        axes.plot(radius, survived, marker="s", label="not refuted")
    axes.axhline(share * curve.correct, linestyle=":", color="gray", label="standard")
    axes.set_xlabel("radius on real inputs" if kinds == {"epsilon"} else "radius in levels")
    axes.set_ylabel(f"% of {counted(curve.samples, 'sample')}")
    axes.set_ylim(0, 101)
    axes.set_title(title)
    axes.legend()
    # No date and fixed identifiers: the same curve is the same file.
    with (
        matplotlib.rc_context({"svg.hashsalt": "cactus_edge"}),
        files.writing(path, force=force) as stream,
    ):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
