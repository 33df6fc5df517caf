"""How weights of up to four bits are stored: two to a byte, the first in the low nibble.

The flat order of the tensor is packed without row padding; an odd last element leaves the high
nibble 0. Weights of 2 and 3 bits are stored as int4. Source: TFLite ``UnpackDenseInt4IntoInt8``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def packed_size(count: int) -> int:
    """Bytes that ``count`` int4 values take."""
    return (count + 1) // 2


def pack_int4(values: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Values in [-8, 7], of any shape, as uint8 [packed_size(values.size)]."""
    nibbles = np.zeros(2 * packed_size(values.size), np.uint8)
    nibbles[: values.size] = values.reshape(-1).view(np.uint8) & 15
    return (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.int8]:
    """The first ``count`` values, int8 [count]; the inverse of ``pack_int4``."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[:count]
    # Sign extension: nibbles 8 to 15 stand for -8 to -1.
    return ((nibbles ^ 8).astype(np.int8) - np.int8(8)).astype(np.int8)
