"""Scales and shifts of channels that no layer before could take go into the layer behind them.

So a network that normalizes its own input needs no layer for it, unless that layer pads: padding is
of normalized zeros, for which a stored pixel has no value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cactus_edge.lowering.stages import NO_PADS, Branch, Flatten, Layer, Stage, Sum, output_of


def merged(stages: Sequence[Stage]) -> list[Stage]:
    """The same function with fewer layers."""
    again = {stage.source for stage in stages if isinstance(stage, Branch | Sum)}
    result = list(stages)
    index = 0
    while index < len(result) - 1:
        first = result[index]
        behind = index + 1 + isinstance(result[index + 1], Flatten)
        second = result[behind] if behind < len(result) else None
        between = {output_of(stage) for stage in result[index:behind]}
        if _scales(first) and isinstance(second, Layer) and not between & again:
            assert isinstance(first, Layer)
            if second.padding == NO_PADS:
                result[behind] = _joined(first, second)
                del result[index]
                continue
        index += 1
    return result


def _scales(stage: Stage) -> bool:
    """Whether a stage scales and shifts channels and does nothing else."""
    if not isinstance(stage, Layer) or stage.relu or not stage.convolution:
        return False
    plain = stage.weight.shape[1:] == (1, 1, 1) and stage.groups == len(stage.weight)
    return plain and stage.padding == NO_PADS and stage.stride == (1, 1)


def _joined(first: Layer, second: Layer) -> Layer:
    factor, shift, out = first.weight.ravel(), first.bias, len(second.weight)
    if second.groups > 1:
        columns = np.repeat(np.arange(len(factor)), out // len(factor))[:, None]
    else:
        columns = np.arange(second.weight.shape[1])[None] * len(factor) // second.weight.shape[1]
    shape = (*columns.shape, *[1] * (second.weight.ndim - 2))
    moved = second.weight * shift[columns].reshape(shape)
    return replace(
        second,
        weight=second.weight * factor[columns].reshape(shape),
        bias=second.bias + moved.reshape(out, -1).sum(1),
    )
