"""Multipliers in a certificate: one code for each element whose staircase is not constant.

In the order of nodes and elements, as int32 little-endian, deflated, in base64. The reader knows
from its own ranges how many there are.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping

import numpy as np

from cactus_edge.certify.linear.bounds import State
from cactus_edge.certify.linear.network import Network, Stairs
from cactus_edge.graph import Int64Array


def pack(network: Network, state: State, codes: Mapping[int, Int64Array]) -> str:
    """Codes by node index, int64 [elements], as text."""
    parts: list[Int64Array] = []
    for index, node in enumerate(network.nodes):
        if isinstance(node, Stairs) and index in codes:
            ranges = state.ranges[index]
            parts.append(codes[index][(ranges[2] < ranges[3]) | (ranges[5] != 0)])
    whole = np.concatenate([np.zeros(0, np.int64), *parts])
    return base64.b64encode(zlib.compress(whole.astype("<i4").tobytes(), 9)).decode()
