"""``IntervalSession``: exact bounds of every activation over boxes, without building the twin.

The kernels propagate both ends of every activation through the graph itself. What they compute is
what ``twin`` computes, element by element: for a linear layer each bound is a sum of one end or the
other of each input, requantized as any accumulator is. A twin has four times the weights, half of
them zeros; here each weight is read once.

Logits of int16 or int32 are the reference executor's, on a twin of their layer alone; so are all
bounds of models with int16 activations, see ``reference_bounds``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cactus_edge import profiles
from cactus_edge.certify import reference_bounds
from cactus_edge.certify.twin import Twin, twin
from cactus_edge.constraints import validate
from cactus_edge.errors import DataError, UsageError
from cactus_edge.execute import check_input, run_operator
from cactus_edge.fusion import fuse
from cactus_edge.graph import DType, Graph, Int64Array, Operator, Reshape
from cactus_edge.kernels.batches import available_threads, block_of, pieces
from cactus_edge.kernels.intervals.walk import IntervalWorker, build_intervals, interval_walker
from cactus_edge.kernels.place import core_tensors, image_bytes
from cactus_edge.kernels.simd.tiers import Tier, choose

Box = tuple[Int64Array, Int64Array]
_Ends = npt.NDArray[np.generic]
_Bytes = npt.NDArray[np.uint8]
_BLOCK = 32
"""Boxes that the reference executor takes together; it bounds memory and changes nothing else."""


class IntervalSession:
    """A loaded graph. Sessions are thread-safe; their results are the caller's own."""

    def __init__(
        self,
        graph: Graph,
        *,
        tensors: Sequence[int] | None = None,
        threads: int | None = None,
        tier: str | None = None,
    ) -> None:
        """Validate, compile and pack.

        Args:
            graph: resolved.
            tensors: integer activations whose bounds ``run`` returns; the logits if None.
            threads: as many as the process may use if None.
            tier: name of the CPU's instructions to use, see ``kernels.simd.tiers``; the fastest
                that it has if None.

        Raises:
            InvalidGraphError: the graph breaks a constraint.
            UsageError: the graph is not resolved, a tensor is no integer activation, less than one
                thread, or a tier that the CPU lacks.
        """
        validate(graph)
        if not profiles.is_resolved(graph):
            raise UsageError("bounds depend on the rounding; resolve the graph under a profile")
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads; give at least 1")
        self.tensors = (graph.logits,) if tensors is None else tuple(tensors)
        unknown = sorted(set(self.tensors) - set(core_tensors(graph)))
        if unknown:
            raise UsageError(f"tensors {unknown} are no integer activations of this graph")
        self.threads = threads or available_threads()
        self.tier = choose(tier)
        self._exact = graph.computes_int16
        if self._exact:
            self.graph = graph
            return
        wide = [op for op in graph.core if graph.tensors[op.output].dtype.is_wide]
        self._heads = [_Head.of(graph, op) for op in wide]
        self.graph = graph
        narrow = replace(graph, operators=tuple(op for op in graph.operators if op not in wide))
        if self.tier is not Tier.PLAIN:
            narrow = fuse(narrow)
        needed = [*self.tensors, *(head.source for head in self._heads)]
        needed = [t for t in dict.fromkeys(needed) if not graph.tensors[t].dtype.is_wide]
        block = block_of(2 * image_bytes(narrow))
        self._program = build_intervals(narrow, needed, block, self.tier)
        interval_walker(self.tier)
        self._free: list[IntervalWorker] = []

    def run(self, lower: _Ends, upper: _Ends) -> dict[int, Box]:
        """Bounds of the tensors that were asked for.

        Args:
            lower: stored integers [boxes, *input shape without the leading 1], the lower ends; of
                the input's own type they need no conversion.
            upper: likewise, the upper ends.

        Returns:
            by tensor index: (lower, upper), each int64 [boxes, elements].

        Raises:
            DataError: not integers, another shape, values outside the input's type, or an empty
                box.
        """
        if lower.shape != upper.shape:
            raise DataError("the ends of the boxes differ in number")
        count = len(lower)
        if self._exact:
            return self._executed(lower, upper)
        results = np.empty((2, count, self._program.result_bytes), np.uint8)

        def compute(part: slice) -> None:
            ends = self._stored(lower[part]), self._stored(upper[part])
            if (ends[0] > ends[1]).any():
                raise DataError("a box is empty: a lower end lies above an upper end")
            try:
                worker = self._free.pop()
            except IndexError:
                worker = IntervalWorker(self._program)
            worker.run(*(end.view(np.uint8) for end in ends), *results[:, part])
            self._free.append(worker)

        parts = pieces(count, self._program.block, self.threads)
        if len(parts) < 2 or self.threads < 2:
            for part in parts:
                compute(part)
        else:
            with ThreadPoolExecutor(min(self.threads, len(parts))) as executor:
                for _ in executor.map(compute, parts):
                    pass
        bounds = {tensor: self._result(results, tensor) for tensor in self._program.results}
        for head in self._heads:
            bounds[head.output] = head.bounds(*bounds[head.source])
        return {tensor: bounds[tensor] for tensor in self.tensors}

    def _executed(self, lower: _Ends, upper: _Ends) -> dict[int, Box]:
        """What the reference executor bounds, some boxes at a time."""
        low, high = (check_input(self.graph, end) for end in (lower, upper))
        if (low > high).any():
            raise DataError("a box is empty: a lower end lies above an upper end")
        parts = [
            reference_bounds.bounds(
                self.graph, low[begin : begin + _BLOCK], high[begin : begin + _BLOCK]
            )
            for begin in range(0, max(len(low), 1), _BLOCK)
        ]
        found: dict[int, Box] = {}
        for tensor in self.tensors:
            flat = [[end.reshape(len(end), -1) for end in part[tensor]] for part in parts]
            found[tensor] = (
                np.concatenate([ends[0] for ends in flat]),
                np.concatenate([ends[1] for ends in flat]),
            )
        return found

    def _stored(self, ends: _Ends) -> npt.NDArray[np.int8 | np.uint8]:
        """Contiguous [boxes, input bytes] of the input's type, checked."""
        tensor = self.graph.tensors[self.graph.core_input]
        dtype = np.int8 if tensor.dtype is DType.INT8 else np.uint8
        if ends.dtype != dtype or ends.shape[1:] != tensor.shape[1:]:
            ends = check_input(self.graph, ends)
        flat = ends.astype(dtype, order="C", copy=False)
        return flat.reshape(len(flat), -1)

    def _result(self, results: _Bytes, tensor: int) -> Box:
        begin = self._program.results[tensor]
        form = self.graph.tensors[tensor]
        dtype = np.int8 if form.dtype is DType.INT8 else np.uint8
        lower, upper = results[:, :, begin : begin + form.size].view(dtype).astype(np.int64)
        return lower, upper


@dataclass(frozen=True, eq=False)
class _Head:
    """An operator whose output is wider than a byte; ``layer`` is its twin, None for a RESHAPE."""

    source: int
    output: int
    layer: Twin | None

    @staticmethod
    def of(graph: Graph, op: Operator) -> _Head:
        """Of a resolved graph."""
        alone = Graph(graph.tensors, (op,), op.inputs[0], op.output)
        return _Head(op.inputs[0], op.output, None if isinstance(op, Reshape) else twin(alone))

    def bounds(self, lower: Int64Array, upper: Int64Array) -> Box:
        """Bounds of the output from those of the source, int64 [boxes, elements]."""
        if self.layer is None:
            return lower, upper
        graph = self.layer.graph
        values = run_operator(graph, graph.operators[0], [self.layer.stack(lower, upper)])
        return self.layer.split(self.output, values)
