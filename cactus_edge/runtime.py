"""``Session``: a graph on the compiled kernels, equal to ``execute`` on every element.

Loading validates the graph, compiles the kernels (or reads them from Numba's cache) and packs the
weights, without channels on which no result depends. A single image runs on one thread; a batch is
cut into pieces, which threads take in turn.

Kernels store bytes. Logits of int16 or int32 are computed by ``execute`` from the activations that
the kernels leave, and models with int16 activations by ``execute`` alone, so they equal it by
construction.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cactus_edge import profiles
from cactus_edge.compact import compact
from cactus_edge.constraints import validate
from cactus_edge.errors import DataError, UsageError, meant
from cactus_edge.execute import check_input, execute_all, run_operator
from cactus_edge.fusion import fuse
from cactus_edge.graph import DType, Graph, Int64Array, Operator, Tensor
from cactus_edge.kernels.batches import available_threads, block_of, pieces
from cactus_edge.kernels.choose import fastest
from cactus_edge.kernels.demand import Layout
from cactus_edge.kernels.explain import Explanation, explain
from cactus_edge.kernels.place import core_tensors, image_bytes
from cactus_edge.kernels.program import Program, build
from cactus_edge.kernels.replay import chosen_samples
from cactus_edge.kernels.simd.tiers import Tier, choose
from cactus_edge.kernels.threads import ParallelWorker
from cactus_edge.kernels.walk import Worker, walker

__all__ = ["Session"]

_log = logging.getLogger(__name__)

IntegerArray = npt.NDArray[np.generic]
Stored = npt.NDArray[np.int8 | np.uint8 | np.int16 | np.int32]
_EXACT_BLOCK = 32
"""Samples that the reference executor takes together; it bounds memory and changes nothing else."""
_Stage = tuple["Worker | ParallelWorker", npt.NDArray[np.generic], Stored]
"""A worker, and views of its memory with the types and shapes of the graph."""
StoredType = type[np.int8] | type[np.uint8] | type[np.int16] | type[np.int32]

_STORED: dict[DType, StoredType] = {
    DType.INT8: np.int8,
    DType.UINT8: np.uint8,
    DType.INT16: np.int16,
    DType.INT32: np.int32,
}


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
        tier: str | None = None,
        whole: bool = False,
        calibration: npt.ArrayLike | None = None,
    ) -> None:
        """Validate, compile and pack.

        Args:
            graph: resolved, or else resolved here under ``profile``.
            profile: name of a rounding profile, ignored by operators that are resolved already.
            tensors: integer activations that ``run_tensors`` returns; the logits if None.
            layout: "dense", "sparse", "blocks", "bitmask" or "skipping" forces the layout of all
                convolutions and fully connected layers that have it, "auto" measures the fastest
                for each.
            threads: that share a batch, or a single image if it is large enough. If None, as many
                as the process may use for batches, and one for an image.
            tier: name of the CPU's instructions to use, see ``kernels.simd.tiers``; the fastest
                that it has if None.
            whole: compute the shipped weights as they are, channels included on which nothing that
                is asked for depends; for the certifier.
            calibration: stored integers, as ``run`` takes them, like those that will come. With
                some, kernels that skip inputs at the zero point are timed on them and chosen where
                they are faster on one image. They never change a result.

        Raises:
            InvalidGraphError: the graph breaks a constraint.
            DataError: ``calibration`` is no batch that ``run`` would take, or has no sample.
            UsageError: an unknown profile or layout, a tensor that is no integer activation, or
                less than one thread, or a tier that the CPU lacks.
        """
        validate(graph)
        self.tier = choose(tier)
        self.graph = profiles.resolve(graph, profile)
        validate(self.graph)
        if layout not in set(Layout):
            raise UsageError(
                f"no layout '{layout}'{meant(layout, Layout)} known: {', '.join(Layout)}"
            )
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads; give at least 1")
        self.layout = Layout(layout)
        self.threads = threads or available_threads()
        self._together = threads or 1
        self.tensors = (self.graph.logits,) if tensors is None else tuple(tensors)
        _check_tensors(self.graph, self.tensors)
        source = self.graph.tensors[self.graph.core_input]
        self._input_type = _STORED[source.dtype]
        self._input_shape = source.shape[1:]
        self._one = (1, *self._input_shape)
        self._native = np.dtype(self._input_type)  # one object for the type, in every array of it
        self._exact = self.graph.computes_int16
        if self._exact:
            if calibration is not None:
                self._fitting(calibration)
            return
        self._narrow, self._wide = _divide(self.graph)
        self._image_bytes = source.size
        self._samples = None if calibration is None else self._calibrated(calibration)
        self._needed = _needed(self.graph, self._wide, (*self.tensors, self.graph.logits))
        self._packed = self._narrow if whole else _divide(compact(self.graph, self._needed))[0]
        if self.tier is not Tier.PLAIN:
            self._packed = fuse(self._packed)
        self._forms = {t: _form(self.graph.tensors[t]) for t in self._needed}
        _prepare(self.tier)
        self._single = _Pool(self._program(1))
        self._batch: _Pool | None = None
        self._stages: list[_Stage] = []

    @property
    def program(self) -> Program:
        """How a single image is computed; batches have a program of their own.

        Raises:
            UsageError: the model has int16 activations, for which there are no kernels.
        """
        self._require_kernels()
        return self._single.program

    def explain(
        self, *, batch: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> list[Explanation]:
        """What each layer runs as and how long it takes, for one image or in batches.

        ``progress`` is called with (layers done, layers in all).

        Raises:
            UsageError: see ``program``.
        """
        self._require_kernels()
        program = self._batched().program if batch else self.program
        return explain(self._narrow, program, None if batch else self._samples, progress)

    def run(self, batch: npt.ArrayLike) -> Stored:
        """Logits of a batch of stored integers.

        Args:
            batch: integers [samples, *shape of the graph's integer input without the leading 1].

        Returns:
            integers of the logits' type, [samples, *shape without the leading 1].

        Raises:
            DataError: not integers, another shape, or values outside the input's type.
        """
        if (
            type(batch) is np.ndarray
            and batch.shape == self._one
            and batch.dtype is self._native
            and not self._exact
            and not self._wide
        ):
            return self._run_one(batch)
        return self._run(batch, (self.graph.logits,))[self.graph.logits]

    def run_tensors(self, batch: npt.ArrayLike) -> dict[int, Stored]:
        """The activations that were asked for, by tensor index, each like the result of ``run``."""
        return self._run(batch, self.tensors)

    def _require_kernels(self) -> None:
        if self._exact:
            raise UsageError("int16 activations run on the reference executor; no kernel has them")

    def _executed(self, batch: npt.ArrayLike, wanted: Iterable[int]) -> dict[int, Stored]:
        """What the reference executor computes, some samples at a time."""
        array = check_input(self.graph, batch)
        found: dict[int, list[Stored]] = {tensor: [] for tensor in wanted}
        for start in range(0, max(len(array), 1), _EXACT_BLOCK):
            values = execute_all(self.graph, array[start : start + _EXACT_BLOCK])
            for tensor, parts in found.items():
                dtype = _STORED[self.graph.tensors[tensor].dtype]
                parts.append(values[tensor].astype(dtype))
        return {tensor: np.concatenate(parts) for tensor, parts in found.items()}

    def _run(self, batch: npt.ArrayLike, wanted: Iterable[int]) -> dict[int, Stored]:
        if self._exact:
            return self._executed(batch, wanted)
        if not self._wide:
            return self._compute(batch, wanted)
        values = self._compute(batch, self._needed)
        exact: dict[int, Int64Array] = {t: v.astype(np.int64) for t, v in values.items()}
        for op in self._wide:
            exact[op.output] = run_operator(self.graph, op, [exact[op.inputs[0]]])
            values[op.output] = exact[op.output].astype(
                _STORED[self.graph.tensors[op.output].dtype]
            )
        return {tensor: values[tensor] for tensor in wanted}

    def _compute(self, batch: npt.ArrayLike, wanted: Iterable[int]) -> dict[int, Stored]:
        """What the kernels compute."""
        array = self._fitting(batch)
        if len(array) == 1:
            return self._run_single(array, wanted)
        pool = self._batched()
        results = np.empty((len(array), pool.program.result_bytes), np.uint8)

        def compute(part: slice) -> None:
            worker = pool.take()
            worker.run(self._bytes(array[part]), results[part])
            pool.give_back(worker)

        parts = pieces(len(array), pool.program.block, self.threads)
        if len(parts) < 2 or self.threads < 2:
            for part in parts:
                compute(part)
        else:
            with ThreadPoolExecutor(min(self.threads, len(parts))) as executor:
                for _ in executor.map(compute, parts):
                    pass
        return {tensor: self._result(pool.program, results, tensor) for tensor in wanted}

    def _fitting(self, batch: npt.ArrayLike) -> npt.NDArray[np.generic]:
        """The batch as an array of integers of the right shape; values are not looked at."""
        array = np.asarray(batch)
        fits = array.ndim > 0 and array.shape[1:] == self._input_shape
        if not fits or array.dtype.kind not in "iu":
            check_input(self.graph, array)
        return array

    def _calibrated(self, calibration: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Some of the samples, uint8 [samples, input bytes]."""
        array = self._fitting(calibration)
        if not len(array):
            raise DataError("calibration holds no sample; give at least one")
        if array.dtype != self._input_type:
            check_input(self.graph, array)
        return self._bytes(array[chosen_samples(len(array))])

    def _run_one(self, image: npt.NDArray[np.generic]) -> Stored:
        """Logits of a single image that is known to fit; what ``run`` does, with less ado."""
        try:
            stage = self._stages.pop()
        except IndexError:
            stage = self._stage()
        worker, source, logits = stage
        source[...] = image
        worker.run_staged(1)
        result = logits.copy()
        self._stages.append(stage)
        return result

    def _stage(self) -> _Stage:
        """A worker, and views of its memory that have the types and shapes of the graph."""
        worker: Worker | ParallelWorker
        if self._together > 1:
            image = None if self._samples is None else self._samples[0]
            worker = ParallelWorker(self.program, self._together, image=image)
            self._together = 1  # whoever comes while that one works takes a thread of its own
        else:
            worker = self._single.take()
        source = worker.images.view(self._input_type).reshape(self._one)
        return worker, source, self._result(worker.program, worker.results, self.graph.logits)

    def _run_single(
        self, array: npt.NDArray[np.generic], wanted: Iterable[int]
    ) -> dict[int, Stored]:
        image = self._bytes(array)
        worker = self._single.take()
        worker.images[:] = image
        worker.run_staged(1)
        results = worker.results.copy()
        self._single.give_back(worker)
        return {tensor: self._result(self._single.program, results, tensor) for tensor in wanted}

    def _bytes(self, part: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
        """Contiguous uint8 [samples, input bytes] of a part of the batch, checked."""
        if part.dtype != self._input_type:
            part = check_input(self.graph, part).astype(self._input_type)
        flat = np.ascontiguousarray(part).reshape(len(part), self._image_bytes)
        return flat.view(np.uint8)

    def _result(self, program: Program, results: npt.NDArray[np.uint8], tensor: int) -> Stored:
        begin = program.results[tensor]
        dtype, size, shape = self._forms[tensor]
        return results[:, begin : begin + size].view(dtype).reshape(-1, *shape)

    def _program(self, block: int) -> Program:
        layout = self.layout
        if layout is Layout.AUTO and self.tier is not Tier.PLAIN:
            samples = self._samples if block == 1 else None
            layout = fastest(self._packed, self._needed, block, self.tier, samples)
        return build(self._packed, self._needed, block, layout, self.tier)

    def _batched(self) -> _Pool:
        if self._batch is None:
            self._batch = _Pool(self._program(block_of(image_bytes(self._packed))))
        return self._batch


class _Pool:
    """A program and those of its workers that no thread is using."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._free: list[Worker] = []

    def take(self) -> Worker:
        """A worker that is the caller's alone until it is given back."""
        try:
            return self._free.pop()
        except IndexError:
            return Worker(self.program)

    def give_back(self, worker: Worker) -> None:
        """Keep a worker for the next one who takes."""
        self._free.append(worker)


def _prepare(tier: Tier) -> None:
    begin = time.perf_counter()
    walker(tier)
    _log.debug("kernels ready after %.3f s", time.perf_counter() - begin)


def _check_tensors(graph: Graph, tensors: Sequence[int]) -> None:
    known = core_tensors(graph)
    for tensor in tensors:
        if tensor not in known:
            raise UsageError(
                f"tensor {tensor} is no integer activation of this graph; known: "
                + ", ".join(f"{index} '{graph.tensors[index].name}'" for index in known)
            )


def _divide(graph: Graph) -> tuple[Graph, tuple[Operator, ...]]:
    """The graph that the kernels run, and the operators whose output is wider than a byte."""
    wide = tuple(op for op in graph.core if graph.tensors[op.output].dtype.is_wide)
    rest = tuple(op for op in graph.operators if op not in wide)
    return replace(graph, operators=rest) if wide else graph, wide


def _needed(graph: Graph, wide: Sequence[Operator], tensors: Iterable[int]) -> list[int]:
    """The tensors that the kernels have to give back."""
    sources = [op.inputs[0] for op in wide]
    return [t for t in dict.fromkeys((*tensors, *sources)) if not graph.tensors[t].dtype.is_wide]


def _form(tensor: Tensor) -> tuple[StoredType, int, tuple[int, ...]]:
    """Type, size and shape of a sample."""
    return _STORED[tensor.dtype], tensor.size, tensor.shape[1:]
