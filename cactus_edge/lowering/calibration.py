"""Activation ranges from samples: what the integers of each layer and sum have to cover.

A range that covered every outlier would waste levels, one that clips too much loses values; the
methods are three compromises. With a radius, what is covered are interval bounds of the boxes
around the samples, so that certificates do not end at a clipped bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from cactus_edge.errors import UsageError, meant
from cactus_edge.lowering.stages import FloatArray, Layer, Range, Stage, Sum, run, run_bounds
from cactus_edge.lowering.storage import LEVELS

Method = Literal["minmax", "percentile", "mse"]
BATCH = 32
_SAMPLED = 1 << 18
_SMALLEST = 1e-6
_SHARES = np.linspace(0.3, 1, 71)


@dataclass(frozen=True)
class Calibration:
    """How ranges follow from samples.

    Attributes:
        method: ``minmax`` covers all that was seen, ``percentile`` leaves out the share
            ``1 - percentile`` at each end, ``mse`` takes the share of the range at which rounding
            and clipping together cost the least squared error.
        percentile: see ``method``, above 0.5.
        epsilon: radius of the boxes around samples, in [0, 1].
    """

    method: Method = "percentile"
    percentile: float = 0.9999
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UsageError: one of them is wrong.
        """
        if not 0.5 < self.percentile <= 1:
            raise UsageError(f"percentile {self.percentile}: a share above 0.5, up to 1, is needed")
        if not 0 <= self.epsilon <= 1:
            raise UsageError(f"epsilon {self.epsilon}: a radius in [0, 1] is needed")


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: there is none.
    """
    known: tuple[Method, ...] = get_args(Method)
    for method in known:
        if method == name:
            return method
    raise UsageError(f"--ranges {name}{meant(name, known)} known are {', '.join(known)}")


@dataclass
class _Seen:
    """Ends of what was seen, and values that were drawn from it."""

    least: float = np.inf
    greatest: float = -np.inf
    lower: list[FloatArray] = field(default_factory=list[FloatArray])
    upper: list[FloatArray] = field(default_factory=list[FloatArray])

    def add(self, lower: FloatArray, upper: FloatArray, batches: int) -> None:
        self.least = min(self.least, float(lower.min()))
        self.greatest = max(self.greatest, float(upper.max()))
        # An odd step does not keep to the same columns.
        step = -(-lower.size * batches // _SAMPLED) | 1
        self.lower.append(lower.ravel()[::step])
        self.upper.append(upper.ravel()[::step])


def calibrate(
    stages: Sequence[Stage], samples: FloatArray, calibration: Calibration
) -> dict[str, Range]:
    """Ranges by name of the layer or sum.

    Args:
        stages: the network, best with weights that are rounded as they will ship.
        samples: float64 [N, C, H, W] or [N, F] in [0, 1], at least one.
        calibration: the method.
    """
    seen: dict[str, _Seen] = {}
    batches = -(-len(samples) // BATCH)
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        for stage, lower, upper in _ends(stages, batch, calibration.epsilon):
            if isinstance(stage, Layer | Sum):
                seen.setdefault(stage.name, _Seen()).add(lower, upper, batches)
    made = [stage for stage in stages if isinstance(stage, Layer | Sum)]
    return {stage.name: _range(seen[stage.name], calibration, stage) for stage in made}


def _ends(
    stages: Sequence[Stage], batch: FloatArray, epsilon: float
) -> Iterator[tuple[Stage, FloatArray, FloatArray]]:
    if epsilon == 0:
        return ((stage, after, after) for stage, _, after in run(stages, batch))
    return run_bounds(stages, (batch - epsilon).clip(0, 1), (batch + epsilon).clip(0, 1))


def _range(seen: _Seen, calibration: Calibration, stage: Layer | Sum) -> Range:
    relu = stage.relu
    lower, upper = np.concatenate(seen.lower), np.concatenate(seen.upper)
    low, high = (0.0 if relu else seen.least), seen.greatest
    if calibration.method == "percentile":
        share = calibration.percentile
        high = float(np.quantile(upper, share))
        low = 0.0 if relu else float(np.quantile(lower, 1 - share))
    elif calibration.method == "mse":
        values = np.concatenate([lower, upper]) if calibration.epsilon else upper
        low, high = min(_shares(low, high), key=lambda ends: _error(values, *ends))
    if high - low < _SMALLEST:
        return Range(low, low + max(_SMALLEST, _magnitude(stage)))
    return Range(low, high)


def _magnitude(stage: Layer | Sum) -> float:
    """What a layer whose outputs all vanish could yield; its weights and biases need such steps."""
    if isinstance(stage, Sum):
        return 0.0
    weights = np.abs(stage.weight).reshape(len(stage.weight), -1).sum(axis=1)
    return float((weights + np.abs(stage.bias)).max())


def _shares(low: float, high: float) -> list[tuple[float, float]]:
    """Narrower and narrower ranges around 0, or around the end that is next to it."""
    centre = min(max(0.0, low), high)
    return [
        (centre + share * (low - centre), centre + share * (high - centre))
        for share in _SHARES.tolist()
    ]


def _error(values: FloatArray, low: float, high: float) -> float:
    step = max(high - low, _SMALLEST) / LEVELS
    stored = np.rint((values - low) / step).clip(0, LEVELS)
    return float(np.square(stored * step + low - values).mean())
