"""``ParallelWorker``: a single image on several threads.

Helpers are Python threads inside a compiled function that holds no lock of the interpreter. They
look for work without pause for ``_SPIN`` after the last one, because to wake a thread takes as long
as a small network; then they sleep until the next call. What they share and how is in ``team``.

A network whose steps are too short to be divided stays on one thread.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels import team as words
from cactus_edge.kernels.program import Program
from cactus_edge.kernels.rows import Workspace
from cactus_edge.kernels.steps import (
    ADD,
    AVERAGE,
    COPY,
    DEPTHWISE_TILE,
    LOAD,
    LOOKUP,
    MAXIMUM,
    PAIR,
    STORE,
)
from cactus_edge.kernels.walk import Frame, check_batch

_log = logging.getLogger(__name__)

GRAIN = 1.5e-6
"""Seconds of one thread's work that are worth a part of their own."""
_CHUNKS = 4
"""Parts for each thread, so that one that is held up leaves some of its own to the others."""
_SMALLEST = 1e-5
"""Seconds of a run that is not worth dividing."""
_DOUBTFUL = 1e-4
_LEAST_GAIN = 0.2
"""Runs shorter than ``_DOUBTFUL`` seconds have to be shorter by this share with helpers."""
_SPIN = 5e-4
_POLLS = 1 << 12
_REPEATS = 5
_TRIALS = 20
_LEAST_REST, _LONGEST_REST = 8, 1024
"""Runs that the leader makes alone after helpers were of no use."""
_INDIVISIBLE = (COPY, LOAD, LOOKUP, PAIR, STORE)


