"""CACTUS and its rivals: every method's network, compressed in every way, as it is deployed."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cactus_edge.train import Summary
from tests.evidence import results
from tests.evidence import training as training_
from tests.evidence.training import (
    BUILD,
    GRID,
    METHODS,
    Cell,
    Figures,
    Method,
    Phase,
    deployed,
    splits,
    trained,
)

SEEDS = tuple(int(seed) for seed in os.environ.get("CACTUS_EDGE_SEEDS", "0,1,2").split(","))
"""Three, or those of the environment variable: a run of all takes hours."""
EPOCHS = {"mnist": 20, "fashion-mnist": 10}
"""That every method has in all: its recipes' lengths are scaled to them. ``CACTUS_EDGE_EPOCHS``
takes others."""

SMALL = """
threads = 1
[data]
name = "digits"
[network]
name = "cnn-tiny"
width = 0.25
[objective]
epsilon = 0.02
[optimizer]
epochs = 1
batch_size = 128
learning_rate = 5e-3
"""


@dataclass
class Entry:
    """One method's networks in one cell, seed by seed."""

    figures: list[Figures]
    seconds: list[float]
    memory: list[int]


Table = Mapping[str, Mapping[Cell, Entry]]


@pytest.mark.evidence
@pytest.mark.parametrize("data", EPOCHS)
def test_methods_are_compared(data: str, data_dir: Path) -> None:
    epochs = int(os.environ.get("CACTUS_EDGE_EPOCHS", EPOCHS[data]))
    compare(data, METHODS, SEEDS, epochs, BUILD)


def test_a_comparison_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains and a single recipe on digits: the page, the plots, and nothing done twice."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    members = '[compression]\nmembers = [{ kind = "pruned", sparsity = 0.5 }]\n'
    for name, more in (("whole", ""), ("pruned", f'[start]\nfrom = "runs/whole"\n{members}')):
        (recipes / f"{name}.toml").write_text(SMALL + more)
    monkeypatch.setattr(training_, "RECIPES", recipes)
    monkeypatch.setattr(training_, "ATTACKED", 5)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    whole = Phase("whole")
    chains = {(whole, Phase("pruned", GRID[i].sparsity)): GRID[i : i + 1] for i in (2, 3)}
    methods = (Method("one", {(whole,): GRID[2:4]}), Method("two", chains))
    compare("digits", methods, (0, 1), 2, tmp_path / "build")
    page = (tmp_path / "training-digits.md").read_text()
    assert page.count("| one |") == page.count("| two |") == 2
    assert " ± " in page
    assert (tmp_path / "training-digits-bits.svg").read_text().count("one") >= 1
    kept = (tmp_path / "build/digits/1/pruned-0.98-1/recipe.toml").read_text()
    assert "sparsity = 0.98" in kept and "seed = 1" in kept
    monkeypatch.setattr(training_, "sweep", None)  # nothing is certified again
    compare("digits", methods, (0, 1), 2, tmp_path / "build")
    assert (tmp_path / "training-digits.md").read_text() == page


SHOWN = {"dense": "0 % sparse", "95 % sparse": "95 % sparse", "98 % sparse": "98 % sparse"}
CACTUS = "CACTUS, all sparsities"
ALONE = ("CACTUS, one sparsity", "CACTUS, one width")


def test_the_guide_quotes_what_was_measured() -> None:
    """The table of docs/training.md, cell by cell, and its best rivals by name."""
    measured: dict[str, dict[str, float]] = {}
    for row in json.loads((results.FOLDER / "training.json").read_bytes())["rows"]:
        mean = float(row["certified, interval %"].split()[0])
        measured.setdefault(row["compression"], {})[row["method"]] = mean
    guide = (results.FOLDER.parent / "training.md").read_text(encoding="utf-8")
    part = guide[guide.index("| deployed | one-shot from IBP") :]
    lines = part[: part.index("\n\n")].splitlines()[2:]
    assert len(lines) == 6
    for line in lines:
        title, plain, rival, whole, alone = (cell.strip() for cell in line.strip("|").split("|"))
        width, sparsity = title.split(", ")
        bits = {"int8": "8 bit"}.get(width, width)
        cells = measured[f"{SHOWN[sparsity]}, {bits}"]
        rivals = {name: mean for name, mean in cells.items() if not name.startswith("CACTUS")}
        best = max(rivals.values())
        names = rival[rival.index("(") + 1 : -1]
        assert plain == f"{cells['IBP']:.2f}" and whole == f"{cells[CACTUS]:.2f}", title
        assert rival.startswith(f"{best:.2f} (") and names in rivals, title
        assert rivals[names] == best, title
        assert alone == next((f"{cells[name]:.2f}" for name in ALONE if name in cells), ""), title


