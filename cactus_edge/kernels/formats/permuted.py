"""Gathering steps: unstructured sparse weights that are multiplied without their zeros.

::

    a step of a group of lanes * registers channels
      loads      64 bytes at the window's start + offset          one window: a single step
                 64 bytes at the window's start + another offset  two windows: a dual step
      indices    | channel 0: iiii | channel 1: iiii | ...   0..63 first window, 64..127 second
      weights    | channel 0: wwww | channel 1: wwww | ...   0 where a slot is not used

The loads are permuted by the indices, so that each channel has four of its own inputs, which a dot
product multiplies. All registers of a group share the loads. Windows begin anywhere and may
overlap; how they are chosen is told in ``windows``.

Channels are ordered by their number of weights, so that those of a group end together, and then
exchanged between groups while that saves steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cactus_edge.kernels.formats.layout import (
    LINE,
    ByteArray,
    Int8Array,
    Int32Array,
    Int64Array,
    Rows,
    closed,
    groups_of,
    nonzero_rows,
)
from cactus_edge.kernels.formats.windows import (
    ALL_RULES,
    FEW_RULES,
    ONE_WINDOW,
    SLOTS,
    Lists,
    Terms,
    exchange_channels,
    new_front,
    new_plan,
    plan_steps,
    write_steps,
)

EFFORT = 300_000
"""Steps of a lane that the search for better groups may try: some 5 ms."""

_MANY = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel's steps look like; the default is that of 512-bit registers.

    Attributes:
        lanes: channels of a register, four bytes each.
        registers: that share the loads of a step.
        window: bytes of a load that indices reach, a power of two.
        alignment: windows begin at multiples of it, as counted from a row's window; it divides
            ``window``. Loads that cross a cache line take longer, which two registers hide and one
            does not.
        dual: whether there are steps with two windows.
        single_cost: time of a step with one window; one with two takes 1. It steers the packer.
    """

    lanes: int = 16
    registers: int = 2
    window: int = LINE
    alignment: int = 1
    dual: bool = True
    single_cost: float = 0.72

    def __post_init__(self) -> None:
        """Refuse what indices of a byte cannot say."""
        assert self.window % self.alignment == 0
        assert self.window * (2 if self.dual else 1) <= 256

    @property
    def channels(self) -> int:
        """Output channels of a group."""
        return self.lanes * self.registers


@dataclass(frozen=True, eq=False)
class Permuted:
    """Packed weights.

    Attributes:
        shape: of the steps.
        counts: int32 [groups, 2], single and dual steps of each group.
        offsets: int32, bytes from the start of a row's window: for each group those of its single
            steps, then pairs for its dual steps.
        stream: uint8 [step][2][channel of the group][4], indices and weights: for each group its
            single steps, then its dual ones.
        order: int64 [channels], the channel of the layer at each packed position. Positions behind
            the last one, which fill up the last group, have no weights.
        fill: slots that hold a weight, of all.
        reach: bytes from the start of a window that a kernel reads.
    """

    shape: Shape
    counts: Int32Array
    offsets: Int32Array
    stream: ByteArray
    order: Int64Array
    fill: float
    reach: int

    @property
    def cost(self) -> float:
        """Time for a tile of rows, in dual steps."""
        singles, duals = self.counts.sum(axis=0).tolist()
        return self.shape.single_cost * singles + duals


def pack_permuted(
    matrix: Int8Array,
    offsets: Int64Array,
    shape: Shape,
    *,
    keep_order: bool = False,
    effort: int = EFFORT,
) -> Permuted:
    """Pack a matrix; the same one always gives the same result.

    Args:
        matrix: int8 [channels of the layer, inputs].
        offsets: int64 [inputs], ascending byte offsets from the window's start.
        shape: of the steps.
        keep_order: leave the channels in their order, which takes more steps.
        effort: steps of a lane that the search for better groups may try.

    Raises:
        UnsupportedModelError: the window is 2 GB long.
    """
    rows = nonzero_rows(matrix, offsets)
    channels = len(matrix)
    groups = groups_of(channels, shape.channels)
    order = _by_count(rows, channels, keep_order)
    # The channel behind the last one has no weights: it fills up the last group.
    lanes = np.full((groups, shape.channels), channels, np.int64)
    lanes.reshape(-1)[:channels] = order
    terms = Terms(shape.window, shape.alignment, shape.single_cost)
    rules = ALL_RULES if rows.values.size < _MANY else FEW_RULES
    if not shape.dual:
        rules = ONE_WINDOW
    lists = Lists(rows.starts, rows.positions, rows.values)
    front = new_front(shape.channels)
    plan = new_plan(groups)
    plan_steps(terms, rules, lists, lanes, front, plan)
    if groups > 1 and not keep_order:
        exchange_channels(terms, lists, lanes, channels, front, plan, effort)
        plan_steps(terms, rules, lists, lanes, front, plan)
    singles, duals = plan.counts.sum(axis=0).tolist()
    bases = np.zeros(singles + 2 * duals, np.int32)
    stream = np.zeros((singles + duals, 2 * SLOTS * shape.channels), np.uint8)
    write_steps(terms, lists, lanes, front, plan, bases, stream)
    return Permuted(
        shape=shape,
        counts=plan.counts.astype(np.int32),
        offsets=bases,
        stream=closed(stream),
        order=lanes.reshape(-1)[:channels].copy(),
        fill=rows.values.size / max(stream.size // 2, 1),
        reach=int(bases.max(initial=-shape.window)) + shape.window,
    )


def _by_count(rows: Rows, channels: int, keep: bool) -> Int64Array:
    """Channels with the most weights first: the last group, which may be short, has the fewest."""
    if keep:
        return np.arange(channels, dtype=np.int64)
    return np.argsort(-rows.counts, kind="stable")
