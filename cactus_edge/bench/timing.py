"""The protocol: contenders take turns in one process, so that a slow phase meets all of them.

*Warm*: rounds of a few counted calls after calls that are not counted, so that weights lie in the
caches that hold them. *Cold*: before each counted call a buffer larger than every cache is written.
*Throughput*: turns of a whole batch. What is compared are ratios within a round; the median over
rounds is reported with its quartiles.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Call = Callable[[Array], object]
FloatArray = npt.NDArray[np.float64]

CALLS = 20
"""Counted calls of one turn."""
_WARM_CALLS = 3


@dataclass(frozen=True)
class Contender:
    """A runtime that is ready to compute: single images as it takes them, and a batch of them."""

    call: Call
    images: Sequence[Array]
    batch_call: Call
    batch: Array


@dataclass(frozen=True)
class Samples:
    """Microseconds [rounds, calls] of one contender."""

    values: FloatArray

    @property
    def median(self) -> float:
        """Of all calls."""
        return float(np.median(self.values))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of all calls."""
        lower, upper = np.percentile(self.values, (25, 75))
        return float(lower), float(upper)

    def ratios(self, other: Samples) -> FloatArray:
        """This median over the other's, in each round."""
        return np.median(self.values, axis=1) / np.median(other.values, axis=1)


def warm(contenders: Sequence[Contender], rounds: int, pause: float = 0.0) -> list[Samples]:
    """Single images, again and again; ``pause`` in seconds before each turn."""
    calls = CALLS
    taken = [np.empty((rounds, calls)) for _ in contenders]
    with undisturbed():
        for turn in range(rounds):
            for contender, values in zip(contenders, taken, strict=True):
                call, images = contender.call, contender.images
                time.sleep(pause)
                for i in range(_WARM_CALLS):
                    call(images[i % len(images)])
                for i in range(calls):
                    image = images[i % len(images)]
                    begin = time.perf_counter_ns()
                    call(image)
                    values[turn, i] = time.perf_counter_ns() - begin
    return [Samples(values / 1000) for values in taken]


def cold(
    contenders: Sequence[Contender], rounds: int, cache_bytes: int, pause: float = 0.0
) -> list[Samples]:
    """Single images, each after ``cache_bytes`` of other memory were written."""
    taken = [np.empty((rounds, 1)) for _ in contenders]
    other = np.zeros(cache_bytes // 8, np.int64)
    with undisturbed():
        for turn in range(rounds):
            for contender, values in zip(contenders, taken, strict=True):
                image = contender.images[turn % len(contender.images)]
                time.sleep(pause)
                other += 1
                begin = time.perf_counter_ns()
                contender.call(image)
                values[turn, 0] = time.perf_counter_ns() - begin
    return [Samples(values / 1000) for values in taken]


def throughput(contenders: Sequence[Contender], rounds: int, pause: float = 0.0) -> list[Samples]:
    """Microseconds for each image of the batch, once in a turn; the first turn is not counted."""
    taken = [np.empty((rounds, 1)) for _ in contenders]
    with undisturbed():
        for turn in range(-1, rounds):
            for contender, values in zip(contenders, taken, strict=True):
                time.sleep(pause)
                begin = time.perf_counter_ns()
                contender.batch_call(contender.batch)
                if turn >= 0:
                    values[turn, 0] = (time.perf_counter_ns() - begin) / len(contender.batch)
    return [Samples(values / 1000) for values in taken]


@contextmanager
def undisturbed() -> Generator[None]:
    """Without Python's search for garbage."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
