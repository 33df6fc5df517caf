"""Models that TensorFlow's converter wrote, and what is computed inside of them.

``tests/stock_models`` holds the small ones of ``tests/evidence/stock_keras.py``. A runtime shows a
model's output only; ``aimed`` changes the four bytes that say which tensor that is, and nothing
else, so that any layer of the very file can be looked at.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tflite

from cactus_edge.flatbuffer import read_tflite, write_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.validate import Peer
from cactus_edge.validate.child import Part, Worker

FOLDER = Path(__file__).parent / "stock_models"
READ = tuple(sorted(path.stem for path in FOLDER.glob("*.tflite")))
_OUTPUTS = 8
"""The place of ``outputs`` in the table ``SubGraph``: slot 2."""


@dataclass(frozen=True)
class Model:
    """A file, and the graph that it holds."""

    name: str
    content: bytes
    graph: Graph

    def drawn(self, count: int, seed: int = 0) -> Int64Array:
        """Stored inputs [count, ...]: neighbours alike, as in images, and noise."""
        tensor = self.graph.tensors[self.graph.core_input]
        lowest, highest = tensor.dtype.range
        rng = np.random.default_rng(seed)
        values = rng.integers(lowest, highest + 1, (count, *tensor.shape[1:]))
        for axis in range(1, values.ndim):
            values[::2] = (values[::2] + np.roll(values[::2], 1, axis)) // 2
        spread = np.clip(3 * (values[::2] - (lowest + highest) // 2), lowest, highest)
        values[::2] = spread
        return values

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the tensors that operators of the core compute and the file has."""
        numbers = _numbers(self.content)
        names = [self.graph.tensors[op.output].name for op in self.graph.core]
        return tuple(name for name in names if name in numbers)

    @property
    def computes_shapes(self) -> bool:
        """Whether the file leaves the batch free, and computes shapes from it."""
        loaded = tflite.Model.GetRootAs(self.content, 0)
        codes = map(loaded.OperatorCodes, range(loaded.OperatorCodesLength()))
        return tflite.BuiltinOperator.SHAPE in [code.BuiltinCode() for code in codes]

    def tensor(self, name: str) -> int:
        """The graph's number of a tensor."""
        return next(i for i, t in enumerate(self.graph.tensors) if t.name == name)


def model(name: str, folder: Path = FOLDER) -> Model:
    """By the file's name."""
    content = (folder / f"{name}.tflite").read_bytes()
    return Model(name, content, read_tflite(content, name))


def aimed(content: bytes, name: str) -> bytes:
    """The file with the tensor of this name as its output."""
    subgraph = tflite.Model.GetRootAs(content, 0).Subgraphs(0)
    table = subgraph._tab  # noqa: SLF001
    changed = bytearray(content)
    struct.pack_into("<i", changed, table.Vector(table.Offset(_OUTPUTS)), _numbers(content)[name])
    return bytes(changed)


def _numbers(content: bytes) -> dict[str, int]:
    """The tensors of a file that operators compute, by name."""
    subgraph = tflite.Model.GetRootAs(content, 0).Subgraphs(0)
    operators = map(subgraph.Operators, range(subgraph.OperatorsLength()))
    computed = [int(index) for op in operators for index in op.OutputsAsNumpy()]
    return {subgraph.Tensors(index).Name().decode(): index for index in computed}


def _part(found: Model, name: str) -> bytes:
    """A file that computes one tensor: the very file where that takes the core's input."""
    graph = found.graph
    if graph.input == graph.core_input:
        return aimed(found.content, name)
    output = found.tensor(name)
    last = next(i for i, op in enumerate(graph.core) if op.output == output)
    return write_tflite(Graph(graph.tensors, graph.core[: last + 1], graph.core_input, output))


class Layers:
    """A runtime on the layers of files; each request is a process."""

    def __init__(self, peer: Peer) -> None:
        self._files: dict[int, bytes] = {}
        self._worker = _Bytes(peer, self._files)
        self._kept: list[Graph] = []

    def run(self, parts: list[tuple[Model, str, Int64Array]]) -> list[Int64Array]:
        """The tensors of these names, int64 [n, ...] each, for stored inputs of the files."""
        asked: list[Part] = []
        for found, name, inputs in parts:
            graph = found.graph
            # A graph of its own for each file: the worker knows files by their graphs.
            cut = Graph(graph.tensors, graph.operators, graph.input, found.tensor(name))
            self._files[id(cut)] = _part(found, name)
            self._kept.append(cut)
            asked.append((cut, inputs))
        return self._worker.run(asked)


class _Bytes(Worker):
    def __init__(self, peer: Peer, files: dict[int, bytes]) -> None:
        super().__init__(peer.module, peer.mode, python=peer.python)
        self._files = files

    def _bytes(self, graph: Graph) -> bytes:
        return self._files[id(graph)]
