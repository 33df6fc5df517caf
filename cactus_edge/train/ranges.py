"""Activation ranges for deployment: quantiles of interval upper bounds on calibration samples.

A range that clipped bounds would lose certificates that the float network has, and one that covered
every outlier would waste levels; the quantile is the compromise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cactus_edge.lowering.stages import (
    Branch,
    Flatten,
    Layer,
    Range,
    Stage,
    Sum,
    output_of,
)
from cactus_edge.train.folding import apply, spread

HIDDEN_QUANTILE = 0.9999
LOGIT_QUANTILE = 0.999
_SAMPLED = 1_000_000
_SMALLEST = 1e-6


@torch.no_grad()
def calibrate(
    stages: Sequence[Stage],
    images: Tensor,
    epsilon: float,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Range]:
    """Ranges by name of the layer or sum.

    Args:
        stages: the folded network, with the weights that ship.
        images: float64 [N, ...] in [0, 1].
        epsilon: radius of the boxes whose bounds are to be covered.
        progress: called with (layers done, layers in all).
    """
    lower = (images - epsilon).clamp(0, 1)
    upper = (images + epsilon).clamp(0, 1)
    result: dict[str, Range] = {}
    layers = [stage for stage in stages if isinstance(stage, Layer)]
    sources = {stage.source for stage in stages if isinstance(stage, Branch | Sum)}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for stage in stages:
        if isinstance(stage, Branch):
            lower, upper = kept[stage.source]
        elif isinstance(stage, Flatten):
            lower, upper = lower.flatten(1), upper.flatten(1)
        elif isinstance(stage, Layer | Sum):
            if isinstance(stage, Layer):
                centre, radius = (lower + upper) / 2, (upper - lower) / 2
                centre = apply(stage, centre) + spread(stage)
                radius = apply(stage, radius, torch.from_numpy(stage.weight).abs())
                lower, upper = centre - radius, centre + radius
            else:
                lower, upper = lower + kept[stage.source][0], upper + kept[stage.source][1]
            if stage.relu:
                lower, upper = lower.clamp(min=0), upper.clamp(min=0)
            last = stage is layers[-1]
            fraction = LOGIT_QUANTILE if last else HIDDEN_QUANTILE
            top = _quantile(upper, fraction)
            bottom = 0.0 if stage.relu else _quantile(lower, 1 - fraction)
            result[stage.name] = Range(bottom, max(top, bottom + _SMALLEST))
            if progress is not None and isinstance(stage, Layer):
                progress(1 + layers.index(stage), len(layers))
        else:
            lower, upper = apply(stage, lower), apply(stage, upper)
        if output_of(stage) in sources:
            kept[output_of(stage)] = lower, upper
    return result


def _quantile(values: Tensor, fraction: float) -> float:
    flat = values.flatten()
    if flat.numel() > _SAMPLED:
        step = -(-flat.numel() // _SAMPLED)
        flat = flat[::step]
    return float(torch.quantile(flat, fraction))
