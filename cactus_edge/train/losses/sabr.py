"""SABR: interval bounds over a small box around an attack (Mueller et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from cactus_edge.train.bounds import Bounds, small_box
from cactus_edge.train.losses.base import Case

if TYPE_CHECKING:
    from cactus_edge.train.recipe import Objective


def loss(case: Case) -> tuple[Tensor, Bounds]:
    """Joint loss and the bounds of the small box."""
    box = case.box()
    bounds = case.bounds(small_box(box, case.attacked(box), case.objective.sabr_lambda))
    return case.joint(functional.cross_entropy(bounds.margins, case.labels)), bounds


def share(objective: Objective) -> float:
    """Size of the small box relative to the whole."""
    return objective.sabr_lambda
