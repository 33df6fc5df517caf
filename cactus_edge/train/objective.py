"""The CACTUS objective and its schedules.

loss = mean over members g of [(1 - lambda) CE(g(x), y) + lambda (certified loss of g over the box)
                              + nrs * instability of g's ReLUs]
       + regulariser of Shi et al. (while epsilon grows) + l1 * sum |W|

after Xu and Singh (2025), with a certified loss of ``losses.LOSSES``. How many members are
evaluated per step is ``compression.draw``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.train import compress, views
from cactus_edge.train.bounds import (
    Box,
    Statistics,
    View,
    forward,
    input_box,
    propagate,
)
from cactus_edge.train.data import generator
from cactus_edge.train.losses import LOSSES, SMALLEST_EPSILON, Case
from cactus_edge.train.members import Dense, Member
from cactus_edge.train.recipe import Objective, Recipe
from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.zoo import Network, device_of

REGULARISER_TOLERANCE = 0.5
QUARTIC_PART = 0.25  # of the epsilon ramp
SMALLEST_SQUARE = 1e-8  # of a normalization's scale, which may be 0


@dataclass(frozen=True)
class Schedule:
    """The quantities that change from step to step.

    Attributes:
        epsilon: radius of the training box.
        certified_weight: lambda.
        regulariser_weight: of Shi et al.'s regulariser.
        learning_rate: of Adam.
        compressed: whether the members are trained, or still the whole network alone.
    """

    epsilon: float
    certified_weight: float
    regulariser_weight: float
    learning_rate: float
    compressed: bool = True


def schedule(recipe: Recipe, step: int, steps_per_epoch: int) -> Schedule:
    """The schedule at a global step."""
    objective, optimizer = recipe.objective, recipe.optimizer
    epoch = step / steps_per_epoch
    grown = smooth_ramp(_progress(epoch - objective.warmup, objective.epsilon_ramp))
    passed = sum(epoch >= fraction * optimizer.epochs for fraction in optimizer.milestones)
    return Schedule(
        epsilon=objective.epsilon * grown,
        certified_weight=objective.lambda_max * _progress(epoch, objective.lambda_ramp),
        regulariser_weight=objective.shi_regulariser * (1.0 - grown),
        learning_rate=optimizer.learning_rate * optimizer.decay**passed,
        compressed=epoch >= recipe.compression.warmup,
    )


def smooth_ramp(time: float) -> float:
    """From 0 to 1 over ``time`` in [0, 1]: proportional to time^4, then linear, C1 (Shi et al.)."""
    middle = QUARTIC_PART
    factor = 1.0 / (middle**4 + 4 * middle**3 * (1 - middle))
    if time <= middle:
        return factor * time**4
    return factor * (middle**4 + 4 * middle**3 * (time - middle))


def drawn_members(recipe: Recipe, step: int) -> Sequence[Member]:
    """The members that are evaluated in this step, in the recipe's order."""
    members, draw = recipe.compression.members, recipe.compression.draw
    if draw == "all":
        return members
    source = generator(torch.device("cpu"), recipe.seed, "member", step)
    if draw == "one":
        return (members[int(torch.randint(len(members), (), generator=source))],)
    chosen: list[int] = torch.randperm(len(members), generator=source)[:draw].tolist()
    return tuple(members[index] for index in sorted(chosen))


