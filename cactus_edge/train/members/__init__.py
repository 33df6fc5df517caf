"""The members of the compression set: one module and one line below for each kind.

``Member`` is the registry: recipes accept these kinds and no others. docs/training.md shows how to
add one.
"""

from cactus_edge.train.members.base import (
    MemberKind,
    Pattern,
    Pruning,
    Training,
)
from cactus_edge.train.members.blocks import Blocks
from cactus_edge.train.members.dense import Dense
from cactus_edge.train.members.magnitude import Magnitude, Pruned, PrunedQuantized
from cactus_edge.train.members.n_of_m import NOfM
from cactus_edge.train.members.quantized import Perturbed, Quantized
from cactus_edge.train.members.structured import Structured

Member = (
    Dense
    | Pruned
    | Quantized
    | PrunedQuantized
    | Perturbed
    | NOfM
    | Blocks
    | Structured
)  # fmt: skip

__all__ = [
    "Blocks",
    "Dense",
    "Magnitude",
    "Member",
    "MemberKind",
    "NOfM",
    "Pattern",
    "Perturbed",
    "Pruned",
    "PrunedQuantized",
    "Pruning",
    "Quantized",
    "Structured",
    "Training",
]
