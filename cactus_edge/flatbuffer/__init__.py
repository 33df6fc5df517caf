"""``Graph`` to ``.tflite`` and back: the only place that knows the file format.

``schema`` is the table of the format, ``wire`` reads and writes flatbuffer tables, ``operators``
holds both directions of each operator, ``storable`` says what a file can hold.
"""

from __future__ import annotations

from pathlib import Path

from cactus_edge import files
from cactus_edge.flatbuffer.reader import read_tflite
from cactus_edge.flatbuffer.writer import write_tflite
from cactus_edge.graph import Graph

__all__ = ["load", "read_tflite", "save", "write_tflite"]


def load(path: Path) -> tuple[Graph, bytes]:
    """The graph in a file and the very bytes it was read from, whose SHA-256 names the model.

    Raises:
        UsageError: there is no such file.
        UnsupportedModelError: as ``read_tflite``.
    """
    data = files.read(path, "model")
    return read_tflite(data, str(path)), data


def save(graph: Graph, path: Path, force: bool = False) -> bytes:
    """Write ``graph`` to ``path`` and return the bytes.

    Raises:
        UnsupportedModelError: as ``write_tflite``.
        OutputError: ``path`` exists and ``force`` is not given, or it cannot be written.
    """
    data = write_tflite(graph)
    files.write(path, data, force=force)
    return data
