"""Draws the picture of the README from the measured results: `python tools/picture.py`.

Above, what 12 executors compute from the same images, one colour for each distinct output
(docs/results/mnist-runtimes.json); below, what is proved and refuted of the test images by each
method (docs/results/certification.json). The same results are the same file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from cactus_edge import files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PICTURE = ROOT / "docs" / "images" / "overview.svg"
COLOURS = ("#2a7f62", "#d95f02", "#7570b3", "#e6ab02", "#a6761d", "#666666")
PROVED, OPEN, REFUTED = "#2a7f62", "#d9d9d9", "#d95f02"
METHODS = {
    "interval alone": "intervals",
    "interval, elided margin": "+ elided margins",
    "linear": "+ linear bounds",
    "complete": "+ complete search",
}

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """The rows of a page of docs/results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def outputs() -> dict[str, dict[str, str]]:
    """For each model, the digest of the logits that each executor computed."""
    found: dict[str, dict[str, str]] = {}
    for row in rows_of("mnist-runtimes"):
        if row["runtime"] != "between runtimes":
            found.setdefault(row["model"], {})[row["runtime"]] = row["output"]
    return found


def shares() -> dict[str, dict[str, tuple[float, float]]]:
    """For each model and method, percent certified and percent that no attack refuted."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows_of("certification"):
        method = next(
            text for name, text in METHODS.items() if row["method"].split(" (")[0] == name
        )
        pair = float(row["certified %"]), float(row["attack %"])
        found.setdefault(row["model"], {})[method] = pair
    return found


def draw_outputs(axes: Axes) -> None:
    """One square for each model and executor."""
    found = outputs()
    names = list(next(iter(found.values())))
    for line, digests in enumerate(found.values()):
        distinct = list(dict.fromkeys(digests.values()))
        for column, name in enumerate(names):
            colour = COLOURS[distinct.index(digests[name])]
            axes.barh(line, 0.86, left=column + 0.07, height=0.7, color=colour)
        text = "1 output" if len(distinct) == 1 else f"{len(distinct)} different outputs"
        axes.text(len(names) + 0.15, line, text, va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xticks([column + 0.5 for column in range(len(names))], names, rotation=35, ha="right")
    axes.set_xlim(0, len(names) + 3.1)
    axes.invert_yaxis()
    axes.set_title("The same 1,000 images in 12 executors: a colour is an output, bit for bit")


def draw_shares(axes: Axes) -> None:
    """One bar for each model and method: proved, open, refuted."""
    ticks: list[str] = []
    for model, methods in shares().items():
        for method, (certified, left) in methods.items():
            line = len(ticks)
            ends = (0, certified, left, 100)
            colours = (PROVED, OPEN, REFUTED)
            labels = ("proved", "open", "misclassified or refuted") if not ticks else (None,) * 3
            for start, end, colour, label in zip(ends, ends[1:], colours, labels, strict=False):
                axes.barh(line, end - start, left=start, height=0.75, color=colour, label=label)
            axes.text(100.1, line, f"{certified:.2f} % proved", va="center")
            ticks.append(f"{model}: {method}" if method == "intervals" else method)
    axes.set_yticks(range(len(ticks)), ticks)
    axes.set_xlim(86, 102.6)
    axes.set_xticks(range(86, 101, 2))
    axes.set_xlabel("% of 10,000 MNIST test images at epsilon 0.1; the axis begins at 86 %")
    axes.invert_yaxis()
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.22), frameon=False)
    axes.set_title("What is proved of the deployed integers, for all of these runtimes")


def draw(path: Path) -> None:
    """Write the picture."""
    style = {"svg.hashsalt": "cactus_edge", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style), files.writing(path, force=True) as stream:
        figure = Figure(figsize=(9, 6), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(1, 2))
        draw_outputs(above)
        draw_shares(below)
        for axes in (above, below):
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(left=False)
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})


if __name__ == "__main__":
    draw(PICTURE)
    print(PICTURE.relative_to(ROOT))
