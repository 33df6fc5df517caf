"""``Session``: a graph on the compiled kernels, equal to ``execute`` on every element.

Loading validates the graph, compiles the kernels (or reads them from Numba's cache) and packs the
weights. A single image runs on one thread; a batch is cut into pieces, which threads take in turn.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from cactus_edge import profiles
from cactus_edge.constraints import validate
from cactus_edge.errors import UsageError
from cactus_edge.execute import check_input
from cactus_edge.graph import DType, Graph
from cactus_edge.kernels.pack import Layout
from cactus_edge.kernels.place import core_tensors, image_bytes
from cactus_edge.kernels.program import Program, build
from cactus_edge.kernels.rows import Workspace
from cactus_edge.kernels.walk import walk

_log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
"""A block of images is made as large as this many bytes of activations allow."""
_LARGEST_BLOCK = 64
_PIECE_BLOCKS = 4
"""Blocks that a thread takes at a time."""

IntegerArray = npt.NDArray[np.generic]
Stored = npt.NDArray[np.int8 | np.uint8]


class Session:
    """A loaded graph. Sessions are thread-safe; their results are the caller's own."""

    def __init__(
        self,
        graph: Graph,
        profile: str = profiles.DEFAULT,
        *,
        tensors: Sequence[int] | None = None,
        layout: str = Layout.AUTO,
        threads: int | None = None,
    ) -> None:
        """Validate, compile and pack.

        Args:
            graph: resolved, or else resolved here under ``profile``.
            profile: name of a rounding profile, ignored by operators that are resolved already.
            tensors: integer activations that ``run_tensors`` returns; the logits if None.
            layout: "dense" or "sparse" forces the layout of all convolutions and fully connected
                layers, "auto" chooses the faster one for each.
            threads: for batches; as many as the process may use if None.

        Raises:
            InvalidGraphError: the graph breaks a constraint.
            UsageError: an unknown profile or layout, a tensor that is no integer activation, or
                less than one thread.
        """
        validate(graph)
        self.graph = profiles.resolve(graph, profile)
        validate(self.graph)
        if layout not in set(Layout):
            raise UsageError(f"no layout '{layout}'; known: {', '.join(Layout)}")
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads; give at least 1")
        self.layout = Layout(layout)
        self.threads = threads or _available_threads()
        self.tensors = (self.graph.logits,) if tensors is None else tuple(tensors)
        _check_tensors(self.graph, self.tensors)
        source = self.graph.tensors[self.graph.core_input]
        self._input_type = _stored_type(source.dtype)
        self._input_shape = source.shape[1:]
        self._input_size = source.size
        self._single = _Runner(self._program(1))
        self._batch: _Runner | None = None
        _compile(self._single)

    def run(self, batch: npt.ArrayLike) -> Stored:
        """Logits of a batch of stored integers.

        Args:
            batch: integers [samples, *shape of the graph's integer input without the leading 1].

        Returns:
            int8 or uint8, as the logits are stored, [samples, *shape without the leading 1].

        Raises:
            DataError: not integers, another shape, or values outside the input's type.
        """
        return self._run(batch, (self.graph.logits,))[self.graph.logits]

    def run_tensors(self, batch: npt.ArrayLike) -> dict[int, Stored]:
        """The activations that were asked for, by tensor index, each like the result of ``run``."""
        return self._run(batch, self.tensors)

    def _run(self, batch: npt.ArrayLike, wanted: Iterable[int]) -> dict[int, Stored]:
        array = np.asarray(batch)
        if array.shape[1:] != self._input_shape or array.ndim == 0:
            check_input(self.graph, array)
        count = len(array)
        runner = self._single if count < 2 else self._batched()
        results = np.empty((count, runner.program.result_bytes), np.uint8)
        piece = runner.program.block * _PIECE_BLOCKS
        if count <= runner.program.block or self.threads == 1:
            for part in _parts(count, piece):
                runner.run(self._bytes(array[part]), results[part])
        else:
            workers = min(self.threads, -(-count // runner.program.block))
            piece = min(piece, -(-count // workers))
            with ThreadPoolExecutor(workers) as pool:
                tasks = [
                    pool.submit(lambda p=part: runner.run(self._bytes(array[p]), results[p]))
                    for part in _parts(count, piece)
                ]
                for task in tasks:
                    task.result()
        return {tensor: self._result(runner.program, results, tensor) for tensor in wanted}

    def _bytes(self, part: IntegerArray) -> npt.NDArray[np.uint8]:
        """Read-only uint8 [samples, input bytes] of a part of the batch, checked."""
        if part.dtype != self._input_type:
            part = check_input(self.graph, part).astype(self._input_type)
        flat = np.ascontiguousarray(part).view(np.uint8).reshape(len(part), self._input_size)
        flat = flat.view()
        flat.flags.writeable = False
        return flat

    def _result(self, program: Program, results: npt.NDArray[np.uint8], tensor: int) -> Stored:
        shape = self.graph.tensors[tensor].shape[1:]
        begin = program.results[tensor]
        values = results[:, begin : begin + self.graph.tensors[tensor].size]
        return values.view(_stored_type(self.graph.tensors[tensor].dtype)).reshape(-1, *shape)

    def _program(self, block: int) -> Program:
        wanted = dict.fromkeys((*self.tensors, self.graph.logits))
        return build(self.graph, list(wanted), block, self.layout)

    def _batched(self) -> _Runner:
        if self._batch is None:
            block = _BLOCK_BYTES // image_bytes(self.graph)
            self._batch = _Runner(self._program(max(4, min(_LARGEST_BLOCK, block))))
        return self._batch


class _Runner:
    """A program and the workspaces that no thread is using."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._free: list[Workspace] = []

    def run(self, batch: npt.NDArray[np.uint8], results: npt.NDArray[np.uint8]) -> None:
        with self._workspace() as work:
            walk(self.program.steps, self.program.tables, work, batch, results, self.program.block)

    @contextmanager
    def _workspace(self) -> Generator[Workspace]:
        try:
            work = self._free.pop()
        except IndexError:
            work = self.program.workspace()
        yield work
        self._free.append(work)


def _compile(runner: _Runner) -> None:
    """Run no image, which makes Numba compile the kernels or load them from its cache."""
    begin = time.perf_counter()
    batch = np.empty((0, 1), np.uint8)
    batch.flags.writeable = False
    runner.run(batch, np.empty((0, 1), np.uint8))
    _log.debug("kernels ready after %.3f s", time.perf_counter() - begin)


def _available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parts(count: int, size: int) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def _check_tensors(graph: Graph, tensors: Sequence[int]) -> None:
    known = core_tensors(graph)
    for tensor in tensors:
        if tensor not in known:
            raise UsageError(
                f"tensor {tensor} is no integer activation of this graph; known: "
                + ", ".join(f"{index} '{graph.tensors[index].name}'" for index in known)
            )


def _stored_type(dtype: DType) -> type[np.int8] | type[np.uint8]:
    return np.int8 if dtype is DType.INT8 else np.uint8
