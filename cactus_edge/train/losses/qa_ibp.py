"""QA-IBP: a hinge on interval margins of the quantized network (Lechner et al. 2023).

joint = CE + lambda * mean over samples of sum over rivals k of max(0, margin - lower(z_y - z_k))
        + regulariser * lambda / lambda_max * sum over ReLUs of mean(upper - lower)

where only samples that are classified correctly enter the hinge, and the widths are those of the
ReLUs' outputs. It is meant for members with ``bits`` and ``activations = "int8"``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from cactus_edge.train.bounds import Bounds, activation
from cactus_edge.train.losses.base import Case

NonNegative = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far beyond the decision, and how narrow.

    Attributes:
        margin: by which the label's logit is to exceed the others on the whole box.
        regulariser: final weight of the mean widths; it grows as lambda does.
        correct_only: whether samples that are classified wrongly are left out of the hinge.
    """

    margin: NonNegative = 0.2
    regulariser: NonNegative = 1e-3
    correct_only: bool = True


def loss(case: Case) -> tuple[Tensor, Bounds]:
    """Joint loss and the bounds of the whole box."""
    options, weight = case.options(Options), case.certified_weight
    logits = case.logits_at(case.images) if case.logits is None else case.logits
    bounds = case.bounds(case.box())
    hinges = functional.relu(options.margin + bounds.margins)  # the bounds are on z_k - z_y
    hinge = hinges.scatter(1, case.labels[:, None], 0.0).sum(1)
    if options.correct_only:
        hinge = hinge * (logits.argmax(1) == case.labels)
    joint = functional.cross_entropy(logits, case.labels) + weight * hinge.mean()
    if options.regulariser and weight:
        progress = weight / case.objective.lambda_max
        joint = joint + progress * options.regulariser * _widths(case, bounds)
    return joint, bounds


def _widths(case: Case, bounds: Bounds) -> Tensor:
    """Sum over ReLUs of the mean width of their outputs, a scalar []."""
    widths = [
        (activation(box.upper, largest) - activation(box.lower, largest)).mean()
        for name, box in bounds.hidden.items()
        for largest in (case.view.ranges.get(name),)
    ]
    return torch.stack(widths).sum()
