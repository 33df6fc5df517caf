"""The front as SVG: certified accuracy over size, one point for each candidate."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cactus_edge import files
from cactus_edge.errors import MissingExtraError, counted
from cactus_edge.search.budget import KIB
from cactus_edge.search.front import front
from cactus_edge.search.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

Place = tuple[float, float]

_SIZE = (8, 5)
_LABEL = (0.2, 0.035)
"""Width and height of a label, as fractions of the axes."""


def require() -> None:
    """Raise MissingExtraError when matplotlib is not installed; call it before work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "verify", "drawing the front")


def draw(report: Report, path: Path) -> None:
    """Round points are on the front (of three objectives), the line joins that of the two axes.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    host = report.device.name == "host"
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in report.rows if row.cost is not None]
    if rows:
        cost = "us for an image" if host else "instructions for an image"
        figure.colorbar(_points(axes, rows), label=cost)
        _labels(axes, rows, report)
        axes.legend(fontsize="x-small", loc="lower right")
    axes.set_xlabel("KiB of the file" if host else "KiB of flash")
    axes.set_ylabel(f"% certified of {counted(report.data.samples, f'{report.data.split} sample')}")
    axes.set_title(f"{report.data.name}, radius {report.epsilon}, {report.device.processor}")
    axes.grid(alpha=0.3)
    # No date and fixed identifiers: the same report is the same file.
    with (
        matplotlib.rc_context({"svg.hashsalt": "cactus_edge"}),
        files.writing(path, force=True) as stream,
    ):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})


def _place(row: Row) -> Place:
    return row.size / KIB, 100 * row.certified_accuracy


def _points(axes: Axes, rows: Sequence[Row]) -> PathCollection:
    """All points, coloured by cost, and the line; what the colour bar is about."""
    places = [_place(row) for row in rows]
    stairs = sorted({places[i] for i in front([(size, -share) for size, share in places])})
    axes.step(*zip(*stairs, strict=True), where="post", color="gray", linewidth=1, zorder=1)
    costs = [row.cost for row in rows if row.cost is not None]

    def scatter(kept: bool, marker: str, text: str) -> PathCollection:
        chosen = [index for index, row in enumerate(rows) if row.front is kept]
        return axes.scatter(
            [places[index][0] for index in chosen],
            [places[index][1] for index in chosen],
            c=[costs[index] for index in chosen],
            marker=marker,
            vmin=min(costs),
            vmax=max(costs),
            label=text,
            zorder=2,
        )

    axes.margins(x=0.25, y=0.1)
    scatter(False, "x", "dominated")
    return scatter(True, "o", "on the front")


def _labels(axes: Axes, rows: Sequence[Row], report: Report) -> None:
    """The names of the points on the front beside them; a ring around the chosen one."""
    named = [row for row in rows if row.front]
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    width, height = _LABEL[0] * (right - left), _LABEL[1] * (top - bottom)
    spots = apart([_place(row) for row in named], width, height)
    for row, spot in zip(named, spots, strict=True):
        axes.annotate(
            row.name,
            xy=_place(row),
            xytext=(spot[0] + 0.02 * (right - left), spot[1] - height),
            fontsize="x-small",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "gray"},
        )
        if report.chosen is not None and row.name == report.chosen.name:
            axes.scatter(
                *_place(row),
                s=150,
                facecolors="none",
                edgecolors="tab:red",
                label="chosen",
                zorder=3,
            )


def apart(places: Sequence[Place], width: float, height: float) -> list[Place]:
    """Each place, or one straight below it where no rectangle around another lies.

    ``width`` and ``height`` are those of the rectangles.
    """
    found: dict[int, Place] = {}
    for index in sorted(range(len(places)), key=lambda i: (-places[i][1], places[i][0])):
        x, y = places[index]
        for other_x, other_y in sorted(found.values(), key=lambda place: -place[1]):
            if abs(other_x - x) < width and abs(other_y - y) < height:
                y = other_y - height
        found[index] = (x, y)
    return [found[index] for index in range(len(places))]
