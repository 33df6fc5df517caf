"""What compression does to weights, differentiably: the arithmetic that members are made of.

* Magnitude pruning: the mask keeps the largest weights of each layer or of the network; the
  surviving weights receive the gradient, the pruned ones none.
* Quantization: symmetric, one scale per output channel, and one for all of the last layer, whose
  logits share it. The largest weight is the largest level, so every rounding error is at most half
  a step; or weights beyond the limit of least squared error are clipped to it first. The gradient
  passes straight through.
* Perturbation: the worst weights within half a step (sign ascent on the certified loss). Rounding
  to nearest stays within that radius, so the perturbed loss stands for every rounded network that
  the ascent can find; this is the admissible set of CACTUS (Xu and Singh 2025) with the radius its
  appendix needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from cactus_edge.train.bounds import Box, round_through
from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.zoo import Network

RANGE_DECAY = 0.99  # of the moving average of activation ranges, per step
SIGNED_ZERO = 1e-20  # what a weight that is rounded to 0 stays at, with its sign
SMALLEST_SCALE = 1e-12  # keeps the scale of an all-zero channel positive
LIMITS = 16  # fractions of the largest weight that are tried as the limit of clipping
REFINEMENTS = 2  # of the best of them

Clipping = Literal["none", "mse"]
Quantizer = Literal["straight-through", "plain-straight-through", "weight-perturbation"]

Weights = Mapping[str, Tensor]  # layer name -> weight [out, ...]
Masks = Mapping[str, Tensor]  # layer name -> bool, True where a weight survives


def magnitude_masks(
    network: Network,
    sparsity: float,
    scope: Literal["layer", "global"] = "layer",
    *,
    prune_last: bool = True,
) -> Masks:
    """Masks that prune exactly round(sparsity * n) of the n smallest weights.

    Of equal weights the first ones in memory are pruned first.
    """
    layers = network.weighted() if prune_last else network.weighted()[:-1]
    sizes = {name: layer.weight.detach().abs() for name, layer in layers}
    if scope == "layer":
        return {
            name: largest(size.flatten(), sparsity).view_as(size) for name, size in sizes.items()
        }
    kept = largest(torch.cat([size.flatten() for size in sizes.values()]), sparsity)
    parts = kept.split([size.numel() for size in sizes.values()])
    return {
        name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts, strict=True)
    }


def quantization_step(weight: Tensor, bits: int, *, shared: bool = False) -> Tensor:
    """Step per output channel, [out, 1, ...]: largest magnitude / (2^(bits-1) - 1).

    ``shared``: one step for all channels, that of the largest weight.
    """
    largest = weight.flatten(1).abs().amax(1).clamp(min=SMALLEST_SCALE)
    if shared:
        largest = largest.amax().expand_as(largest)
    return (largest / (2 ** (bits - 1) - 1)).reshape(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def clipping_limit(weight: Tensor, bits: int, *, shared: bool = False) -> Tensor:
    """The limit per output channel, [out, 1, ...], at which rounding errs least.

    Errors are squared and summed over a channel, over all of them if ``shared``. The best of
    ``LIMITS`` fractions of the largest weight is refined: between two roundings the best step for
    given levels is their least-squares fit.
    """
    levels = 2 ** (bits - 1) - 1
    rows = weight.detach().flatten(1)
    if shared:
        rows = rows.reshape(1, -1)
    largest = rows.abs().amax(1, keepdim=True).clamp(min=SMALLEST_SCALE)
    best, step = torch.full_like(largest, torch.inf), largest / levels

    def attempt(candidate: Tensor) -> Tensor:
        """The levels of one step per row; keeps it where it is the best so far."""
        nonlocal best, step
        rounded = (rows / candidate).round_().clamp_(-levels, levels)
        error = (rounded * candidate - rows).square_().sum(1, keepdim=True)
        step, best = torch.where(error < best, candidate, step), torch.minimum(error, best)
        return rounded

    for numerator in range(LIMITS, 0, -1):
        attempt(largest * (numerator / LIMITS / levels))
    for _ in range(REFINEMENTS):
        rounded = attempt(step)
        squares = rounded.square().sum(1, keepdim=True).clamp(min=1.0)
        attempt(((rounded * rows).sum(1, keepdim=True) / squares).clamp(min=SMALLEST_SCALE))
    limit = torch.minimum(step * levels, largest).expand(len(weight), 1)
    return limit.reshape(-1, *[1] * (weight.dim() - 1))


def clipped(weight: Tensor, bits: int, clipping: Clipping, *, shared: bool = False) -> Tensor:
    """Weights within the limit of their channel; beyond it they have no gradient."""
    if clipping == "none":
        return weight
    limit = clipping_limit(weight, bits, shared=shared)
    return torch.clamp(weight, -limit, limit)


def fake_quantize(
    weight: Tensor, bits: int, clipping: Clipping = "none", *, shared: bool = False
) -> Tensor:
    """Round ``weight`` [out, ...] to its channels' steps; straight-through gradient.

    The gradient passes through the rounding, not past the step: the largest weight of a channel
    moves all its levels (Esser et al. 2020), which counts the more the fewer levels there are. The
    limit of clipping is a constant to it.
    """
    weight = clipped(weight, bits, clipping, shared=shared)
    step = quantization_step(weight, bits, shared=shared)
    rounded = round_through(weight, step.detach())
    error = ((rounded - weight) / step).detach()
    return rounded + error * (step - step.detach())


def beside_zero(rounded: Tensor, weight: Tensor) -> Tensor:
    """Rounded weights for training: what is 0 and is not pruned keeps the sign of ``weight``.

    Bounds grow with the magnitude of a weight, which has no slope at 0. Without one nothing pulls a
    weight back before it is rounded to the next level, many end at that border, and bounds widen.
    """
    return rounded + SIGNED_ZERO * (weight.sign() * (rounded == 0)).detach()


def perturbation(
    weights: Weights, bits: int, steps: int, loss: Callable[[Weights], Tensor]
) -> Weights:
    """Offsets within half a quantization step that raise ``loss``, detached.

    Sign ascent from 0; each step moves by 2 / (steps + 1) of the radius, clipped to the radius.
    Weights that are exactly 0 (pruned) stay 0, as they do in rounding.
    """
    last = list(weights)[-1]
    radius = {
        name: quantization_step(weight.detach(), bits, shared=name == last)
        / 2
        * (weight.detach() != 0)
        for name, weight in weights.items()
    }
    offsets = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for _ in range(steps):
        moved = {
            name: (weight.detach() + offsets[name]).requires_grad_()
            for name, weight in weights.items()
        }
        gradients = torch.autograd.grad(loss(moved), list(moved.values()))
        for (name, offset), gradient in zip(offsets.items(), gradients, strict=True):
            ascent = offset + radius[name] * (2.0 / (steps + 1)) * gradient.sign()
            offsets[name] = torch.clamp(ascent, -radius[name], radius[name])
    return offsets


def pruned_weights(network: Network, masks: Masks) -> Weights:
    """Every conv's and linear layer's weight, masked where there is a mask."""
    return {
        name: layer.weight * masks[name] if name in masks else layer.weight
        for name, layer in network.weighted()
    }


def prune(
    network: Network,
    sparsity: float,
    scope: Literal["layer", "global"] = "layer",
    *,
    prune_last: bool = True,
) -> Network:
    """A copy of ``network`` whose smallest weights are 0."""
    pruned = copy.deepcopy(network)
    masks = magnitude_masks(network, sparsity, scope, prune_last=prune_last)
    with torch.no_grad():
        for name, layer in pruned.weighted():
            if name in masks:
                layer.weight.mul_(masks[name])
    return pruned


def masks_to(masks: Mapping[str, Masks], device: torch.device) -> Mapping[str, Masks]:
    """Masks by key of their pattern, on ``device``."""
    return {
        key: {name: mask.to(device) for name, mask in named.items()} for key, named in masks.items()
    }


def updated_ranges(
    ranges: Mapping[str, Tensor], hidden: Mapping[str, Box], share: Share = ALONE
) -> Mapping[str, Tensor]:
    """Moving averages of the largest upper bound at each ReLU, over all processes, per name []."""
    seen = {
        name: share.largest(box.upper.detach().amax()).clamp(min=SMALLEST_SCALE)
        for name, box in hidden.items()
    }
    return {
        name: ranges[name] * RANGE_DECAY + value * (1 - RANGE_DECAY) if name in ranges else value
        for name, value in seen.items()
    }


def largest(sizes: Tensor, sparsity: float, least: int = 0) -> Tensor:
    """True for all but the round(sparsity * n) smallest of ``sizes`` [n].

    At least ``least`` survive. Of equal sizes the first ones are pruned first.
    """
    pruned = min(round(sparsity * sizes.numel()), sizes.numel() - least)
    if pruned == 0:
        return torch.ones_like(sizes, dtype=torch.bool)
    threshold = sizes.kthvalue(pruned).values
    kept, ties = sizes > threshold, sizes == threshold
    surplus = sizes.numel() - pruned - int(kept.sum())  # ties that must survive: the last ones
    if surplus:
        kept[ties.nonzero().flatten()[-surplus:]] = True
    return kept
