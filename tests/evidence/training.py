"""The methods that are compared, and the grid of compressions that each of them ships.

A method is a chain of recipes, the last of which yields the network. Everything that is done for a
seed lies in a folder of its own and is not done again: runs resume, cells are stored one by one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cactus_edge import datasets, files
from cactus_edge.certify import Certifier
from cactus_edge.certify.attack import Settings as Attack
from cactus_edge.certify.sweep import sweep
from cactus_edge.datasets import Dataset
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.inputs import Perturbation
from cactus_edge.train import Summary, load_recipe, train
from cactus_edge.train.checkpoint import load_model
from cactus_edge.train.lower import Settings, lower

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
BUILD = ROOT / "build" / "evidence" / "training"
ATTACKED = 500
"""Test samples, the first ones, of the accuracy under attack."""


@dataclass(frozen=True)
class Cell:
    """A compression: what ``convert --sparsity --bits`` makes."""

    sparsity: float
    bits: int

    @property
    def label(self) -> str:
        """``95 % sparse, 4 bit``."""
        return f"{100 * self.sparsity:.4g} % sparse, {self.bits} bit"


GRID = (
    Cell(0.0, 8),
    Cell(0.9, 8),
    Cell(0.95, 8),
    Cell(0.98, 8),
    Cell(0.0, 4),
    Cell(0.0, 3),
    Cell(0.0, 2),
    Cell(0.95, 4),
    Cell(0.98, 4),
)


@dataclass(frozen=True)
class Method:
    """A chain of recipes; each may start from the one before. ``cells``: what it is made for."""

    name: str
    recipes: tuple[str, ...]
    cells: tuple[Cell, ...] = GRID


_PRUNED = tuple(cell for cell in GRID if cell.sparsity >= 0.95)
_RIVALS = (
    Method("IBP", ("rivals/ibp",)),
    Method("IBP, larger radius", ("rivals/ibp-large",)),
    Method("SABR", ("rivals/sabr",)),
    Method("pruned, fine-tuned", ("rivals/pretrain", "rivals/prune-finetune"), _PRUNED),
    Method("NRSLoss", ("rivals/pretrain", "rivals/nrs"), _PRUNED),
    Method("HYDRA", ("rivals/pretrain", "rivals/hydra-scores", "rivals/hydra-finetune"), _PRUNED),
    Method("QAT", ("rivals/qat",)),
    Method("QA-IBP", ("rivals/qa-ibp",)),
)
METHODS: Mapping[str, tuple[Method, ...]] = {
    "mnist": (
        *_RIVALS,
        Method("CACTUS, sparsities", ("mnist-cactus",)),
        Method("CACTUS, widths", ("mnist-cactus-bits",)),
    ),
}
"""By data set."""


class Figures(msgspec.Struct, frozen=True):
    """Counts of one deployed file on test images."""

    sha256: str
    file_bytes: int
    samples: int
    correct: int
    certified: int
    attacked: int
    unbroken: int


def trained(method: Method, seed: int, folder: Path) -> tuple[Path, list[Summary]]:
    """The directory of the method's network, and the summary of each phase."""
    summaries: list[Summary] = []
    directory = folder
    for name in method.recipes:
        recipe = load_recipe(RECIPES / f"{name}.toml")
        recipe = msgspec.structs.replace(recipe, seed=seed)
        if recipe.start is not None:
            start = msgspec.structs.replace(recipe.start, source=str(directory))
            recipe = msgspec.structs.replace(recipe, start=start)
        directory = folder / Path(name).name
        summaries.append(train(recipe, directory, resume=True))
    return directory, summaries


def deployed(directory: Path, cell: Cell, training: Dataset, test: Dataset) -> Figures:
    """Convert, read the bytes back, certify all test images by intervals, attack some."""
    stored = directory / f"{round(1000 * cell.sparsity):03d}-{cell.bits}.json"
    model = load_model(directory)
    settings = Settings(bits=cell.bits, sparsity=cell.sparsity)
    content = write_tflite(lower(model, training, settings).graph)
    sha256 = hashlib.sha256(content).hexdigest()
    if stored.exists():
        figures = msgspec.json.decode(stored.read_bytes(), type=Figures)
        if figures.sha256 == sha256:
            return figures
    graph = read_tflite(content)
    radius = [Perturbation.epsilon(str(model.recipe.objective.reported_epsilon))]
    certifier = Certifier(graph)
    whole = sweep(certifier, test.images, test.labels, radius)
    some = test.images[:ATTACKED], test.labels[:ATTACKED]
    attack = sweep(certifier, *some, radius, settings=Attack())
    figures = Figures(
        sha256=sha256,
        file_bytes=len(content),
        samples=whole.samples,
        correct=whole.correct,
        certified=whole.points[0].certified,
        attacked=attack.samples,
        unbroken=attack.samples - attack.points[0].refuted,
    )
    files.write(stored, json.dumps(msgspec.to_builtins(figures)).encode(), force=True)
    return figures


def splits(name: str) -> tuple[Dataset, Dataset]:
    """What conversion is calibrated on, and the test images."""
    training, _ = datasets.load_training(name, 0.1)
    return training, datasets.load(name, "test")
