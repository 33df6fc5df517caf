"""What the figures suggest, in sentences: each names a layer, a change, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cactus_edge.compare.signal import Signals

if TYPE_CHECKING:
    from cactus_edge.compare.costs import Costs, Variant

_LEAST_SHARE = 0.005
"""Of the samples: fewer are within what another choice of samples would change."""
_LEAST_DECIBELS = 3.0
_OPTIONS = {"8 bits": "--wide-layer", "unpruned": "--whole-layer"}


def advice(signals: Signals, costs: Costs | None) -> list[str]:
    """The most useful first; empty where nothing stands out.

    Args:
        signals: see ``signal``.
        costs: see ``costs``; None where they were not measured.
    """
    found = [] if costs is None else _of_costs(costs)
    for layer in signals.layers:
        if layer.by_channel is None or layer.weights is None:
            continue
        gain = layer.by_channel - layer.weights
        last = layer is signals.layers[-1]
        if gain >= _LEAST_DECIBELS and not last:  # the logits' weights share a scale in any case
            found.append(
                f"{layer.name}: a scale for each channel would raise the signal of its weights by "
                f"{gain:.1f} dB; convert without --per-tensor"
            )
    own = [layer for layer in signals.layers if layer.own is not None]
    if own:
        worst = min(own, key=lambda layer: layer.own or 0)
        found.append(
            f"{worst.name} loses most of its own signal: {worst.own:.1f} dB are left, with "
            f"{100 * worst.sparsity:.0f} % of its weights zero"
            + (f" and {worst.bits} bits" if worst.bits else "")
        )
    return found


def _of_costs(costs: Costs) -> list[str]:
    deployed, least = costs.deployed, max(2, round(_LEAST_SHARE * costs.samples))
    made = [variant for variant in costs.variants if not variant.problem]
    gains = sorted(made, key=lambda v: (-_gain(v, deployed), v.bytes))
    found = [_more(v, costs) for v in gains if _gain(v, deployed) >= least]
    useless = _spare(made, deployed)
    if useless:
        found.append(
            f"{', '.join(useless)}: neither width nor pruning costs anything here; there bits or "
            "weights can still go"
        )
    if made and not found:
        found.append("no single layer costs much; what is lost is lost by all of them together")
    return found


def _gain(variant: Variant, deployed: Variant) -> int:
    return variant.certified - deployed.certified


def _more(variant: Variant, costs: Costs) -> str:
    deployed = costs.deployed
    return (
        f"{variant.layer} {variant.change}: {_gain(variant, deployed):+d} of {costs.samples} "
        f"certified, {variant.correct - deployed.correct:+d} right, "
        f"{variant.bytes - deployed.bytes:+,d} bytes, "
        f"{variant.nonzero - deployed.nonzero:+,d} non-zero weights; "
        f"convert {_OPTIONS[variant.change]} {variant.layer}"
    )


def _spare(variants: Sequence[Variant], deployed: Variant) -> list[str]:
    """Layers of which no variant is any better than the model."""
    gains: dict[str, int] = {}
    for variant in variants:
        gain = max(_gain(variant, deployed), variant.correct - deployed.correct)
        gains[variant.layer] = max(gains.get(variant.layer, 0), gain)
    return [name for name, gain in gains.items() if gain <= 0]