def test_the_guide_quotes_fashion_mnist() -> None:
    """Every share of its paragraph stands on the page."""
    found = json.loads((results.FOLDER / "training-fashion-mnist.json").read_bytes())["rows"]
    measured = {f"{float(row['certified, interval %'].split()[0]):.1f}" for row in found}
    guide = (results.FOLDER.parent / "training.md").read_text(encoding="utf-8")
    paragraph = guide[guide.index("\nOn Fashion-MNIST") :].split("\n\n")[0]
    shares = re.findall(r"\d\d\.\d", paragraph)
    assert len(shares) > 10 and set(shares) <= measured
    assert {row["seeds"] for row in found} == {3} and "three seeds)" in paragraph


def compare(
    data: str, methods: Sequence[Method], seeds: Sequence[int], epochs: int, build: Path
) -> None:
    """Train and deploy what is not done yet, and write the page."""
    training, test = splits(data)
    table: dict[str, dict[Cell, Entry]] = {}
    for seed in seeds:
        for method in methods:
            for chain, cells in method.chains.items():
                directory, phases = trained(chain, data, seed, epochs, build / data / str(seed))
                for cell in cells:
                    entry = table.setdefault(method.name, {}).setdefault(cell, Entry([], [], []))
                    figures = deployed(directory, cell, training, test)
                    entry.figures.append(figures)
                    entry.seconds.append(_seconds(phases))
                    entry.memory += [p.cost.memory_bytes for p in phases if p.cost]
                    print(
                        f"{data} {seed} {method.name}, {cell.label}: {_both(figures)}", flush=True
                    )
    entries = [entry for row in table.values() for entry in row.values()]
    assert all(f.certified <= f.correct for entry in entries for f in entry.figures)
    assert all(f.proved <= f.unbroken for entry in entries for f in entry.figures)
    name = "training" if data == "mnist" else f"training-{data}"
    results.write(
        name,
        f"CACTUS and its rivals on {data}: the deployed integers",
        _text(epochs, max(memory for entry in entries for memory in entry.memory)),
        _rows(table),
        "make evidence-training",
    )
    for axis, cells in (
        ("sparsity", [cell for cell in GRID if cell.bits == 8]),
        ("bits", [cell for cell in GRID if cell.sparsity == 0]),
    ):
        _draw(table, cells, axis, results.FOLDER / f"{name}-{axis}.svg")


def _both(figures: Figures) -> str:
    shares = figures.correct / figures.samples, figures.certified / figures.samples
    return " / ".join(f"{100 * share:.2f}" for share in shares)


def _rows(table: Table) -> list[dict[str, object]]:
    """One row for each cell and method: means over the seeds, and the widest distance to them."""
    rows: list[dict[str, object]] = []
    for cell in GRID:
        for method, cells in table.items():
            if cell not in cells:
                continue
            entry = cells[cell]
            runs = entry.figures
            rows.append(
                {
                    "compression": cell.label,
                    "method": method,
                    "standard %": _spread([100 * f.correct / f.samples for f in runs]),
                    "certified, interval %": _spread([100 * f.certified / f.samples for f in runs]),
                    "certified, linear %": _spread([100 * f.proved / f.attacked for f in runs]),
                    "under attack %": _spread([100 * f.unbroken / f.attacked for f in runs]),
                    "bytes": round(statistics.mean(f.file_bytes for f in runs)),
                    "seeds": len(runs),
                    "training s": round(statistics.mean(entry.seconds)),
                }
            )
    return rows


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {max(abs(value - mean) for value in values):.2f}"


def _seconds(phases: Sequence[Summary]) -> float:
    """Of all steps of all phases, evaluations left out."""
    return sum(p.cost.seconds_per_epoch * p.epochs for p in phases if p.cost is not None)


def _text(epochs: int, memory: int) -> str:
    return (
        "Networks trained by the recipes in `recipes/` (see `docs/training.md`, Rivals), on this "
        f"data set, for the sparsity or width in the table, each for {epochs} epochs in all with "
        "the lengths of the recipes in proportion, then "
        "converted in one shot to each compression and read back from the bytes of the `.tflite` "
        "file. All layers but the last are pruned, by one ranking but for HYDRA, which ranks layer "
        "by layer. `certified, interval %` is of all test "
        "images, by interval bounds with elided margin at the radius of the recipes, exact in "
        f"integers and for every runtime. Of the first {training_.ATTACKED} of them, "
        "`certified, linear %` "
        "is what linear bounds prove as well, and `under attack %` what integer attacks leave. "
        "Several seeds: mean ± the largest distance from it. `training s` sums "
        "the steps of all phases of a chain, on one thread. Methods that fix which weights are "
        "pruned are shown where they prune. The process takes at most "
        f"{memory / 2**30:.2f} GiB."
    )


def _draw(table: Table, cells: Sequence[Cell], axis: str, path: Path) -> None:
    """Certified accuracy over sparsity or width, one line for each method."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "cactus_edge"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for method, row in table.items():
            places = [place for place, cell in enumerate(cells) if cell in row]
            means = [
                statistics.mean(100 * f.certified / f.samples for f in row[cells[place]].figures)
                for place in places
            ]
            axes.plot(places, means, "o-", label=method)
        axes.set_xticks(range(len(cells)), [str(getattr(cell, axis)) for cell in cells])
        axes.set_xlabel(axis)
        axes.set_ylabel("certified, deployed (%)")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})
