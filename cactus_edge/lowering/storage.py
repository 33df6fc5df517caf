"""How the outputs of layers and sums are stored: one step per group, offsets for two-sided values.

An ADD of three tensors with one scale adds integers: nothing is rounded, and every runtime computes
the same. So what is added and the sum share the widest step that one of them asks for.

What has no ReLU is two-sided. In a universal graph it is stored with zero point -128 and an
*offset*, a whole number of levels that the bias adds (see ``docs/universal.md``); the next layer
takes it away through its own bias. A sum carries the offsets of both operands; if it has a ReLU, a
1x1 depthwise layer takes them away and is the ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.lowering.stages import INPUT, Branch, Layer, Range, Stage, Sum, output_of

LEVELS = 255


@dataclass(frozen=True)
class Storage:
    """``step`` real units per level; ``offset`` levels below the one that stands for 0."""

    step: float
    offset: int = 0


@dataclass(frozen=True)
class _Joint:
    """A sum and its operands, by name of the layer or sum that made them."""

    result: str
    operands: tuple[str, str]
    relu: bool

    @property
    def names(self) -> set[str]:
        return {self.result, *self.operands}


def storages(
    stages: Sequence[Stage], ranges: Mapping[str, Range], *, universal: bool
) -> dict[str, Storage]:
    """Storage by name of the layer or sum; ranges of the last layer are shifted as a whole.

    Raises:
        UnsupportedModelError: a sum that has no deployed form.
    """
    joints = _joints(stages)
    made = [stage for stage in stages if isinstance(stage, Layer | Sum)]
    lowest = {stage.name: min(ranges[stage.name].lower, 0.0) for stage in made}
    spans = {name: max(ranges[name].upper, 0.0) - low for name, low in lowest.items()}
    if universal:
        for joint in joints:
            carried = sum(lowest[name] for name in joint.operands)
            spans[joint.result] = max(spans[joint.result], ranges[joint.result].upper - carried)
            if not joint.relu:
                lowest[joint.result] = carried
    steps = {name: span / LEVELS for name, span in spans.items()}
    last = next(stage for stage in reversed(made) if isinstance(stage, Layer))
    steps[last.name] = (ranges[last.name].upper - ranges[last.name].lower) / LEVELS
    ceilings = {stage.name for stage in made if stage.ceiling != math.inf}
    for group in _groups(joints):
        if clipped := sorted(group & ceilings):
            raise UnsupportedModelError(
                f"layer '{clipped[0]}': what is added, and a sum, cannot be clipped from above; "
                "use a ReLU without a limit there"
            )
        step = float(np.float32(max(spans[name] for name in group) / LEVELS))
        steps |= dict.fromkeys(group, step)
    return {name: Storage(step, round(-lowest[name] / step)) for name, step in steps.items()}


def _joints(stages: Sequence[Stage]) -> list[_Joint]:
    """The sums, in the order of stages."""
    made = {INPUT: ""}  # output -> layer or sum, also behind pools and flattening
    joints: list[_Joint] = []
    current = ""
    for stage in stages:
        if isinstance(stage, Branch):
            current = made[stage.source]
        elif isinstance(stage, Sum):
            operands = (current, made[stage.source])
            if "" in operands:
                raise UnsupportedModelError(
                    f"layer '{stage.name}': a sum must be of layers, not of the input, to be "
                    "deployed"
                )
            joints.append(_Joint(stage.name, operands, stage.relu))
            current = stage.name
        elif isinstance(stage, Layer):
            current = stage.name
        made[output_of(stage)] = current
    return joints


def _groups(joints: Sequence[_Joint]) -> list[set[str]]:
    """What shares a step: sums that share an operand or a result are one group."""
    groups: list[set[str]] = []
    for joint in joints:
        touching = [group for group in groups if group & joint.names]
        groups = [group for group in groups if not group & joint.names]
        groups.append(joint.names.union(*touching))
    return groups