def cactus_loss(
    network: Network,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    step: int,
    now: Schedule,
    masks: Mapping[str, compress.Masks],
    ranges: Mapping[str, Tensor],
    share: Share = ALONE,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss [] of one step and the updated activation ranges.

    Args:
        network: the network in training.
        images: [N, ...] in [0, 1].
        labels: [N].
        recipe: the run's recipe.
        step: the global step; seeds attack and draw.
        now: the schedule at ``step``.
        masks: key of a pattern -> masks.
        ranges: ReLU name -> largest activation, as observed so far.
        share: the process's part of the batch that ``images`` are.
    """
    losses: list[Tensor] = []
    for member in drawn_members(recipe, step) if now.compressed else (Dense(),):
        pruning = masks.get(member.pattern().key(), {})
        view = views.training_view(
            network,
            member,
            recipe.compression,
            pruning,
            ranges,
            lambda moved: _certified_loss(
                network, images, labels, recipe.objective, now, moved, share
            ),
        )
        rounds = member.weight_bits() is not None
        observed = rounds and recipe.compression.activations == "int8"
        loss, hidden = _member_loss(
            network, images, labels, recipe, step, now, view, share, observed=observed
        )
        if rounds:
            ranges = compress.updated_ranges(ranges, hidden, share)
        losses.append(loss)
    total = torch.stack(losses).mean()
    if recipe.objective.l1:
        total = total + recipe.objective.l1 * sum(
            (layer.weight.abs().sum() for _, layer in network.weighted()), torch.zeros_like(total)
        )
    return total, ranges


def regulariser(hidden: Mapping[str, Box], inputs: Box, share: Share = ALONE) -> Tensor:
    """Shi et al. (2021): bounds keep the input's width, ReLUs stay balanced. A scalar [].

    Mean over ReLUs of [relu(t - r_in / r) + relu(t - balance of means) + relu(t - balance of
    variances)] / t; a balance is min(a, 1/a) of the active to inactive ratio a.
    """
    tolerance, tiny = REGULARISER_TOLERANCE, 1e-12  # tiny keeps values and gradients finite
    width = share.mean(inputs.radius.mean())
    total = torch.zeros_like(width)
    for box in hidden.values():
        active, inactive = (box.lower > 0).float(), (box.upper < 0).float()
        centre = box.centre
        spread = (centre - share.mean(centre.mean())) ** 2
        positive, negative, radius = share.means(
            (centre * active).mean(), (centre * inactive).mean(), box.radius.mean()
        )
        above, below = share.means((spread * active).sum(), (spread * inactive).sum())
        ratios = (positive / (-negative).clamp(min=tiny), above / below.clamp(min=tiny))
        total = total + functional.relu(tolerance - width / radius.clamp(min=tiny))
        for ratio in ratios:
            balance = torch.minimum(ratio, 1 / ratio.clamp(min=tiny))
            total = total + functional.relu(tolerance - balance)
    return total / tolerance / max(1, len(hidden))


def instability(network: Network, hidden: Mapping[str, Box]) -> Tensor:
    """Normalised ReLU stability of Li et al. (2023), a scalar [] in [-1, 1]; -1 is stable.

    Mean over the units of all ReLUs of -tanh(1 + l u / gamma^2), where l and u bound the unit's
    input and gamma, without gradient, is the scale of the batch normalization that yields it, or 1.
    """
    total, count, before = torch.zeros((), device=device_of(network)), 0, nn.Module()
    for name, layer in network.layers():
        if isinstance(layer, nn.ReLU):
            box = hidden[name]
            product = box.lower * box.upper
            if isinstance(before, nn.BatchNorm1d | nn.BatchNorm2d):
                square = before.weight.detach().square().clamp(min=SMALLEST_SQUARE)
                product = product / square.reshape(1, -1, *[1] * (product.dim() - 2))
            total = total - torch.tanh(1 + product).sum()
            count += product.numel()
        before = layer
    return total / max(1, count)


def _progress(epochs: float, length: float) -> float:
    """How much of a ramp of ``length`` epochs has passed, in [0, 1]."""
    if length == 0:
        return 1.0 if epochs >= 0 else 0.0
    return min(1.0, max(0.0, epochs / length))


def _member_loss(
    network: Network,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    step: int,
    now: Schedule,
    view: View,
    share: Share,
    *,
    observed: bool,
) -> tuple[Tensor, Mapping[str, Box]]:
    """Joint loss of one member with the regulariser of its bounds, and the boxes at its ReLUs.

    Without a certified loss nothing is bounded, and the boxes are those of the clean batch: points
    if they are ``observed``, none otherwise.
    """
    logits: Tensor | None = None
    statistics: Statistics | None = None
    if now.certified_weight < 1.0 or network.has_batch_norm():  # otherwise it has no use
        logits, statistics = forward(network, images, view, share=share)
    objective = recipe.objective
    if not (objective.lambda_max or objective.nrs or now.regulariser_weight):
        assert logits is not None  # lambda is 0
        standard = functional.cross_entropy(logits, labels)
        return standard, _activations(network, images, labels, view, statistics) if observed else {}
    case = Case(
        network=network,
        images=images,
        labels=labels,
        view=view,
        logits=logits,
        statistics=statistics,
        objective=objective,
        epsilon=now.epsilon,
        certified_weight=now.certified_weight,
        source=generator(images.device, recipe.seed, "attack", step),
        share=share,
    )
    loss, bounds = LOSSES[objective.loss].function(case)
    if now.regulariser_weight:
        loss = loss + now.regulariser_weight * regulariser(bounds.hidden, bounds.box, share)
    if objective.nrs:
        loss = loss + objective.nrs * instability(network, bounds.hidden)
    return loss, bounds.hidden


@torch.no_grad()
def _activations(
    network: Network,
    images: Tensor,
    labels: Tensor,
    view: View,
    statistics: Statistics | None,
) -> Mapping[str, Box]:
    """The inputs of every ReLU on a clean batch, as boxes without width."""
    point = Box(images, torch.zeros_like(images))
    return propagate(network, point, labels, view, statistics).hidden


def _certified_loss(
    network: Network,
    images: Tensor,
    labels: Tensor,
    objective: Objective,
    now: Schedule,
    view: View,
    share: Share,
) -> Tensor:
    """What weight perturbations raise: the interval loss, over the loss's share of the box."""
    view = View(share.replicated(view.weights), view.ranges)  # gradients of the whole batch
    statistics = None
    if network.has_batch_norm():
        statistics = forward(network, images, view, share=share)[1]
    scale = LOSSES[objective.loss].share(objective)
    box = input_box(images, max(now.epsilon * scale, SMALLEST_EPSILON))
    return functional.cross_entropy(
        propagate(network, box, labels, view, statistics).margins, labels
    )
