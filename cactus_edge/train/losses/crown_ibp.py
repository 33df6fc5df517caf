"""CROWN-IBP: a backward pass of linear bounds on top of interval bounds (Zhang et al. 2020).

With loss fusion (Xu et al. 2020) one function is bounded per sample, at any number of classes:
S = sum over k of exp(z_k - z_y), whose logarithm is the cross-entropy. Each exponential lies below
its chord between the interval bounds of its margin; the sum of the chords is linear in the logits
and goes through the network backwards. Without fusion every margin is bounded on its own.

The bound is beta times CROWN's plus (1 - beta) times the interval's; beta falls from 1 to
``final_beta`` while epsilon grows.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from cactus_edge.train.bounds import Bounds
from cactus_edge.train.crown import upper_bounds
from cactus_edge.train.losses.base import Case

_SMALLEST_BETA = 1e-5  # below it the backward pass is not worth its time
_SMALLEST_WIDTH = 1e-6  # of a margin's interval; a chord needs two ends


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which function is bounded, and how tightly at the end.

    Attributes:
        fusion: bound the loss (one pass for all rivals), not each rival's margin.
        final_beta: share of CROWN once epsilon is reached; 0 ends in IBP.
    """

    fusion: bool = True
    final_beta: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0


def loss(case: Case) -> tuple[Tensor, Bounds]:
    """Joint loss and the interval bounds of the whole box."""
    options = case.options(Options)
    beta = 1.0 - case.growth * (1.0 - options.final_beta)
    bounds = case.bounds(case.box())
    if beta < _SMALLEST_BETA:
        robust = functional.cross_entropy(bounds.margins, case.labels)
    elif options.fusion:
        robust = _fused(case, bounds, beta)
    else:
        specification = torch.eye(case.network.classes, device=case.labels.device)
        specification = specification - specification[case.labels][:, None, :]  # z_k - z_y
        tight = _bounded(case, bounds, specification)
        margins = beta * tight + (1.0 - beta) * bounds.margins
        robust = functional.cross_entropy(margins, case.labels)
    return case.joint(robust), bounds


def _fused(case: Case, bounds: Bounds, beta: float) -> Tensor:
    """Mean of log(beta * bound on S through chords + (1 - beta) * bound on S by intervals)."""
    upper = bounds.margins
    largest = upper.detach().amax(1, keepdim=True)  # at least 0: the label's margin
    top = (upper - largest).exp()
    width = (upper - bounds.least).clamp(min=_SMALLEST_WIDTH)
    slopes = top * -torch.expm1(-width) / width
    # sum of slope_k (z_k - z_y): the label's coefficient collects the others
    coefficients = slopes.scatter_add(1, case.labels[:, None], -slopes.sum(1, keepdim=True))
    linear = _bounded(case, bounds, coefficients[:, None, :])[:, 0]
    chords = linear + (top - slopes * upper).sum(1)
    mixed = beta * chords + (1.0 - beta) * top.sum(1)
    # S is at least the label's exp(0): what lies below is rounding
    mixed = torch.maximum(mixed, torch.exp(-largest[:, 0]))
    return (mixed.log() + largest[:, 0]).mean()


def _bounded(case: Case, bounds: Bounds, coefficients: Tensor) -> Tensor:
    """CROWN's upper bounds [N, S] on ``coefficients`` [N, S, classes] times the logits."""
    return upper_bounds(case.network, coefficients, bounds, case.view, case.statistics)
