"""Transposed linear layers in int32: what an attack sends back through a network.

A gradient is one integer array for each sample together with a power of two, so its values are cut
to as many bits as the sums of the next layer leave room for. All sums are exact, hence the result
depends neither on the machine nor on the samples that share a batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cactus_edge.kernels.jit import entry

OPEN, LOWER, UPPER, SHUT = range(4)
"""What lies between an accumulator and its output: nothing, a clamp that is reached, a wall."""
BITS = 15
"""Width of gradients and of factors before they are multiplied."""
LARGEST_SUM = 30
"""Sums stay below two to this power."""

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]


@entry
def gate(outgoing: Int32Array, gates: UInt8Array, leak: int) -> None:
    """Stop gradients where an output is clamped, in place.

    Args:
        outgoing: int32 [samples, elements].
        gates: uint8 [samples, elements]. ``OPEN`` lets the gradient pass, ``SHUT`` stops it;
            ``LOWER`` and ``UPPER`` let ``leak`` quarters pass where they point back inside.
        leak: 0 to 4.
    """
    for sample in range(outgoing.shape[0]):
        row = outgoing[sample]
        codes = gates[sample]
        for i in range(row.size):
            value = row[i]
            code = codes[i]
            inside = (code == LOWER and value > 0) or (code == UPPER and value < 0)
            kept = (value >> 2) * np.int32(leak) if inside else np.int32(0)
            row[i] = value if code == OPEN else kept


@entry
def scale(outgoing: Int32Array, factors: Int32Array, bits: int, exponents: Int64Array) -> None:
    """Multiply each channel by its factor and cut each sample to ``bits`` bits, in place.

    Args:
        outgoing: int32 [samples, positions, channels], of any size.
        factors: int32 [channels], below ``2**BITS``.
        bits: at most ``2 * BITS``.
        exponents: int64 [samples], raised by the bits that were cut.
    """
    channels = factors.size
    for sample in range(outgoing.shape[0]):
        rows = outgoing[sample]
        every = np.int32(0)
        for position in range(rows.shape[0]):
            for channel in range(channels):
                value = rows[position, channel]
                every |= value ^ (value >> 31)
        first = 0
        while (every >> first) >= (1 << BITS):
            first += 1
        every = np.int32(0)
        for position in range(rows.shape[0]):
            for channel in range(channels):
                value = (rows[position, channel] >> first) * factors[channel]
                rows[position, channel] = value
                every |= value ^ (value >> 31)
        second = 0
        while (every >> second) >= (1 << bits):
            second += 1
        if second:
            for position in range(rows.shape[0]):
                for channel in range(channels):
                    rows[position, channel] >>= second
        exponents[sample] += first + second


@entry
def scatter(
    outgoing: Int32Array,
    weights: Int32Array,
    runs: Int64Array,
    bases: Int64Array,
    incoming: Int32Array,
) -> None:
    """Add a layer's transpose to ``incoming``; outputs without a gradient cost nothing.

    Args:
        outgoing: int32 [samples, positions, channels].
        weights: int32 [channels, runs, length].
        runs: int64 [runs], where each run of a window begins in ``incoming``.
        bases: int64 [positions], where the window of each output position begins.
        incoming: int32 [samples, elements].
    """
    channels, _, length = weights.shape
    for sample in range(outgoing.shape[0]):
        target = incoming[sample]
        for position in range(bases.size):
            for channel in range(channels):
                value = outgoing[sample, position, channel]
                if value != 0:
                    for run in range(runs.size):
                        begin = bases[position] + runs[run]
                        part = target[begin : begin + length]
                        weight = weights[channel, run]
                        for i in range(length):
                            part[i] += value * weight[i]


@entry
def gather(
    outgoing: Int32Array,
    weights: Int32Array,
    runs: Int64Array,
    bases: Int64Array,
    incoming: Int32Array,
) -> None:
    """``scatter`` for runs shorter than the channels; ``weights`` are [runs, length, channels]."""
    _, length, channels = weights.shape
    for sample in range(outgoing.shape[0]):
        target = incoming[sample]
        for position in range(bases.size):
            row = outgoing[sample, position]
            for run in range(runs.size):
                begin = bases[position] + runs[run]
                for i in range(length):
                    weight = weights[run, i]
                    total = np.int32(0)
                    for channel in range(channels):
                        total += row[channel] * weight[channel]
                    target[begin + i] += total


@entry
def scatter_depthwise(
    outgoing: Int32Array,
    weights: Int32Array,
    runs: Int64Array,
    bases: Int64Array,
    incoming: Int32Array,
) -> None:
    """``scatter`` for a depthwise layer: ``weights`` are [runs, inputs, outputs of each input]."""
    _, inputs, repeats = weights.shape
    for sample in range(outgoing.shape[0]):
        target = incoming[sample]
        for position in range(bases.size):
            row = outgoing[sample, position]
            for run in range(runs.size):
                begin = bases[position] + runs[run]
                for i in range(inputs):
                    total = np.int32(0)
                    for repeat in range(repeats):
                        total += row[i * repeats + repeat] * weights[run, i, repeat]
                    target[begin + i] += total
