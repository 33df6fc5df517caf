"""One step of a program on the activations that samples bring to it: how long it takes then.

Kernels that skip inputs at the zero point take as long as their activations make them, so that such
a step is timed on what the steps before it leave. Activations are put back from one sample to the
next, so that weights come from where they would in a network, and not from the last repetition.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cactus_edge.graph import Graph
from cactus_edge.kernels.place import core_tensors
from cactus_edge.kernels.program import Program
from cactus_edge.kernels.walk import Frame

ByteArray = npt.NDArray[np.uint8]

SAMPLES = 32
"""Samples that a step is timed on at most."""
_TURNS = 7


class Replay:
    """An operator of a program for single images.

    Args:
        graph: what the program was built from.
        program: of one image.
        number: of the operator, by its position in the core.
        images: uint8 [samples, bytes of an image], as they are stored.
    """

    def __init__(self, graph: Graph, program: Program, number: int, images: ByteArray) -> None:
        """Run the steps before it on each sample."""
        assert program.block == 1 and images.shape[1] == program.image_bytes
        position = program.operators.index(number)
        self._work = program.workspace()
        self._depth = int(program.steps[position]["depth"])
        self._frame = Frame(program, self._work, steps=program.steps[position : position + 1])
        before = Frame(program, self._work, steps=program.steps[:position])
        places = dict(zip(core_tensors(graph), program.placements, strict=True))
        place = places[graph.core[number].inputs[0]]
        self._source = self._work.activations[place.begin : place.end]
        self._inputs: list[ByteArray] = []
        for image in np.ascontiguousarray(images):
            before.run(image.ctypes.data, 0, 1)
            self._inputs.append(self._source.copy())

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self._inputs)

    def seconds(self, sample: int) -> float:
        """One run on a sample."""
        self._source[:] = self._inputs[sample]
        begin = time.perf_counter()
        self._frame.run(0, 0, 1)
        return time.perf_counter() - begin

    def live(self) -> float:
        """Share of the steps that a skipping kernel does not skip, the median over the samples."""
        counts: list[int] = []
        for sample in range(self.samples):
            self.seconds(sample)
            counts.append(int(self._work.positions[0]))
        return float(np.median(counts)) / max(self._depth, 1)


def median_seconds(replays: Sequence[Replay]) -> list[float]:
    """For each, the median over its samples of the least time; they take turns."""
    times = np.array(
        [
            [[replay.seconds(sample) for replay in replays] for sample in range(replays[0].samples)]
            for _ in range(_TURNS)
        ]
    )
    return [float(value) for value in np.median(times.min(axis=0), axis=0)]


def chosen_samples(count: int) -> npt.NDArray[np.int64]:
    """Which of so many samples are used: as many as are, evenly over all."""
    return np.arange(min(count, SAMPLES)) * count // min(count, SAMPLES)
