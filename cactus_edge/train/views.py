"""How training and evaluation see the members of the compression set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from torch import Tensor

from cactus_edge.train.bounds import View
from cactus_edge.train.compress import Masks, pruned_weights
from cactus_edge.train.members import MemberKind, Training
from cactus_edge.train.recipe import Compression
from cactus_edge.train.zoo import Network

_NO_MASKS: Mapping[str, Masks] = MappingProxyType({})


def masks_of(
    network: Network, members: Iterable[MemberKind], choice: Compression
) -> Mapping[str, Masks]:
    """Masks of today's weights for every pattern among ``members``, by key."""
    patterns = {member.pattern().key(): member.pattern() for member in members}
    return {key: patterns[key].masks(network, choice.pruning) for key in sorted(patterns) if key}


def training_view(
    network: Network,
    member: MemberKind,
    choice: Compression,
    masks: Masks,
    ranges: Mapping[str, Tensor],
    loss: Callable[[View], Tensor],
) -> View:
    """The view of a member in training; ``loss`` is the certified loss that perturbations raise."""
    shown = _shown(member, choice, ranges)
    training = Training(choice.quantizer, choice.clipping, lambda moved: loss(View(moved, shown)))
    return View(member.training_weights(pruned_weights(network, masks), training), shown)


def deployed_view(
    network: Network,
    member: MemberKind,
    choice: Compression,
    ranges: Mapping[str, Tensor],
    kept: Mapping[str, Masks] = _NO_MASKS,
) -> View:
    """The view of a member in evaluation: weights rounded, nothing adversarial.

    Masks are the ``kept`` ones of its pattern, by key, or else those of today's weights.
    """
    masks = kept.get(member.pattern().key())
    if masks is None:
        masks = member.pattern().masks(network, choice.pruning)
    weights = {name: weight.detach() for name, weight in pruned_weights(network, masks).items()}
    return View(member.deployed_weights(weights, choice.clipping), _shown(member, choice, ranges))


def _shown(
    member: MemberKind, choice: Compression, ranges: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """The activation ranges that a member rounds to: those of the run, or none."""
    rounds = member.weight_bits() is not None and choice.activations == "int8"
    return ranges if rounds else {}
