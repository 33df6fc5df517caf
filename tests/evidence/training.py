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
from cactus_edge.certify.decide import Effort
from cactus_edge.certify.sweep import sweep
from cactus_edge.datasets import Dataset
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.inputs import Perturbation
from cactus_edge.train import Recipe, Summary, load_recipe, train
from cactus_edge.train.checkpoint import load_model
from cactus_edge.train.lower import Settings, lower

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
BUILD = ROOT / "build" / "evidence" / "training"
ATTACKED = 500
"""Test samples, the first ones, that are attacked, and bounded linearly where still open."""


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
class Phase:
    """A recipe, with another sparsity or width in its members where given."""

    recipe: str
    sparsity: float | None = None
    bits: int | None = None

    def read(self) -> Recipe:
        """The recipe of the repository."""
        return load_recipe(RECIPES / f"{self.recipe}.toml")

    def made(self, data: str, seed: int, factor: float) -> Recipe:
        """The recipe as it is trained here: on ``data``, all lengths times ``factor``."""
        recipe = scaled(self.read(), factor)
        choice = recipe.compression
        numbers = {"sparsity": self.sparsity, "bits": self.bits}
        changed = {key: number for key, number in numbers.items() if number is not None}
        members = tuple(msgspec.structs.replace(m, **changed) for m in choice.members)
        return msgspec.structs.replace(
            recipe,
            seed=seed,
            data=msgspec.structs.replace(recipe.data, name=data),
            compression=msgspec.structs.replace(choice, members=members),
        )

    def folder(self, recipe: Recipe) -> str:
        """``prune-finetune-0.98-10``: with what was changed, and the epochs."""
        numbers = [number for number in (self.sparsity, self.bits) if number is not None]
        return "-".join(f"{x}" for x in (Path(self.recipe).name, *numbers, recipe.optimizer.epochs))


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """All lengths times ``factor``."""
    objective, optimizer, choice = recipe.objective, recipe.optimizer, recipe.compression
    return msgspec.structs.replace(
        recipe,
        objective=msgspec.structs.replace(
            objective,
            warmup=factor * objective.warmup,
            epsilon_ramp=factor * objective.epsilon_ramp,
            lambda_ramp=factor * objective.lambda_ramp,
        ),
        compression=msgspec.structs.replace(choice, warmup=factor * choice.warmup),
        optimizer=msgspec.structs.replace(
            optimizer, epochs=max(1, round(factor * optimizer.epochs))
        ),
    )


Chain = tuple[Phase, ...]


@dataclass(frozen=True)
class Method:
    """Chains of phases, each for the compressions that it is made for.

    A phase may start from the one before; phases that two chains share are trained once.
    """

    name: str
    chains: Mapping[Chain, tuple[Cell, ...]]


def _whole(name: str, recipe: str) -> Method:
    """One network for all compressions."""
    return Method(name, {(Phase(recipe),): GRID})


def _pruned(name: str, *recipes: str) -> Method:
    """One network for each of the high sparsities."""
    return Method(
        name,
        {
            (Phase("rivals/pretrain"), *(Phase(recipe, sparsity) for recipe in recipes)): tuple(
                cell for cell in GRID if cell.sparsity == sparsity
            )
            for sparsity in (0.95, 0.98)
        },
    )


METHODS = (
    _whole("IBP", "rivals/ibp"),
    _whole("IBP, larger radius", "rivals/ibp-large"),
    _whole("SABR", "rivals/sabr"),
    _pruned("pruned, fine-tuned", "rivals/prune-finetune"),
    _pruned("NRSLoss", "rivals/nrs"),
    _pruned("HYDRA", "rivals/hydra-scores", "rivals/hydra-finetune"),
    _whole("QAT", "rivals/qat"),
    Method(
        "QA-IBP",
        {
            (Phase("rivals/qa-ibp"),): tuple(cell for cell in GRID if cell.bits > 3),
            (Phase("rivals/qa-ibp", bits=3),): tuple(cell for cell in GRID if cell.bits <= 3),
        },
    ),
    _whole("CACTUS, all sparsities", "mnist-cactus"),
    Method(
        "CACTUS, one sparsity",
        {
            (Phase("mnist-cactus"), Phase("mnist-cactus-one", sparsity)): tuple(
                cell for cell in GRID if cell.sparsity == sparsity
            )
            for sparsity in (0.95, 0.98)
        },
    ),
    Method(
        "CACTUS, one width",
        {
            (Phase("rivals/pretrain"), Phase("mnist-cactus-bits", bits=bits)): tuple(
                cell for cell in GRID if cell.sparsity == 0 and cell.bits == bits
            )
            for bits in (4, 3, 2)
        },
    ),
)


class Figures(msgspec.Struct, frozen=True):
    """Counts of one deployed file on test images."""

    sha256: str
    file_bytes: int
    samples: int
    correct: int
    certified: int
    attacked: int = 0
    proved: int = 0
    unbroken: int = 0


def trained(
    chain: Chain, data: str, seed: int, epochs: int, folder: Path
) -> tuple[Path, list[Summary]]:
    """The directory of a chain's network after ``epochs`` in all, and each phase's summary."""
    factor = epochs / sum(phase.read().optimizer.epochs for phase in chain)
    summaries: list[Summary] = []
    directory = folder
    for phase in chain:
        recipe = phase.made(data, seed, factor)
        if recipe.start is not None:
            begun = msgspec.structs.replace(recipe.start, source=str(directory))
            recipe = msgspec.structs.replace(recipe, start=begun)
        directory = folder / phase.folder(recipe)
        summaries.append(train(recipe, directory, resume=True))
    return directory, summaries


def deployed(
    directory: Path, cell: Cell, training: Dataset, test: Dataset, attacked: int | None = None
) -> Figures:
    """Convert, read the bytes back, certify all test images by intervals, attack some.

    ``attacked`` of them, ``ATTACKED`` without it, are also given to linear bounds; 0 takes none.
    """
    stored = directory / f"{round(1000 * cell.sparsity):03d}-{cell.bits}.json"
    count = ATTACKED if attacked is None else attacked
    model = load_model(directory)
    settings = Settings(bits=cell.bits, sparsity=cell.sparsity, clipping="mse")
    content = write_tflite(lower(model, training, settings).graph)
    sha256 = hashlib.sha256(content).hexdigest()
    if stored.exists():
        figures = msgspec.json.decode(stored.read_bytes(), type=Figures)
        if figures.sha256 == sha256 and figures.attacked >= count:
            return figures
    graph = read_tflite(content)
    radius = [Perturbation.epsilon(str(model.recipe.objective.reported_epsilon))]
    whole = sweep(Certifier(graph), test.images, test.labels, radius)
    figures = Figures(
        sha256=sha256,
        file_bytes=len(content),
        samples=whole.samples,
        correct=whole.correct,
        certified=whole.points[0].certified,
    )
    if count:
        linear = Certifier(graph, effort=Effort("linear"))
        best = sweep(linear, test.images[:count], test.labels[:count], radius, settings=Attack())
        figures = msgspec.structs.replace(
            figures,
            attacked=best.samples,
            proved=best.points[0].certified,
            unbroken=best.samples - best.points[0].refuted,
        )
    files.write(stored, json.dumps(msgspec.to_builtins(figures)).encode(), force=True)
    return figures


def splits(name: str) -> tuple[Dataset, Dataset]:
    """What conversion is calibrated on, and the test images."""
    training, _ = datasets.load_training(name, 0.1)
    return training, datasets.load(name, "test")
