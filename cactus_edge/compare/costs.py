"""What each layer's width and pruning cost: the model made again with one layer spared.

The run is converted as the model was, and the result has to be the model itself. Then, for each
layer, it is converted with that layer at 8 bits, and with that layer unpruned; what certifies more
says where bits or weights are missing. Counts are those of the deployed integers, by intervals with
elided margins, for every rounding profile.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec
import numpy as np

from cactus_edge.certify import Certifier
from cactus_edge.certify.sweep import sweep
from cactus_edge.datasets import Dataset
from cactus_edge.errors import DataError, ToolError, UnsupportedModelError
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Graph, Linear
from cactus_edge.inputs import Perturbation
from cactus_edge.train.checkpoint import Model
from cactus_edge.train.lower import Settings, lower

PROVENANCE = "cactus_edge.provenance"
Progress = Callable[[int, int], None]


class Variant(msgspec.Struct, frozen=True):
    """The model with a layer spared: counts of samples and of non-zero weights, size of its file.

    ``change`` is ``8 bits`` or ``unpruned``; ``problem`` says why there is no such model.
    """

    layer: str
    change: str
    correct: int = 0
    certified: int = 0
    bytes: int = 0
    nonzero: int = 0
    problem: str = ""


class Costs(msgspec.Struct, frozen=True):
    """The model as it is, all layers spared at once, and each layer spared by itself."""

    epsilon: str
    samples: int
    deployed: Variant
    spared: Variant
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class _Measure:
    """Makes a variant and counts."""

    model: Model
    training: Dataset
    held_out: Dataset
    samples: int
    perturbation: Perturbation

    def __call__(self, layer: str, change: str, settings: Settings) -> tuple[Graph, Variant]:
        """Convert, read back, certify.

        Raises:
            UnsupportedModelError: there is no such model.
            ToolError: there is no such model.
        """
        content = write_tflite(lower(self.model, self.training, settings).graph)
        graph = read_tflite(content)
        images, labels = self.held_out.images[: self.samples], self.held_out.labels[: self.samples]
        curve = sweep(Certifier(graph), images, labels.astype(np.int64), [self.perturbation])
        counts = curve.correct, curve.points[0].certified
        weights = [op.weights.values for op in graph.core if isinstance(op, Linear)]
        nonzero = sum(int(np.count_nonzero(values)) for values in weights)
        return graph, Variant(layer, change, *counts, len(content), nonzero)


def settings_of(model: Model, graph: Graph) -> Settings:
    """How ``graph`` was converted, from what its file says.

    Raises:
        DataError: the file does not say, or the run has no such member.
    """
    try:
        said = cast(dict[str, Any], json.loads(dict(graph.metadata)[PROVENANCE]))
        key = said.get("pattern")
        members = (member.pattern() for member in model.recipe.compression.members)
        pattern = next(p for p in members if p.key() == key) if key is not None else None
        return Settings(
            bits=int(said["bits"]),
            sparsity=float(said["sparsity"]),
            epsilon=float(said["epsilon"]),
            edge_bits=int(said["edge_bits"]),
            pattern=pattern,
            clipping=str(said["clipping"]),
            wide=frozenset(said.get("wide", ())),
            whole=frozenset(said.get("whole", ())),
        )
    except StopIteration:
        raise DataError("its pattern is that of no member of the run's recipe") from None
    except (KeyError, ValueError, TypeError, RecursionError):
        raise DataError("its file does not say how it was converted") from None


def costs(
    model: Model,
    graph: Graph,
    training: Dataset,
    held_out: Dataset,
    samples: int,
    perturbation: Perturbation,
    *,
    progress: Progress | None = None,
) -> Costs:
    """Spare one layer after another.

    Args:
        model: the trained run.
        graph: what was made of it.
        training: what the run was trained on, for calibration.
        held_out: on which samples are counted, the first ``samples`` of it.
        samples: see above.
        perturbation: what is certified.
        progress: called with (variants done, in all).

    Raises:
        DataError: the model was not made of this run by ``convert``.
    """
    settings = settings_of(model, graph)
    measure = _Measure(model, training, held_out, samples, perturbation)
    names = [op.name for op in graph.core if isinstance(op, Linear)]
    names = [name for name in names if name in _layers(model)]
    changes = _changes(names, settings)
    total = len(changes) + 2

    def tell(done: int) -> None:
        if progress:
            progress(done, total)

    deployed = _deployed(measure, settings, graph)
    tell(1)
    every = replace(settings, wide=frozenset(names), whole=frozenset(names))
    spared = _tried(measure, "all", "spared", every) if changes else deployed
    tell(2)
    variants: list[Variant] = []
    for name, change, changed in changes:
        variants.append(_tried(measure, name, change, changed))
        tell(2 + len(variants))
    return Costs(str(perturbation.radius), samples, deployed, spared, tuple(variants))


def _layers(model: Model) -> set[str]:
    return {name for name, _ in model.network.layers()}


def _changes(names: list[str], settings: Settings) -> list[tuple[str, str, Settings]]:
    """For each layer what can be spared."""
    found: list[tuple[str, str, Settings]] = []
    for index, name in enumerate(names):
        edge = index in (0, len(names) - 1)
        bits = settings.edge_bits if edge and settings.edge_bits is not None else settings.bits
        if bits < 8 and name not in settings.wide:
            found.append((name, "8 bits", replace(settings, wide=settings.wide | {name})))
        if settings.pruned.key() and name not in settings.whole:
            found.append((name, "unpruned", replace(settings, whole=settings.whole | {name})))
    return found


def _deployed(measure: _Measure, settings: Settings, graph: Graph) -> Variant:
    """The model made again; with or without universal scales, which its file does not say."""
    for universal in (True, False):
        made, variant = measure("", "", replace(settings, universal=universal))
        if made.fingerprint() == graph.fingerprint():
            return variant
    raise DataError("converting the run in the same way gives other integers")


def _tried(measure: _Measure, layer: str, change: str, settings: Settings) -> Variant:
    try:
        return measure(layer, change, settings)[1]
    except (UnsupportedModelError, ToolError) as error:
        return Variant(layer, change, problem=str(error))
