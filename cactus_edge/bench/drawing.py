"""Figures as SVG: latency over sparsity, and the roofline. matplotlib is imported when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cactus_edge import files
from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.bench.roofline import Roof
from cactus_edge.bench.run import Benchmark
from cactus_edge.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = "cactus-edge"
_SIZE = (7, 4.5)


def draw_sparsity(
    results: Sequence[Benchmark], path: Path, title: str, *, force: bool = False
) -> None:
    """Median latencies of several models over their sparsity, one line for each runtime.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file exists already, or cannot be written.
    """
    figure, axes = _canvas()
    ordered = sorted(results, key=lambda result: result.work.sparsity)
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in ordered:
        for name, figures in {_OURS: result.ours, **result.peers}.items():
            point = (100 * result.work.sparsity, figures.median_us)
            lines.setdefault(name, []).append(point)
    for name, points in lines.items():
        width = 2.5 if name == _OURS else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("% of weights that are zero")
    axes.set_ylabel("median latency in us, one image")
    _finish(figure, axes, path, title, force)


def draw_roofline(
    roofs: Mapping[str, Roof], ceilings: Ceilings, path: Path, title: str, *, force: bool = False
) -> None:
    """What models reach (filled: zeros included, hollow: left out) under the machine's ceilings.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: the file exists already, or cannot be written.
    """
    figure, axes = _canvas()
    left = min([1.0, *(roof.intensity for roof in roofs.values())]) / 2
    right = max([100.0, *(roof.intensity for roof in roofs.values())]) * 2
    for level, rate in ceilings.bandwidth.items():
        knee = ceilings.products / rate
        ends = [left, min(max(knee, left), right), right]
        heights = [min(x * rate, ceilings.products) for x in ends]
        axes.plot(ends, heights, linewidth=1, label=f"{level} {rate:.0f} GB/s")
    for name, roof in roofs.items():
        (line,) = axes.plot(roof.intensity, roof.rate, marker="o", linestyle="", label=name)
        axes.plot(
            roof.intensity,
            roof.useful_rate,
            marker="o",
            linestyle="",
            fillstyle="none",
            color=line.get_color(),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("int8 products for each byte of weights")
    axes.set_ylabel("thousand million products a second")
    _finish(figure, axes, path, title, force)


def _canvas() -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "verify", "drawing a figure") from None
    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, path: Path, title: str, force: bool) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    axes.set_title(title)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="x-small")
    # No date and fixed identifiers: the same figures are the same file.
    with (
        matplotlib.rc_context({"svg.hashsalt": "cactus_edge"}),
        files.writing(path, force=force) as stream,
    ):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
