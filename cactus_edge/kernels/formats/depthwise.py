"""Depthwise weights: as many taps of a channel as a dot product adds, then the next channel's.

::

    weights of a group, T taps at a time    | channel 0: wwww | channel 1: wwww | ... C - 1
                                            | channel 0: w000 | channel 1: w000 | ... C - 1

A last group that would have channels to spare begins earlier and repeats some of the group before
it, so that it is written like the others. Only a layer of fewer channels than a group is filled up.
"""

from __future__ import annotations

import numpy as np

from cactus_edge.kernels.formats.layout import Int8Array, groups_of


def pack_depthwise(weights: Int8Array, size: int, together: int) -> Int8Array:
    """Pack int8 [channels, taps].

    Args:
        weights: of all channels.
        size: channels of a group.
        together: taps that a dot product adds.

    Returns:
        int8 [groups, taps / together, size, together], 0 for taps and channels that are not there.
    """
    channels, taps = weights.shape
    turns = -(-taps // together)
    padded = np.zeros((max(channels, size), turns * together), np.int8)
    padded[:channels, :taps] = weights
    begins = np.arange(groups_of(channels, size)) * size
    begins = np.maximum(np.minimum(begins, channels - size), 0)
    groups = padded[begins[:, None] + np.arange(size)]
    return groups.reshape(len(begins), size, turns, together).transpose(0, 2, 1, 3)


def as_matrix(weights: Int8Array, inputs: int) -> Int8Array:
    """Weights int8 [taps, channels] as a CONV_2D with zeros has them: [channels, taps * inputs].

    Channels come in ``inputs`` parts of the same size, each of which reads one input channel.
    """
    taps, channels = weights.shape
    own = np.arange(inputs)[:, None] == np.arange(channels) // (channels // inputs)
    return np.where(own, weights[:, None, :], np.int8(0)).reshape(taps * inputs, channels).T
