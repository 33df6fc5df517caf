"""Who lies where in the arena, operator by operator.

One plan for plain inference, where a tensor is a buffer and the caller's input and output are not
in the arena; one for bounds, where both ends of every tensor are, the input's box included. A
RESHAPE shares its input's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cactus_edge.csource.planner import Buffer, aligned, plan
from cactus_edge.graph import Graph, Operator, Reshape


@dataclass(frozen=True)
class Memory:
    """``places`` and ``scratch``: C expressions, by tensor and by operator.

    ``live``: bytes that are alive at each operator; no plan needs less than the greatest of them.
    """

    places: Mapping[int, str]
    scratch: Mapping[int, str]
    arena_bytes: int
    live: tuple[int, ...]

    @property
    def lower_bound(self) -> int:
        """The least arena that any planner could reach for these buffers."""
        return max(self.live, default=0)


def plan_run(graph: Graph, scratch: Mapping[int, int]) -> Memory:
    """Plain inference; ``scratch`` are bytes by operator."""
    places = {graph.core_input: "input", graph.logits: "output"}

    def shares(op: Operator) -> bool:
        return isinstance(op, Reshape) and op.output != graph.logits

    return _plan(graph, scratch, shares, places, lambda tensor: graph.tensors[tensor].size)


def plan_bounds(graph: Graph, scratch: Mapping[int, int], sizes: Mapping[int, int]) -> Memory:
    """Both ends of every tensor; ``sizes`` are bytes of tensors that are something else."""

    def size(tensor: int) -> int:
        return sizes.get(tensor, 2 * aligned(graph.tensors[tensor].size))

    return _plan(graph, scratch, lambda op: isinstance(op, Reshape), {}, size)


def _plan(
    graph: Graph,
    scratch: Mapping[int, int],
    shares: Callable[[Operator], bool],
    given: Mapping[int, str],
    size: Callable[[int], int],
) -> Memory:
    roots = {graph.core_input: graph.core_input}
    for op in graph.core:
        roots[op.output] = roots[op.inputs[0]] if shares(op) else op.output
    lifetimes: dict[int, Buffer] = {}
    for index, op in enumerate(graph.core):
        for tensor in (*op.inputs, op.output):
            root = roots[tensor]
            first = lifetimes[root].first if root in lifetimes else index
            lifetimes[root] = Buffer(size(root), first, index)
    planned = [root for root in lifetimes if root not in given]
    patches = [index for index, needed in scratch.items() if needed]
    buffers = [lifetimes[root] for root in planned]
    buffers += [Buffer(scratch[index], index, index) for index in patches]
    offsets, total = plan(buffers)
    where = [f"memory + {offset}" for offset in offsets]
    places = {**given, **dict(zip(planned, where[: len(planned)], strict=True))}
    return Memory(
        {tensor: places[root] for tensor, root in roots.items()},
        dict(zip(patches, where[len(planned) :], strict=True)),
        total,
        tuple(_live(buffers, index) for index in range(len(graph.core))),
    )


def _live(buffers: Sequence[Buffer], moment: int) -> int:
    return sum(b.size for b in buffers if b.first <= moment <= b.last)
