"""Files that fuzzing accepted as models, run by LiteRT: ``python -m tests.fuzz.compare FOLDER``.

Each has to give LiteRT the integers of its profile. Files that LiteRT refuses, or that crash its
process, are counted, those apart of which the reader warns that others refuse them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cactus_edge import profiles
from cactus_edge.errors import ToolError
from cactus_edge.execute import execute
from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Graph, Int64Array
from cactus_edge.validate.child import Worker, core_bytes

MODULE, MODE, PROFILE = "ai_edge_litert.interpreter", "BUILTIN_REF", "litert-reference"
_SAMPLES = 4
_LARGEST = 1 << 20
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Case:
    """An accepted file and what it should compute; ``warned`` where not every runtime reads it."""

    data: bytes
    graph: Graph
    inputs: Int64Array
    expected: Int64Array
    warned: bool


class Warnings(logging.Handler):
    """Notes whether there was a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.any = False

    def emit(self, record: logging.LogRecord) -> None:
        self.any = True


class Given(Worker):
    """Runs files as they are, not as they would be written again."""

    def __init__(self, files: dict[int, bytes]) -> None:
        super().__init__(MODULE, MODE)
        self._files = files

    def _bytes(self, graph: Graph) -> bytes:
        same = (graph.input, graph.output) == (graph.core_input, graph.logits)
        return self._files[id(graph)] if same else core_bytes(graph)


def case(data: bytes) -> Case | None:
    """None where this profile does not cover the model, or it is too large to be run here."""
    warnings, log = Warnings(), logging.getLogger("cactus_edge")
    log.addHandler(warnings)
    try:
        graph = read_tflite(data)
    finally:
        log.removeHandler(warnings)
    covered = PROFILE not in profiles.uncovered(graph)
    if not covered or sum(tensor.size for tensor in graph.tensors) > _LARGEST:
        return None
    tensor = graph.tensors[graph.core_input]
    low, high = tensor.dtype.range
    rng = np.random.default_rng(len(data))
    inputs = rng.integers(low, high + 1, (_SAMPLES, *tensor.shape[1:]))
    return Case(data, graph, inputs, execute(graph, inputs, PROFILE), warnings.any)


def compare(cases: list[Case], tally: Counter[str], wrong: list[Case], refused: list[Case]) -> None:
    """Run all in one process; where that fails, halves of them."""
    try:
        found = Given({id(c.graph): c.data for c in cases}).run(
            [(c.graph, c.inputs) for c in cases]
        )
    except ToolError as error:
        if len(cases) > 1:
            middle = len(cases) // 2
            compare(cases[:middle], tally, wrong, refused)
            compare(cases[middle:], tally, wrong, refused)
            return
        what = "LiteRT crashes" if "signal" in str(error) else "LiteRT refuses"
        tally[f"{what} as warned" if cases[0].warned else what] += 1
        if not cases[0].warned:
            refused.append(cases[0])
        return
    for made, output in zip(cases, found, strict=True):
        equal = np.array_equal(output.reshape(made.expected.shape), made.expected)
        tally["equal" if equal else "different"] += 1
        if not equal:
            wrong.append(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of accepted files")
    parser.add_argument("--most", type=int, default=1 << 30)
    given = parser.parse_args()
    if importlib.util.find_spec(MODULE.partition(".")[0]) is None:
        print("LiteRT is not installed: nothing is compared")
        return 0
    tally: Counter[str] = Counter()
    wrong: list[Case] = []
    refused: list[Case] = []
    made: list[Case] = []
    for path in sorted(given.folder.iterdir())[: given.most]:
        found = case(path.read_bytes())
        if found is None:
            tally["not covered"] += 1
        else:
            made.append(found)
    for start in range(0, len(made), _BATCH):
        compare(made[start : start + _BATCH], tally, wrong, refused)
    for kind, cases in (("different", wrong), ("refused", refused)):
        for number, one in enumerate(cases):
            (given.folder.parent / f"{kind}-{number}.tflite").write_bytes(one.data)
    text = json.dumps(tally)
    (given.folder.parent / "compare.json").write_text(text)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
