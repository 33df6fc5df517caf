"""MTL-IBP: a convex combination of two losses (De Palma et al. 2024).

robust = alpha * CE(interval bounds) + (1 - alpha) * CE(attack)
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cactus_edge.train.bounds import Bounds
from cactus_edge.train.losses.base import Case
from cactus_edge.train.losses.convex import Options


def loss(case: Case) -> tuple[Tensor, Bounds]:
    """Joint loss and the bounds of the whole box."""
    options = case.options(Options)
    bounds = case.bounds(case.box())
    robust = functional.cross_entropy(bounds.margins, case.labels)
    if options.alpha < 1.0:
        logits = case.logits_at(case.attacked(case.box(options.attack_scale)))
        attacked = functional.cross_entropy(logits, case.labels)
        robust = options.alpha * robust + (1.0 - options.alpha) * attacked
    return case.joint(robust), bounds
