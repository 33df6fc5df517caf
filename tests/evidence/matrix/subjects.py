"""What the matrix runs: the models of the repository, stock ones, and stock ones universalized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cactus_edge import datasets, inputs, profiles, universal
from cactus_edge.errors import DataError
from cactus_edge.execute import execute_all
from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Add, FullyConnected, Graph, Int64Array, Linear
from cactus_edge.operators import Lookup, Pair
from cactus_edge.universalize import universalize
from tests import stock
from tests.test_stock import REFUSED
from tools.zoo import ENTRIES, MODELS

EVERYWHERE = 10
"""Samples that every place runs; outputs are hashed over these."""
NATIVE = 50
"""Samples that this machine runs."""
LAYERS = 2
"""Samples on which this machine's layers are compared."""
_LARGE = 200_000
"""Bytes from which on a model is run on fewer samples, and not layer by layer."""


@dataclass(frozen=True)
class Subject:
    """A model with its inputs.

    ``origin``: ``own``, ``stock`` or ``universalized``; ``data``: what its inputs are.
    """

    origin: str
    model: stock.Model
    inputs: Int64Array
    data: str

    @property
    def name(self) -> str:
        """With its origin, unless it is as its file says."""
        return self.model.name

    @property
    def graph(self) -> Graph:
        """As read from the file."""
        return self.model.graph

    @property
    def large(self) -> bool:
        """Whether it is run on fewer samples."""
        return len(self.model.content) > _LARGE

    @cached_property
    def disagreeing(self) -> tuple[str, ...]:
        """Kinds of operators on which profiles may differ; none where all are proved to agree."""
        rescaling = [op for op in self.graph.core if isinstance(op, (Linear, Add, Lookup, Pair))]
        kinds = {op.name: op.kind for op in rescaling}
        entries = universal.agreement(self.graph)
        return tuple(sorted({kinds[entry.name] for entry in entries if entry.disagreeing}))

    @cached_property
    def uncovered(self) -> dict[str, str]:
        """Profiles that do not describe it, with the reason."""
        return profiles.uncovered(self.graph)

    @cached_property
    def has_packed_layers(self) -> bool:
        """Whether a FULLY_CONNECTED has int4 weights."""
        return any(
            isinstance(op, FullyConnected) and op.weights.bits <= 4 for op in self.graph.core
        )

    def expected(self, profile: str, count: int) -> dict[str, Int64Array]:
        """Every layer's output by the reference executor, by the tensor's name."""
        if profile not in self._known:
            tensors = self.graph.tensors
            values = execute_all(self.graph, self.inputs, profile)
            wanted = {*self.model.layers, tensors[self.graph.logits].name}
            self._known[profile] = {
                tensors[index].name: output.astype(np.int16)
                for index, output in values.items()
                if tensors[index].name in wanted
            }
        return {name: value[:count] for name, value in self._known[profile].items()}

    @cached_property
    def _known(self) -> dict[str, dict[str, Int64Array]]:
        return {}


def subjects(more: Path | None = None) -> Iterator[Subject]:
    """All of them; ``more`` is a folder with further stock files."""
    yield from own()
    folders = [stock.FOLDER, *([more] if more and more.is_dir() else [])]
    found = {path.stem: folder for folder in reversed(folders) for path in folder.glob("*.tflite")}
    for name in sorted(found.keys() - REFUSED.keys()):
        model = stock.model(name, found[name])
        count = EVERYWHERE if len(model.content) > _LARGE else NATIVE
        yield Subject("stock", model, model.drawn(count), "drawn")
        graph, _ = universalize(model.graph)
        content = write_tflite(graph)
        moved = stock.Model(f"{name}, universalized", content, read_tflite(content, name))
        yield Subject("universalized", moved, model.drawn(count), "drawn")


def own() -> Iterator[Subject]:
    """The models of the repository."""
    for name in ENTRIES:
        content = (MODELS / name / "model.tflite").read_bytes()
        yield _own(name, stock.Model(name, content, read_tflite(content, name)))


def _own(name: str, model: stock.Model) -> Subject:
    try:
        images = datasets.load(ENTRIES[name].data, "test").images[:NATIVE]
    except DataError:
        return Subject("own", model, model.drawn(NATIVE), "drawn")
    return Subject("own", model, inputs.stored(model.graph, images), ENTRIES[name].data)
