"""How the outputs of layers and sums are stored: one step per group, offsets for two-sided values.

An ADD of three tensors with one scale adds integers: nothing is rounded, and every runtime computes
the same. So what is added and the sum share the widest step that one of them asks for.

What goes into a sum without a ReLU is two-sided. In a universal graph it is stored with zero point
-128 and an *offset*, a whole number of levels that the bias adds (see ``docs/universal.md``); the
sum then carries the offsets of both, and a 1x1 depthwise layer takes them away and ends in ReLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.lowering.stages import Branch, Layer, Pool, Range, Stage, Sum, output_of

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

    @property
    def names(self) -> set[str]:
        return {self.result, *self.operands}


def storages(
    stages: Sequence[Stage], ranges: Mapping[str, Range], *, universal: bool
) -> dict[str, Storage]:
    """Storage by name of the layer or sum; ranges of the last layer are shifted as a whole.

    Raises:
        UnsupportedModelError: a hidden layer or a sum that has no deployed form.
    """
    joints = _joints(stages)
    result = {
        stage.name: Storage((ranges[stage.name].upper - ranges[stage.name].lower) / LEVELS)
        for stage in stages
        if isinstance(stage, Layer | Sum)
    }
    for group in _groups(joints):
        lowest = {name: min(ranges[name].lower, 0.0) for name in group}
        spans = [ranges[name].upper - lowest[name] for name in group]
        if universal:
            spans += [
                ranges[joint.result].upper - sum(lowest[name] for name in joint.operands)
                for joint in joints
                if joint.result in group
            ]
        step = float(np.float32(max(spans) / LEVELS))
        result |= {name: Storage(step, round(-lowest[name] / step)) for name in group}
    return result


def _joints(stages: Sequence[Stage]) -> list[_Joint]:
    """The sums; everything else must have ended in ReLU before it is read."""
    made: dict[str, str] = {}  # output -> layer or sum, also behind pools and flattening
    open_: set[str] = set()
    joints: list[_Joint] = []
    current = ""
    for stage in stages:
        if isinstance(stage, Layer | Pool) and current in open_:
            raise UnsupportedModelError(
                f"layer '{current}': a hidden layer must end in ReLU or in a sum to be deployed"
            )
        if isinstance(stage, Branch):
            current = made[stage.source]
        elif isinstance(stage, Sum):
            operands = (current, made[stage.source])
            if "" in operands or not stage.relu:
                raise UnsupportedModelError(
                    f"layer '{stage.name}': a sum must be of layers, not of the input, and must "
                    "end in ReLU to be deployed"
                )
            joints.append(_Joint(stage.name, operands))
            current = stage.name
        elif isinstance(stage, Layer):
            current = stage.name
            if not stage.relu:
                open_.add(current)
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
