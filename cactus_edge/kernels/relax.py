"""Loops behind linear bounds: taps forwards and backwards, and the exact terms of a staircase.

A linear map is a list of taps for each output channel: a weight, where it reads relative to an
output position, and the output positions at which it reads inside the input. Everything that
decides is int64; ``forward`` and ``backward`` also run in float64, where bounds are searched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.jit import entry, kernel

Array = npt.NDArray[Any]
"""int64 [elements]; float64 in a search."""
Int64Array = npt.NDArray[np.int64]

LARGEST_COEFFICIENT = 1 << 34
"""Coefficients of stored values stay below this, so that no sum leaves int64."""
LARGEST_PRODUCT = 1 << 44
"""So does every multiplier times an accumulator; another multiplier is replaced by 0."""
LARGEST_MULTIPLIER = 1 << 38


@entry
def forward(
    x: Array,
    starts: Int64Array,
    taps: Int64Array,
    weights: Int64Array,
    geometry: Int64Array,
    out: Array,
) -> None:
    """Add the linear map of ``x`` to ``out``; rows of ``taps`` are (offset, y0, y1, x0, x1)."""
    _, width, channels, row_step, column_step = geometry
    for channel in range(channels):
        for tap in range(starts[channel], starts[channel + 1]):
            weight = weights[tap]
            for row in range(taps[tap, 1], taps[tap, 2]):
                source = taps[tap, 0] + row * row_step
                target = row * width * channels + channel
                for column in range(taps[tap, 3], taps[tap, 4]):
                    out[target + column * channels] += weight * x[source + column * column_step]


@entry
def forward_interval(
    low: Int64Array,
    high: Int64Array,
    starts: Int64Array,
    taps: Int64Array,
    weights: Int64Array,
    geometry: Int64Array,
    least: Int64Array,
    most: Int64Array,
) -> None:
    """Add the least and the greatest value of the linear map over a box to ``least``, ``most``."""
    _, width, channels, row_step, column_step = geometry
    for channel in range(channels):
        for tap in range(starts[channel], starts[channel + 1]):
            weight = weights[tap]
            for row in range(taps[tap, 1], taps[tap, 2]):
                source = taps[tap, 0] + row * row_step
                target = row * width * channels + channel
                for column in range(taps[tap, 3], taps[tap, 4]):
                    from_ = source + column * column_step
                    to = target + column * channels
                    if weight > 0:
                        least[to] += weight * low[from_]
                        most[to] += weight * high[from_]
                    else:
                        least[to] += weight * high[from_]
                        most[to] += weight * low[from_]


@entry
def backward(
    multipliers: Array,
    starts: Int64Array,
    taps: Int64Array,
    weights: Int64Array,
    geometry: Int64Array,
    result: Array,
) -> None:
    """Add the transposed linear map of ``multipliers`` to ``result``."""
    height, width, channels, row_step, column_step = geometry
    for channel in range(channels):
        idle = True
        for position in range(height * width):
            if multipliers[position * channels + channel] != 0:
                idle = False
                break
        if idle:
            continue
        for tap in range(starts[channel], starts[channel + 1]):
            weight = weights[tap]
            for row in range(taps[tap, 1], taps[tap, 2]):
                source = taps[tap, 0] + row * row_step
                target = row * width * channels + channel
                for column in range(taps[tap, 3], taps[tap, 4]):
                    result[source + column * column_step] += (
                        weight * multipliers[target + column * channels]
                    )


@entry
def levels(
    accumulator: Int64Array, kinds: Int64Array, thresholds: Int64Array, result: Int64Array
) -> None:
    """Steps below each accumulator: the index of its level; ``thresholds`` [kinds, levels - 1]."""
    count = thresholds.shape[1]
    for i in range(accumulator.size):
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if thresholds[kinds[i], middle] <= accumulator[i]:
                low = middle + 1
            else:
                high = middle
        result[i] = low


@kernel
def offset(
    coefficient: Any,
    multiplier: Any,
    accumulator: tuple[int, int],
    level: tuple[int, int],
    threshold: Int64Array,
    lowest: int,
) -> Any:
    """Exact minimum of ``coefficient * stored - multiplier * accumulator`` over a range."""
    best = np.int64(1) << 62
    for step in range(level[0], level[1] + 1):
        left = accumulator[0] if step == level[0] else threshold[step - 1]
        right = accumulator[1] if step == level[1] else threshold[step] - 1
        end = max(multiplier * left, multiplier * right)
        best = min(best, coefficient * (lowest + step) - end)
    return best


@entry
def relax_by_rule(
    coefficients: Int64Array,
    ranges: Int64Array,
    kinds: Int64Array,
    thresholds: Int64Array,
    factors: Int64Array,
    lowest: int,
    multipliers: Int64Array,
    offsets: Int64Array,
) -> None:
    """Multipliers by the rule of ``network``, and their exact offsets.

    ``ranges`` [6, elements]: accumulator bounds, level bounds, the largest magnitude that is
    multiplied, and whether a branch cut the range; ``factors`` [kinds, 2]: the staircase's slope
    as (significand, shift).
    """
    for i in range(coefficients.size):
        coefficient = coefficients[i]
        least, most, first, last = ranges[0, i], ranges[1, i], ranges[2, i], ranges[3, i]
        threshold = thresholds[kinds[i]]
        multipliers[i] = 0
        if first == last or coefficient == 0:
            offsets[i] = coefficient * (lowest + (first if coefficient >= 0 else last))
            continue
        bounds, level = (least, most), (first, last)
        allowed = min(LARGEST_PRODUCT // ranges[4, i], LARGEST_MULTIPLIER)
        offsets[i] = coefficient * (lowest + (first if coefficient > 0 else last))
        area = 2 * offsets[i]
        significand, shift = factors[kinds[i], 0], factors[kinds[i], 1]
        natural = (coefficient * significand + (np.int64(1) << (shift - 1))) >> shift
        run = most - threshold[first] + 1 if coefficient > 0 else threshold[last - 1] - least
        rise = 2 * coefficient * (last - first)
        chord = (rise + run) // (2 * run)
        for candidate in (natural, chord):
            if abs(candidate) > allowed:
                continue
            constant = offset(coefficient, candidate, bounds, level, threshold, lowest)
            value = candidate * (least + most) + 2 * constant
            if value > area:
                multipliers[i], offsets[i], area = candidate, constant, value


@entry
def relax_by_codes(
    coefficients: Int64Array,
    codes: Int64Array,
    ranges: Int64Array,
    kinds: Int64Array,
    thresholds: Int64Array,
    factors: Int64Array,
    lowest: int,
    unit: int,
    multipliers: Int64Array,
    offsets: Int64Array,
) -> None:
    """Multipliers ``natural * code / 16384`` and their exact offsets; other arguments as above.

    Where a branch cut the range (``ranges[5]``), the code is an absolute coefficient in units of
    ``unit``, so that the cut itself can be given a price.
    """
    for i in range(coefficients.size):
        coefficient = coefficients[i]
        least, most, first, last = ranges[0, i], ranges[1, i], ranges[2, i], ranges[3, i]
        multipliers[i] = 0
        cut = ranges[5, i] != 0
        if not cut and (first == last or coefficient == 0):
            offsets[i] = coefficient * (lowest + (first if coefficient >= 0 else last))
            continue
        threshold = thresholds[kinds[i]]
        significand, shift = factors[kinds[i], 0], factors[kinds[i], 1]
        half = np.int64(1) << (shift - 1)
        if cut:
            chosen = (codes[i] * unit * significand + half) >> shift
        else:
            natural = (coefficient * significand + half) >> shift
            chosen = (natural * codes[i] + 8192) >> 14
        if abs(chosen) > min(LARGEST_PRODUCT // ranges[4, i], LARGEST_MULTIPLIER):
            chosen = np.int64(0)
        multipliers[i] = chosen
        offsets[i] = offset(coefficient, chosen, (least, most), (first, last), threshold, lowest)


@entry
def relax_table(
    multipliers: Int64Array,
    low: Int64Array,
    high: Int64Array,
    table: Int64Array,
    first: int,
    coefficients: Int64Array,
    offsets: Int64Array,
) -> None:
    """``multiplier * table[x]`` from below by ``coefficient * x + offset`` on [low, high].

    ``table`` holds the values of x = first, first + 1, ...; the slope is that of its two ends.
    """
    for i in range(multipliers.size):
        multiplier, least, most = multipliers[i], low[i], high[i]
        begin, end = table[least - first], table[most - first]
        run = max(most - least, 1)
        slope = (2 * multiplier * (end - begin) + run) // (2 * run)
        best = np.int64(1) << 62
        for x in range(least, most + 1):
            best = min(best, multiplier * table[x - first] - slope * x)
        coefficients[i] += slope
        offsets[i] = best
