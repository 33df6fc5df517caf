"""Channels that nothing reads, taken out of folded stages before they are quantized.

A channel that is left out was multiplied by zeros alone, so what the other channels compute stays
the same, and calibration no longer looks at it. ``cactus_edge.compact`` does the like to integer
graphs when they are loaded; here the file itself becomes smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cactus_edge.graph import BoolArray
from cactus_edge.lowering.stages import Branch, Flatten, Layer, Stage, Sum


def without_unread(stages: Sequence[Stage]) -> list[Stage]:
    """The stages without the output channels of layers that no later weight reads.

    The outputs of the last layer stay, and of every other layer at least one. Where stages are
    read twice, for a sum, all channels stay.
    """
    if any(isinstance(stage, Branch | Sum) for stage in stages):
        return list(stages)
    kept = _read(stages)
    result: list[Stage] = []
    current: BoolArray | None = None  # which of the last tensor's channels stay; None: all
    for stage in stages:
        if isinstance(stage, Layer):
            rows = kept[stage.name]
            result.append(_cut(stage, rows, current))
            current = rows
        else:
            result.append(stage)
    return result


def _read(stages: Sequence[Stage]) -> Mapping[str, BoolArray]:
    """Which output channels of each layer are read, bool [out], by the layer's name."""
    kept: dict[str, BoolArray] = {}
    needed: BoolArray | None = None  # channels or features of the tensor at hand; None: all
    for index in reversed(range(len(stages))):
        stage = stages[index]
        before = next((s for s in reversed(stages[:index]) if isinstance(s, Layer)), None)
        if isinstance(stage, Flatten) and needed is not None and before is not None:
            needed = needed.reshape(len(before.weight), -1).any(1)
        elif isinstance(stage, Layer):
            out = len(stage.weight)
            rows = np.ones(out, np.bool_) if needed is None else needed.copy()
            rows[0] |= not bool(rows.any())
            if stage.groups > 1:  # depthwise: it has the channels that the layer before has
                read = rows.reshape(stage.groups, -1).any(axis=1)
                used: BoolArray = np.ones_like(read) if before is None else read
                rows, needed = np.repeat(used, out // stage.groups), used
            else:
                read = stage.weight[rows] != 0
                needed = read.any(axis=(0, *range(2, read.ndim)))
            kept[stage.name] = rows
    return kept


def _cut(layer: Layer, rows: BoolArray, inputs: BoolArray | None) -> Layer:
    """A layer with some of its output channels, of which the layer before has ``inputs``."""
    weight, groups = layer.weight[rows], layer.groups
    if groups > 1:
        groups = groups if inputs is None else int(inputs.sum())
    elif inputs is not None:
        # Features behind a flatten: all pixels of a channel in a row.
        weight = weight[:, np.repeat(inputs, weight.shape[1] // len(inputs))]
    return replace(layer, weight=weight, bias=layer.bias[rows], groups=groups)
