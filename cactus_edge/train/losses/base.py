"""What a certified loss is given, and what it is.

A loss bounds the worst cross-entropy of one member of the compression set over a box around each
image. It returns the member's joint loss, in which ``Case.joint`` mixes the standard
cross-entropy, and the bounds it took: their hidden boxes feed the regulariser and the activation
ranges. Losses are means over the samples, so that processes can share a batch (see ``share``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from cactus_edge.train.bounds import (
    Bounds,
    Box,
    Statistics,
    View,
    attack,
    forward,
    input_box,
    propagate,
)
from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.zoo import Network

if TYPE_CHECKING:
    from cactus_edge.train.recipe import Objective

SMALLEST_EPSILON = 1e-6  # bounds need some width for the regulariser
Options = TypeVar("Options", bound=msgspec.Struct)


@dataclass(frozen=True)
class Case:
    """One member of the compression set on one batch, at one step.

    Attributes:
        network: the network in training.
        images: [N, ...] in [0, 1].
        labels: [N].
        view: the member's weights and activation ranges.
        logits: [N, classes] of the images; None where the joint loss has no use for them.
        statistics: of the clean batch, where there is batch normalization.
        objective: the recipe's section.
        epsilon: radius of the box at this step.
        certified_weight: lambda at this step.
        source: randomness of this step's attack.
        share: the process's part of the batch that ``images`` are.
    """

    network: Network
    images: Tensor
    labels: Tensor
    view: View
    logits: Tensor | None
    statistics: Statistics | None
    objective: Objective
    epsilon: float
    certified_weight: float
    source: torch.Generator
    share: Share = ALONE

    @property
    def growth(self) -> float:
        """How much of the final epsilon is reached, in [0, 1]."""
        return self.epsilon / self.objective.epsilon

    def options(self, kind: type[Options]) -> Options:
        """``[objective] options``, with the defaults of the loss."""
        return msgspec.convert(self.objective.options, kind)

    def box(self, scale: float = 1.0) -> Box:
        """The box around every image, of ``scale`` times the radius."""
        return input_box(self.images, max(self.epsilon * scale, SMALLEST_EPSILON))

    def bounds(self, box: Box) -> Bounds:
        """Interval bounds over ``box``."""
        return propagate(self.network, box, self.labels, self.view, self.statistics)

    def attacked(self, box: Box) -> Tensor:
        """Points [N, ...] of ``box`` with a high cross-entropy, without gradient."""
        return attack(
            self.network,
            box,
            self.labels,
            self.view,
            self.statistics,
            self.objective.attack_steps,
            self.source,
            self.share,
        )

    def logits_at(self, points: Tensor) -> Tensor:
        """Logits [N, classes] at other points, with the statistics of the clean batch."""
        return forward(self.network, points, self.view, self.statistics)[0]

    def joint(self, robust: Tensor) -> Tensor:
        """(1 - lambda) cross-entropy + lambda ``robust``, a scalar []."""
        weight = self.certified_weight
        if weight >= 1.0:
            return weight * robust
        assert self.logits is not None  # lambda is below 1, so they were computed
        standard = functional.cross_entropy(self.logits, self.labels)
        return weight * robust + (1.0 - weight) * standard


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For a loss without keys of its own."""


def _whole(objective: Objective) -> float:
    """The whole box."""
    return 1.0


@dataclass(frozen=True)
class CertifiedLoss:
    """An entry of the registry.

    Attributes:
        function: joint loss [] and bounds of a case.
        options: what ``[objective] options`` may hold, read strictly.
        share: of the radius, at which perturbed members raise the interval loss.
    """

    function: Callable[[Case], tuple[Tensor, Bounds]]
    options: type[msgspec.Struct] = NoOptions
    share: Callable[[Objective], float] = _whole
