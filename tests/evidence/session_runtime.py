"""Our runtime behind the interface of TFLite Micro's, so that it runs where stock runtimes do."""

from __future__ import annotations

import numpy as np

from cactus_edge.flatbuffer import read_tflite
from cactus_edge.graph import Stored
from cactus_edge.runtime import Session


class Interpreter:
    """A session for one model at a time."""

    def __init__(self, model: bytes) -> None:
        """Load the model."""
        self._session = Session(read_tflite(model))
        self._inputs: Stored = np.zeros(0, np.int8)

    @classmethod
    def from_bytes(cls, model: bytes, arena_size: int) -> Interpreter:
        """``arena_size`` is what TFLite Micro is given; a session finds out what it needs."""
        del arena_size
        return cls(model)

    def set_input(self, sample: Stored, index: int) -> None:
        """One sample with its leading 1."""
        assert index == 0
        self._inputs = sample

    def invoke(self) -> None:
        """Compute."""
        self._outputs = self._session.run(self._inputs)

    def get_output(self, index: int) -> Stored:
        """The logits with their leading 1."""
        assert index == 0
        return self._outputs
