"""How far a model is from what the machine can do.

The *roof* of a model is the time below which no program can compute its dense layers one image at a
time: the products at the rate of registers, or the weights from the level of memory that holds all
of them, whichever takes longer. A sparse kernel may pass below that time; it is then also compared
with the roof of the weights that are not zero, each a byte (half of one at up to 4 bits), positions
for free, which no format reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

from cactus_edge.bench.ceilings import Ceilings
from cactus_edge.bench.work import Work


@dataclass(frozen=True)
class Roof:
    """Of one model on one thread.

    Attributes:
        level: of memory that holds the dense weights.
        intensity: products for each byte of weights.
        dense_us: the roof of all weights, for one image.
        useful_us: the roof of those that are not zero.
        rate: products a second that were reached, zeros included (GMAC/s).
        useful_rate: zeros left out.
        dense_share: ``dense_us`` over the time that was taken; above 1 where zeros are skipped.
        useful_share: ``useful_us`` over the time that was taken.
    """

    level: str
    intensity: float
    dense_us: float
    useful_us: float
    rate: float
    useful_rate: float
    dense_share: float
    useful_share: float


def roof(task: Work, median_us: float, ceilings: Ceilings) -> Roof:
    """Compare a latency with the machine's ceilings."""
    level = ceilings.level_of(task.weight_bytes)
    nonzero_bytes = task.nonzero_weights * (1 if task.bits > 4 else 0.5)
    useful_level = ceilings.level_of(round(nonzero_bytes))
    dense = _least_us(task.multiplications, task.weight_bytes, level, ceilings)
    useful = _least_us(task.useful_multiplications, nonzero_bytes, useful_level, ceilings)
    return Roof(
        level=level,
        intensity=task.multiplications / max(1, task.weight_bytes),
        dense_us=dense,
        useful_us=useful,
        rate=task.multiplications / median_us / 1000,
        useful_rate=task.useful_multiplications / median_us / 1000,
        dense_share=dense / median_us,
        useful_share=useful / median_us,
    )


def _least_us(products: float, size: float, level: str, ceilings: Ceilings) -> float:
    return max(products / ceilings.products, size / ceilings.bandwidth[level]) / 1000
