"""What reading a file may cost."""

from __future__ import annotations

SECONDS = 5.0
"""Of processor time."""


def memory_limit(size: int) -> int:
    """Bytes that reading a file of ``size`` bytes may take."""
    return 4 * size + (64 << 20)