class ParallelWorker:
    """A program with the memory of several threads; like ``walk.Worker`` for a single caller.

    ``threads`` says how many take part: 1 where the network is too small. After a fork the child
    computes alone.
    """

    def __init__(
        self,
        program: Program,
        threads: int,
        *,
        grain: float = GRAIN,
        image: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Measure the steps, cut them, and start the threads.

        Args:
            program: what is run.
            threads: the caller's included.
            grain: seconds that a part of a step should take at least; with 0 all that can be
                divided is, whatever the size.
            image: uint8 [bytes of an image], a sample to measure on; zeros if None.
        """
        self.program = program
        self.images = np.zeros((program.block, program.image_bytes), np.uint8)
        self.results = np.zeros((program.block, program.result_bytes), np.uint8)
        if image is not None:
            self.images[:] = image
        self._staging = (self.images.ctypes.data, self.results.ctypes.data)
        work = program.workspace()
        seconds = step_seconds(program, work, *self._staging)
        parts = divide(program, seconds, threads, grain)
        self._team = _Team(program, work, parts, threads if max(parts) > 1 else 1)
        self._team.start()
        if grain:
            self._team.judge(*self._staging)
        run = self._team.run if self._team.helpers else self._team.alone.run
        self.run_staged: Callable[[int], object] = partial(run, *self._staging)
        """Results of the first images, so many, of ``images`` to ``results``."""
        weakref.finalize(self, self._team.stop)

    @property
    def threads(self) -> int:
        """How many take part."""
        return 1 + len(self._team.helpers)

    def run(self, batch: npt.NDArray[np.uint8], results: npt.NDArray[np.uint8]) -> None:
        """Results of any number of images; both arrays are contiguous."""
        check_batch(self.program, batch, results)
        self._team.run(batch.ctypes.data, results.ctypes.data, len(batch))

    def close(self) -> None:
        """End the threads and wait for them; the worker goes on alone."""
        self._team.close()


def step_seconds(program: Program, work: Workspace, images: int, results: int) -> list[float]:
    """How long each step takes on this thread, for one image at an address."""
    none = _fastest(Frame(program, work, steps=program.steps[:0]), images, results)
    return [
        max(
            _fastest(Frame(program, work, steps=program.steps[i : i + 1]), images, results) - none,
            0,
        )
        for i in range(len(program.steps))
    ]


def _fastest(frame: Frame, images: int, results: int, repeats: int = _REPEATS) -> float:
    times: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        frame.run(images, results, 1)
        times.append(time.perf_counter() - begin)
    return min(times)


def divide(program: Program, seconds: Sequence[float], threads: int, grain: float) -> list[int]:
    """Into how many parts each step is cut; 1 for all if the whole is too short."""
    if grain and sum(seconds) < _SMALLEST:
        return [1] * len(seconds)
    return [
        min(_most_parts(step, program.block), _parts(duration, threads, grain))
        for step, duration in zip(program.steps, seconds, strict=True)
    ]


def _most_parts(step: np.void, block: int) -> int:
    """How many parts of a step have something to do: groups of channels, tiles or rows of images.

    What divides it so is ``vector_layer`` in ``simd.layers``, ``depthwise_tiles`` in
    ``simd.depthwise``, and the loops of other operators.
    """
    code, height, width = (int(step[name]) for name in ("opcode", "height", "width"))
    if code in _INDIVISIBLE:
        return 1
    if code in (ADD, AVERAGE, MAXIMUM):
        return block * height
    tiles = -(-block * height * width // max(int(step["tile"]), 1))
    if code == DEPTHWISE_TILE:
        return max(tiles, 1)
    return max(tiles, int(step["groups"]), 1)


def _parts(seconds: float, threads: int, grain: float) -> int:
    if not grain:
        return threads * _CHUNKS
    chunks = min(int(seconds / (grain * threads)), _CHUNKS)
    return max(1, chunks * threads if chunks else int(seconds / grain))


class _Team:
    """The threads of a worker; they know this object and not the worker, which can be collected."""

    def __init__(
        self, program: Program, work: Workspace, parts: Sequence[int], threads: int
    ) -> None:
        self._words = words.words(parts, threads)
        self._leader = Frame(program, work, self._words)
        self.alone = Frame(program, work)
        frames = [
            Frame(program, _beside(program, work), self._words, member)
            for member in range(1, threads)
        ]
        if frames:
            words.set_polls(self._words, _polls(frames[0], self._words))
        # A memoryview is read in a fraction of the time that an array takes.
        self.flags = memoryview(self._words)  # pyright: ignore[reportArgumentType]
        self.stopped = False
        self.helpers = [_Helper(self, frame, i + 1) for i, frame in enumerate(frames)]
        self._seconds = float("inf")
        self._rest, self._next_rest = 0, _LEAST_REST

    def start(self) -> None:
        """Start the helpers, or as many as the system allows."""
        try:
            for helper in self.helpers:
                helper.thread.start()
        except RuntimeError as error:
            _log.warning("fewer threads than asked for: %s", error)
            self.helpers = [helper for helper in self.helpers if helper.thread.is_alive()]
        if self.helpers:
            _teams.add(self)

    def judge(self, images: int, results: int) -> None:
        """Send the helpers away if they are of little use; remember how long a run takes alone.

        On a busy machine helpers look useless, so a long run keeps them: ``run`` will see.
        """
        if not self.helpers:
            return
        self._seconds = _fastest(self.alone, images, results, _TRIALS)
        for helper in self.helpers:
            helper.wake()
        together = _fastest(self._leader, images, results, _TRIALS)
        _log.debug("alone %.1f us, together %.1f us", 1e6 * self._seconds, 1e6 * together)
        if self._seconds < _DOUBTFUL and together > (1 - _LEAST_GAIN) * self._seconds:
            self.close()

    def run(self, batch: int, results: int, count: int) -> None:
        """Lead, unless runs take no less time with helpers, as where other programs run."""
        if not self.helpers or self._rest:
            self._rest = max(self._rest - 1, 0)
            self.alone.run(batch, results, count)
            return
        woken = [helper.wake() for helper in self.helpers]
        begin = time.perf_counter()
        self._leader.run(batch, results, count)
        if time.perf_counter() - begin < self._seconds * count:
            self._next_rest = _LEAST_REST
        elif not any(woken):
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)

    def stop(self) -> None:
        """Send the helpers away."""
        self.stopped = True
        if self.helpers:
            self.flags[words.GENERATION] = words.STOP
        for helper in self.helpers:
            helper.dismiss()

    def close(self) -> None:
        """Send the helpers away and wait until they are gone."""
        self.stop()
        for helper in self.helpers:
            helper.thread.join()
        self.forget()

    def forget(self) -> None:
        """Go on alone: there are no helpers any more."""
        self.helpers = []


class _Helper:
    """One thread, asleep while ``_lock`` is locked and the flag is 1."""

    def __init__(self, team: _Team, frame: Frame, member: int) -> None:
        self._team, self._frame = team, frame
        self._flag = words.parked(member)
        self._lock = threading.Lock()
        self._lock.acquire()
        self.thread = threading.Thread(target=self._help, name=f"cactus-edge-{member}", daemon=True)

    def wake(self) -> bool:
        """Wake the thread if it sleeps, and whether it did; only the leader calls this."""
        flags = self._team.flags
        if not flags[self._flag]:
            return False
        flags[self._flag] = 0
        self._lock.release()
        return True

    def dismiss(self) -> None:
        """Wake the thread whatever the flag says, so that it sees that the team is stopped."""
        if self._lock.locked():
            self._lock.release()

    def _help(self) -> None:
        while not self._team.stopped:
            self._frame.run(0, 0, 0)
            if not self._team.stopped:
                self._lock.acquire()


def _polls(helper: Frame, team: npt.NDArray[np.int64]) -> int:
    """How often a helper looks for work in ``_SPIN`` seconds, by doing it in vain."""
    words.set_polls(team, _POLLS)
    begin = time.perf_counter()
    helper.run(0, 0, 0)
    seconds = time.perf_counter() - begin
    team[words.parked(1)] = 0
    return max(1, int(_POLLS * _SPIN / seconds))


def _beside(program: Program, work: Workspace) -> Workspace:
    """Scratch memory for another thread that works on the same activations."""
    return program.workspace()._replace(activations=work.activations)


_teams: weakref.WeakSet[_Team] = weakref.WeakSet()


def _close_all() -> None:
    """No thread may be in compiled code when the interpreter takes it away."""
    for team in list(_teams):
        team.close()


def _forget_all() -> None:
    """A fork has this thread alone."""
    for team in list(_teams):
        team.forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
