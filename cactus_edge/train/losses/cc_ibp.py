"""CC-IBP: the loss of a convex combination of margins (De Palma et al. 2024).

robust = CE(alpha * interval bounds + (1 - alpha) * margins of the attack)
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
    margins = bounds.margins
    if options.alpha < 1.0:
        logits = case.logits_at(case.attacked(case.box(options.attack_scale)))
        attacked = logits - logits.gather(1, case.labels[:, None])  # z_k - z_y, as the bounds
        margins = options.alpha * margins + (1.0 - options.alpha) * attacked
    return case.joint(functional.cross_entropy(margins, case.labels)), bounds
