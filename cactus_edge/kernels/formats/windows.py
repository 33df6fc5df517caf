"""Steps that gather: which bytes each loads, and which four weights each channel finds in them.

A *group* of channels, one in each lane, walks the inputs together. A step loads the window of bytes
at some base, and each lane takes up to four of its non-zero weights whose inputs are in it; a
*dual* step loads a second window too, and costs more. Lanes drift apart where their weights are not
spread alike, and one that is ahead of the window idles.

The base is the lowest input that any lane still needs, and lanes take their lowest inputs first.
For steps of one kind that gives the fewest steps there can be: some step has to reach the lowest
input, no base that does so sees further, and no choice of weights leaves more to take later. What
is left to choose is the kind of each step. The *rules* below compare what a second window would add
with what the first one gives; weights of channels that have more left count more, because the
fullest channel ends last. Every rule is tried for every group, and the cheapest is kept.

Plans differ in time only: all of them compute the same sums. What the cached functions call is in
this module, because Numba notices changes of the file of a cached function alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cactus_edge.kernels.formats.layout import ByteArray, Int8Array, Int32Array, Int64Array
from cactus_edge.kernels.jit import entry, inlined, kernel

SLOTS = 4
"""Weights of a channel in a step, what a dot product adds up."""

_NOWHERE = 1 << 40
_FADE = 64

# A second window is loaded if what it adds is more than this part of what the first one gives ...
_THRESHOLDS = (np.inf, 0.8, 2.0, 0.05, 0.8)
# ... where a weight counts exp(-decay * d / 4) in a channel that has d fewer left than the fullest.
# All of them are tried and the cheapest plan is kept, so they steer alone.
_DECAYS = (0.0, 0.5, 0.5, 2.0, 4.0)
_IMPORTANCE = np.exp(-np.outer(_DECAYS, np.arange(_FADE)) / SLOTS)

ONE_WINDOW = 1
"""Number of rules that never load a second window."""
FEW_RULES = 2
"""Number of rules for layers of millions of weights, where each takes long and gains little."""
ALL_RULES = len(_THRESHOLDS)


class Terms(NamedTuple):
    """What a step may load, and the cost of one with a single window; a dual step costs 1."""

    window: int
    alignment: int
    single_cost: float


class Lists(NamedTuple):
    """The arrays of ``layout.Rows``."""

    starts: Int64Array
    positions: Int32Array
    values: Int8Array


class Front(NamedTuple):
    """How far the lanes of a group are, int64 [lanes] each.

    ``following`` is the next weight, ``end`` the one behind the last; after the first window of a
    step a lane is at ``first``, after the whole step at ``last``.
    """

    following: Int64Array
    end: Int64Array
    first: Int64Array
    last: Int64Array


class Plan(NamedTuple):
    """What was chosen.

    ``rules`` int64 [groups]; ``counts`` int64 [groups, 2], single and dual steps; ``stale`` int64
    [groups], 1 for groups whose rule has to be chosen.
    """

    rules: Int64Array
    counts: Int64Array
    stale: Int64Array


def new_plan(groups: int) -> Plan:
    """A plan with nothing chosen."""
    zeros = np.zeros(groups, np.int64)
    return Plan(zeros, np.zeros((groups, 2), np.int64), np.ones_like(zeros))


def new_front(lanes: int) -> Front:
    """Scratch memory for a group."""
    return Front(*(np.zeros(lanes, np.int64) for _ in range(4)))


@inlined
def _begin(lists: Lists, lanes: Int64Array, front: Front) -> None:
    """Put all lanes at their first weights."""
    for lane in range(len(lanes)):
        front.following[lane] = lists.starts[lanes[lane]]
        front.end[lane] = lists.starts[lanes[lane] + 1]


@kernel
def _choose(terms: Terms, rule: int, lists: Lists, front: Front) -> tuple[int, int]:
    """Bases of the windows of the next step, -1 for one that is not loaded."""
    base = _NOWHERE
    most = 0
    for lane in range(len(front.end)):
        left = front.end[lane] - front.following[lane]
        most = max(most, left)
        if left > 0:
            base = min(base, int(lists.positions[front.following[lane]]))
    if most == 0:
        return -1, -1
    base = base // terms.alignment * terms.alignment
    second = _NOWHERE
    given = 0.0
    for lane in range(len(front.end)):
        begin = front.following[lane]
        end = min(begin + SLOTS, front.end[lane])
        i = begin
        while i < end and lists.positions[i] < base + terms.window:
            i += 1
        front.first[lane] = i
        front.last[lane] = i
        given += (i - begin) * _IMPORTANCE[rule, min(most - front.end[lane] + begin, _FADE - 1)]
        if i < end:
            second = min(second, int(lists.positions[i]))
    if rule < ONE_WINDOW or second == _NOWHERE:
        return base, -1
    second = second // terms.alignment * terms.alignment
    added = 0.0
    for lane in range(len(front.end)):
        begin = front.following[lane]
        end = min(begin + SLOTS, front.end[lane])
        i = front.first[lane]
        while i < end and lists.positions[i] < second + terms.window:
            i += 1
        front.last[lane] = i
        importance = _IMPORTANCE[rule, min(most - front.end[lane] + begin, _FADE - 1)]
        added += (i - front.first[lane]) * importance
    if added > given * _THRESHOLDS[rule]:
        return base, second
    for lane in range(len(front.end)):
        front.last[lane] = front.first[lane]
    return base, -1


@inlined
def _advance(front: Front) -> None:
    """Go on behind the step."""
    for lane in range(len(front.end)):
        front.following[lane] = front.last[lane]


@kernel
def _count(
    terms: Terms, rule: int, lists: Lists, lanes: Int64Array, front: Front
) -> tuple[int, int]:
    """Single and dual steps of a group under a rule."""
    singles = 0
    duals = 0
    _begin(lists, lanes, front)
    while True:
        base, second = _choose(terms, rule, lists, front)
        if base < 0:
            return singles, duals
        if second < 0:
            singles += 1
        else:
            duals += 1
        _advance(front)


@kernel
def _choose_rule(
    terms: Terms, rules: int, lists: Lists, lanes: Int64Array, front: Front, group: int, plan: Plan
) -> None:
    """Try the rules on a group and keep the cheapest."""
    best = np.inf
    for rule in range(rules):
        singles, duals = _count(terms, rule, lists, lanes, front)
        cost = singles * terms.single_cost + duals
        if cost < best:
            best = cost
            plan.rules[group] = rule
            plan.counts[group, 0] = singles
            plan.counts[group, 1] = duals


@entry
def plan_steps(
    terms: Terms, rules: int, lists: Lists, lanes: Int64Array, front: Front, plan: Plan
) -> None:
    """Choose a rule for each stale group.

    Args:
        terms: what a step may load.
        rules: how many of the rules to try, from ``ONE_WINDOW`` to ``ALL_RULES``.
        lists: the weights.
        lanes: int64 [groups, lanes], the channel in each lane.
        front: scratch.
        plan: written.
    """
    for group in range(len(lanes)):
        if plan.stale[group]:
            _choose_rule(terms, rules, lists, lanes[group], front, group, plan)
            plan.stale[group] = 0


@kernel
def _cost(terms: Terms, counts: Int64Array) -> float:
    return counts[0] * terms.single_cost + counts[1]


@entry
def exchange_channels(
    terms: Terms,
    lists: Lists,
    lanes: Int64Array,
    channels: int,
    front: Front,
    plan: Plan,
    effort: int,
) -> None:
    """Exchange channels between groups as long as that takes no more steps.

    Channels are tried at random, with others that are up to a group away: those have about as many
    weights. An exchange that changes nothing is made too: it may open the way to a better one.

    Args:
        terms: what a step may load.
        lists: the weights.
        lanes: int64 [groups, lanes], changed; the first ``channels`` of all lanes are exchanged.
        channels: how many there are.
        front: scratch.
        plan: of these lanes, changed; groups with other channels are stale, because another rule
            may be cheaper for them.
        effort: how many steps of a lane may be tried in all.
    """
    width = lanes.shape[1]
    flat = lanes.reshape(-1)
    state = 1
    while effort > 0:
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        one = (state >> 8) % channels
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        other = one + (state >> 8) % width + 1
        effort -= width
        if other >= channels or one // width == other // width:
            continue
        a, b = one // width, other // width
        flat[one], flat[other] = flat[other], flat[one]
        singles_a, duals_a = _count(terms, plan.rules[a], lists, lanes[a], front)
        singles_b, duals_b = _count(terms, plan.rules[b], lists, lanes[b], front)
        effort -= width * (singles_a + duals_a + singles_b + duals_b)
        before = _cost(terms, plan.counts[a]) + _cost(terms, plan.counts[b])
        if (singles_a + singles_b) * terms.single_cost + duals_a + duals_b <= before:
            plan.counts[a, 0], plan.counts[a, 1] = singles_a, duals_a
            plan.counts[b, 0], plan.counts[b, 1] = singles_b, duals_b
            plan.stale[a], plan.stale[b] = 1, 1
        else:
            flat[one], flat[other] = flat[other], flat[one]


@kernel
def _write_step(
    terms: Terms, base: int, second: int, lists: Lists, front: Front, step: ByteArray
) -> None:
    """Indices and weights of one step, uint8 [2, lanes, 4], zeros before."""
    half = len(step) // 2
    for lane in range(len(front.end)):
        slot = SLOTS * lane
        for i in range(front.following[lane], front.last[lane]):
            index = lists.positions[i] - base
            if i >= front.first[lane]:
                index = lists.positions[i] - second + terms.window
            step[slot] = np.uint8(index)
            step[half + slot] = np.uint8(lists.values[i])
            slot += 1


@entry
def write_steps(
    terms: Terms,
    lists: Lists,
    lanes: Int64Array,
    front: Front,
    plan: Plan,
    offsets: Int32Array,
    stream: ByteArray,
) -> None:
    """Write the steps of all groups, in each the single ones before the dual ones.

    Args:
        terms: what a step may load.
        lists: the weights.
        lanes: int64 [groups, lanes], the channel in each lane.
        front: scratch.
        plan: of these lanes.
        offsets: int32 [single steps + 2 * dual steps], written: bases of windows.
        stream: uint8 [steps, 8 * lanes], zeros, written: indices [lanes, 4], weights [lanes, 4].
    """
    step = 0
    window = 0
    for group in range(len(lanes)):
        singles, duals = plan.counts[group, 0], plan.counts[group, 1]
        dual_step, dual_window = step + singles, window + singles
        _begin(lists, lanes[group], front)
        while True:
            base, second = _choose(terms, plan.rules[group], lists, front)
            if base < 0:
                break
            if second < 0:
                offsets[window] = base
                _write_step(terms, base, second, lists, front, stream[step])
                step += 1
                window += 1
            else:
                offsets[dual_window] = base
                offsets[dual_window + 1] = second
                _write_step(terms, base, second, lists, front, stream[dual_step])
                dual_step += 1
                dual_window += 2
            _advance(front)
        step += duals
        window += 2 * duals
