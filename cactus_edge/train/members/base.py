"""What a member of the compression set is: a pattern of weights to prune, and a width to round to.

Contract: a kind of member is a frozen msgspec struct with a tag, whose fields are the keys of the
recipe. It derives from ``MemberKind`` and overrides what is not the dense network. A ``Pattern``
says which weights survive; training, evaluation and conversion ask the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import msgspec
from torch import Tensor

from cactus_edge.train.compress import (
    Clipping,
    Masks,
    Quantizer,
    Weights,
    beside_zero,
    fake_quantize,
    perturbation,
)
from cactus_edge.train.zoo import Network

Fraction = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1)]
Bits = Annotated[int, msgspec.Meta(ge=2, le=8)]
OptionalBits = Bits | msgspec.UnsetType  # without the key, weights stay floats


@dataclass(frozen=True)
class Pruning:
    """The keys of ``[compression]`` that patterns read; see ``recipe.Compression``."""

    scope: Literal["layer", "global"] = "layer"
    prune_last: bool = True


@dataclass(frozen=True)
class Pattern:
    """Which weights survive; this one prunes nothing.

    Attributes:
        removes_channels: whether conversion may leave out the channels that nothing reads.
    """

    removes_channels: ClassVar[bool] = False

    def key(self) -> str:
        """Stable name, without a slash: equal keys mean equal masks; empty: nothing is pruned."""
        return ""

    def masks(self, network: Network, pruning: Pruning) -> Masks:
        """Masks for today's weights; a layer without a mask stays whole."""
        del network, pruning
        return {}


@dataclass(frozen=True)
class Training:
    """How weights are realised in training.

    Attributes:
        quantizer: see ``recipe.Compression``.
        clipping: see ``recipe.Compression``.
        loss: the certified loss [] of weights, which perturbations raise.
    """

    quantizer: Quantizer
    clipping: Clipping
    loss: Callable[[Weights], Tensor]


class MemberKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """The base of every kind: the network as it is."""

    def label(self) -> str:
        """Short stable name, used in metrics."""
        return "dense"

    def pattern(self) -> Pattern:
        """What is pruned."""
        return Pattern()

    def weight_bits(self) -> int | None:
        """The width of the weights; None for floats."""
        return None

    def training_weights(self, weights: Weights, training: Training) -> Weights:
        """The weights that a training step sees, from pruned ones, differentiably."""
        bits = self.weight_bits()
        if bits is None:
            return weights
        if training.quantizer == "weight-perturbation":
            return perturbed(weights, bits, 1, training)
        levels = rounded(weights, bits, training.clipping)
        if training.quantizer == "plain-straight-through":
            return levels
        return {name: beside_zero(levels[name], weight) for name, weight in weights.items()}

    def deployed_weights(self, weights: Weights, clipping: Clipping) -> Weights:
        """The weights that are evaluated, from pruned ones: rounded, nothing adversarial."""
        bits = self.weight_bits()
        return weights if bits is None else rounded(weights, bits, clipping)


def rounded(weights: Weights, bits: int, clipping: Clipping) -> Weights:
    """Every weight rounded to its channel's steps, as deployed; straight-through gradient."""
    last = list(weights)[-1]  # the logits share one scale
    return {
        name: fake_quantize(weight, bits, clipping, shared=name == last)
        for name, weight in weights.items()
    }


def perturbed(weights: Weights, bits: int, steps: int, training: Training) -> Weights:
    """Weights moved by up to half a step in the direction that raises the certified loss."""
    offsets = perturbation(weights, bits, steps, training.loss)
    return {name: weight + offsets[name] for name, weight in weights.items()}


def width(bits: OptionalBits) -> int | None:
    """An optional key as ``MemberKind.weight_bits`` gives it."""
    return None if bits is msgspec.UNSET else bits


def described(pattern: str, bits: int | None) -> str:
    """The label of a pattern and a width: ``pruned 0.7, quantized 4 bit``."""
    parts = [pattern] if pattern else []
    return ", ".join(parts if bits is None else [*parts, f"quantized {bits} bit"])
