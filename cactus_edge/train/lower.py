"""The bridge from a trained network to integers: prune, quantize, choose scales, build the graph.

One shot, without retraining: what training prepared for is what happens here. Every conversion
ends with a layer-by-layer check against the fake-quantized network (see ``shadow``).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from cactus_edge import datasets, files, flatbuffer, universal
from cactus_edge.constraints import validate
from cactus_edge.errors import DataError, UsageError
from cactus_edge.graph import Graph
from cactus_edge.lowering.assembly import Assembly, LayerReport
from cactus_edge.lowering.metadata import metadata_of
from cactus_edge.lowering.shadow import LayerDifference, shadow_check
from cactus_edge.lowering.stages import Layer, Stage
from cactus_edge.train.checkpoint import Model, load_model
from cactus_edge.train.compress import Clipping, Masks, clipped, fake_quantize
from cactus_edge.train.folding import stages
from cactus_edge.train.members import Magnitude, Member, Pattern
from cactus_edge.train.ranges import calibrate
from cactus_edge.train.recipe import Recipe, parse_member
from cactus_edge.train.removal import without_unread
from cactus_edge.train.zoo import Network

__all__ = ["Settings", "convert", "lower"]

CALIBRATION_SAMPLES = 2000
_NARROW_BITS = 3  # 4 bits gain nothing: a level more or less is a small step there
_SHADOW_SAMPLES = 16
_WIDEST = 8


class LoweringReport(msgspec.Struct, frozen=True):
    """What was done, layer by layer.

    Attributes:
        bits: width of the weights.
        sparsity: that was asked for, by magnitude; see ``layers`` for what is.
        pattern: what was pruned, as in ``Pattern.key``; empty if nothing.
        channels_removed: filters and hidden units that do not ship.
        epsilon: radius of calibration.
        universal: whether every runtime computes the same.
        layers: see ``LayerReport``.
        shadow: see ``shadow_check``.
        bytes: of the file.
        sha256: of the file.
    """

    bits: int
    sparsity: float
    pattern: str
    channels_removed: int
    epsilon: float
    universal: bool
    layers: tuple[LayerReport, ...]
    shadow: tuple[LayerDifference, ...]
    bytes: int = 0
    sha256: str = ""


@dataclass(frozen=True)
class Lowering:
    """A graph and how it came about."""

    graph: Graph
    report: LoweringReport


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Attributes:
        bits: width of the weights.
        sparsity: fraction that is pruned, by magnitude, in the recipe's scope.
        pattern: what is pruned instead; None is ``sparsity``.
        clipping: of weights before they are rounded; None is the recipe's.
        epsilon: radius for calibration; None is the recipe's radius of certification.
        universal: whether to move scales to where every runtime agrees.
        edge_bits: width of the first and the last layer; None is ``bits``, the default, because
            wider edges did not certify more (see docs/universal.md).
        wide: layers whose weights stay at 8 bits.
        whole: layers that are not pruned.
    """

    bits: int = 8
    sparsity: float = 0.0
    epsilon: float | None = None
    universal: bool = True
    edge_bits: int | None = None
    pattern: Pattern | None = None
    clipping: str | None = None
    wide: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()

    @property
    def pruned(self) -> Pattern:
        """What is pruned."""
        return Magnitude(self.sparsity) if self.pattern is None else self.pattern

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: bits, sparsity or epsilon outside what can be deployed, or a sparsity
                besides a pattern.
        """
        for width in (self.bits, self.bits if self.edge_bits is None else self.edge_bits):
            if width not in (2, 3, 4, 8):
                raise UsageError(f"--bits {width}: weights are deployed at 8, 4, 3 or 2 bits")
        if self.clipping not in (None, "none", "mse"):
            raise UsageError(f"--clipping {self.clipping}: use none or mse")
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity}: a fraction from 0 to below 1 is needed")
        if self.sparsity and self.pattern is not None:
            raise UsageError("give --sparsity or --member, not both: members say what is pruned")
        if self.epsilon is not None and not 0 <= self.epsilon <= 1:
            raise UsageError(f"--eps {self.epsilon}: a radius in [0, 1] is needed")


def lower(
    model: Model,
    calibration: datasets.Dataset,
    settings: Settings,
    progress: Callable[[int, int], None] | None = None,
) -> Lowering:
    """A trained network as an integer graph.

    Args:
        model: as ``checkpoint.load_model`` gives it.
        calibration: samples for activation ranges; never the test split.
        settings: widths, pruning, radius.
        progress: called with (steps done, steps in all): each weighted layer has two, its range
            and its scales.

    Raises:
        UnsupportedModelError: layers that have no deployed form, or a graph out of range.
        ToolError: the integers differ from the fake-quantized network by more than one step.
    """
    recipe = model.recipe
    epsilon = recipe.objective.reported_epsilon if settings.epsilon is None else settings.epsilon
    pattern = settings.pruned
    masks = model.masks.get(pattern.key())
    if masks is None:
        masks = pattern.masks(model.network, recipe.compression.pruning)
    masks = {name: mask for name, mask in masks.items() if name not in settings.whole}
    network = model.network.eval()
    widths = _widths(stages(network, masks), settings)
    asked = settings.clipping or recipe.compression.clipping
    clipping: Clipping = "mse" if asked == "mse" else "none"
    whole = stages(_narrowed(network, masks, widths, clipping), masks)
    folded = without_unread(whole) if pattern.removes_channels else whole
    folded = _clipped(folded, widths, clipping)
    images = _tensor(calibration, CALIBRATION_SAMPLES)
    ranges = calibrate(_rounded(folded, widths), images, epsilon, _half(progress, 0))
    assembly = Assembly(folded, ranges, model.network.input_shape, widths)
    graph, reports = assembly.build(settings.universal, _half(progress, 1))
    agreed = universal.is_universal(graph)
    graph = replace(
        graph, metadata=_metadata(model, calibration, settings, epsilon, clipping, graph)
    )
    validate(graph)
    differences = shadow_check(graph, assembly.shadows, images[:_SHADOW_SAMPLES].numpy())
    report = LoweringReport(
        bits=settings.bits,
        sparsity=settings.sparsity,
        pattern=pattern.key(),
        channels_removed=_channels(whole) - _channels(folded),
        epsilon=epsilon,
        universal=agreed,
        layers=tuple(reports),
        shadow=tuple(differences),
    )
    return Lowering(graph, report)


def _half(
    progress: Callable[[int, int], None] | None, which: int
) -> Callable[[int, int], None] | None:
    """Progress of the first or second pass over the layers."""
    if progress is None:
        return None
    return lambda done, total: progress(which * total + done, 2 * total)


def convert(
    checkpoint: Path,
    output: Path,
    *,
    bits: int | None = None,
    sparsity: float = 0.0,
    member: str | None = None,
    epsilon: float | None = None,
    universal: bool = True,
    edge_bits: int | None = None,
    clipping: str | None = None,
    wide: Sequence[str] = (),
    whole: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoweringReport:
    """Convert a run's directory (or its ``model.safetensors``) to a ``.tflite`` file.

    Args:
        checkpoint: the run.
        output: the file.
        bits: width of the weights; None is the member's, or 8.
        sparsity: see ``Settings``.
        member: which member of the compression set to ship, see ``chosen_member``.
        epsilon: see ``Settings``.
        universal: see ``Settings``.
        edge_bits: see ``Settings``.
        clipping: see ``Settings``.
        wide: see ``Settings``.
        whole: see ``Settings``.
        force: replace ``output``.
        progress: see ``lower``.

    Raises:
        UsageError: settings out of range, an unreadable checkpoint, an output that exists.
        UnsupportedModelError: see ``lower``.
    """
    files.refuse_existing(output, force)
    model = load_model(checkpoint)
    pattern: Pattern | None = None
    if member is not None:
        chosen = chosen_member(model.recipe, member)
        pattern, width = chosen.pattern(), chosen.weight_bits()
        if None not in (bits, width) and bits != width:
            raise UsageError(f"--bits {bits}: the member '{chosen.label()}' has {width} bits")
        bits = width if bits is None else bits
    settings = Settings(
        8 if bits is None else bits, sparsity, epsilon, universal, edge_bits, pattern, clipping,
        frozenset(wide), frozenset(whole),
    )  # fmt: skip
    data = datasets.load(model.recipe.data.name, "train", model.recipe.data.validation)
    lowering = lower(model, data, settings, progress)
    content = flatbuffer.save(lowering.graph, output, force)
    return msgspec.structs.replace(
        lowering.report, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def chosen_member(recipe: Recipe, text: str) -> Member:
    """The member that a text names: its number in the recipe, from 1, or a table of TOML.

    ``2`` is the recipe's second member; ``{ kind = "n-of-m", n = 2, m = 4 }`` is any.

    Raises:
        UsageError: no such number, or no such member.
    """
    members = recipe.compression.members
    if text.strip().isdecimal():
        number = int(text)
        if not 1 <= number <= len(members):
            known = "; ".join(f"{i} {member.label()}" for i, member in enumerate(members, 1))
            raise UsageError(f"--member {number}: the recipe has these members: {known}")
        return members[number - 1]
    try:
        return parse_member(text)
    except DataError as error:
        raise UsageError(
            f"--member {text}: {error}; write a number from 1 to {len(members)}, or a member as in "
            'a recipe, such as { kind = "structured", sparsity = 0.5 }'
        ) from error


def _channels(folded: Sequence[Stage]) -> int:
    return sum(len(stage.weight) for stage in folded if isinstance(stage, Layer))


def _tensor(data: datasets.Dataset, count: int) -> torch.Tensor:
    images = torch.tensor(data.images[:count])
    images = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    return images.permute(0, 3, 1, 2) if images.dim() == 4 else images


def _widths(folded: Sequence[Stage], settings: Settings) -> dict[str, int]:
    """Bits by layer name."""
    names = [stage.name for stage in folded if isinstance(stage, Layer)]
    for name in sorted((settings.wide | settings.whole) - set(names)):
        raise UsageError(f"no layer '{name}' to spare; the network has: {', '.join(names)}")
    widths = dict.fromkeys(names, settings.bits)
    if settings.edge_bits is not None:
        widths |= {names[0]: settings.edge_bits, names[-1]: settings.edge_bits}
    return widths | dict.fromkeys(settings.wide, _WIDEST)


def _narrowed(
    network: Network, masks: Masks, widths: Mapping[str, int], clipping: Clipping
) -> Network:
    """A copy whose narrow layers hold the very levels that training rounds to.

    Weights that were trained at a width lie close to where rounding changes. Rounded only after
    normalization is folded and scales are moved, many of them would get another level.
    """
    narrowed = copy.deepcopy(network)
    last = network.weighted()[-1][0]
    with torch.no_grad():
        for name, layer in narrowed.weighted():
            if widths[name] <= _NARROW_BITS:
                weight = layer.weight * masks[name] if name in masks else layer.weight
                levels = fake_quantize(weight, widths[name], clipping, shared=name == last)
                layer.weight.copy_(levels)
    return narrowed


def _clipped(folded: Sequence[Stage], widths: Mapping[str, int], clipping: Clipping) -> list[Stage]:
    """The stages with weights clipped: the largest weight of a channel is then its limit."""

    def limited(weight: torch.Tensor, bits: int, *, shared: bool) -> torch.Tensor:
        return clipped(weight, bits, clipping, shared=shared)

    return _changed(folded, widths, limited)


def _rounded(folded: Sequence[Stage], widths: Mapping[str, int]) -> list[Stage]:
    """The stages with weights rounded nearly as they will ship, for calibration."""
    return _changed(folded, widths, fake_quantize)


def _changed(
    folded: Sequence[Stage], widths: Mapping[str, int], change: Callable[..., torch.Tensor]
) -> list[Stage]:
    """The stages with ``change`` of their weights; the last layer's share one scale."""
    last = [stage.name for stage in folded if isinstance(stage, Layer)][-1]

    def changed(stage: Layer) -> Layer:
        weight = torch.from_numpy(stage.weight)
        shared = stage.name == last
        return replace(stage, weight=change(weight, widths[stage.name], shared=shared).numpy())

    return [changed(stage) if isinstance(stage, Layer) else stage for stage in folded]


def _metadata(
    model: Model,
    data: datasets.Dataset,
    settings: Settings,
    epsilon: float,
    clipping: Clipping,
    graph: Graph,
) -> tuple[tuple[str, bytes], ...]:
    provenance = {
        "network": model.network.architecture,
        "recipe": msgspec.to_builtins(model.recipe),
        "training_data_sha256": model.metadata.data_sha256,
        "bits": settings.bits,
        "edge_bits": settings.bits if settings.edge_bits is None else settings.edge_bits,
        "sparsity": settings.sparsity,
        "clipping": clipping,
        "epsilon": epsilon,
    }
    if settings.pattern is not None:
        provenance["pattern"] = settings.pattern.key()
    for name, layers in (("wide", settings.wide), ("whole", settings.whole)):
        if layers:
            provenance[name] = sorted(layers)
    return metadata_of(graph, provenance, pixels=data.images.dtype == np.uint8)
