"""IBP: the cross-entropy of interval bounds over the whole box (Gowal et al. 2018)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cactus_edge.train.bounds import Bounds
from cactus_edge.train.losses.base import Case


def loss(case: Case) -> tuple[Tensor, Bounds]:
    """Joint loss and bounds."""
    bounds = case.bounds(case.box())
    return case.joint(functional.cross_entropy(bounds.margins, case.labels)), bounds
