"""Points and boxes through a network: interval bound propagation with replaceable weights.

A ``View`` says what a member of the compression set changes: the weights of some layers, and the
activations that are fake-quantized. A box is a centre and a radius; through an affine layer
c' = W c + b and r' = |W| r (Gowal et al. 2018). Batch normalization is an affine map with the
statistics of the *clean* batch (Shi et al. 2021) or, in evaluation, with the running ones. The
last layer is elided: bounds are taken on z_k - z_y, not on each logit. Under mixed precision layers
compute in bfloat16; logits, statistics, margins and the boxes in ``Bounds`` are float32.

Sound up to float rounding: certificates come from the deployed integers, not from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.train.share import ALONE, Share
from cactus_edge.train.zoo import Add, Network, Resume, Weighted, convolve

ACTIVATION_LEVELS = 255  # an int8 activation has 256 values: 0 to 255 steps above its zero point
Statistics = Mapping[str, tuple[Tensor, Tensor]]  # batch norm layer -> mean [C], variance [C]
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class View:
    """How one member of the compression set sees the network.

    Attributes:
        weights: layer name -> weight used instead of the layer's own.
        ranges: ReLU name -> largest activation []; its output is rounded to 256 values up to it.
    """

    weights: Mapping[str, Tensor] = field(default_factory=lambda: _NOTHING)
    ranges: Mapping[str, Tensor] = field(default_factory=lambda: _NOTHING)


DENSE = View()


@dataclass(frozen=True)
class Box:
    """An axis-parallel box: centre and radius, [N, ...] each."""

    centre: Tensor
    radius: Tensor

    @property
    def lower(self) -> Tensor:
        """Lower end, [N, ...]."""
        return self.centre - self.radius

    @property
    def upper(self) -> Tensor:
        """Upper end, [N, ...]."""
        return self.centre + self.radius


@dataclass(frozen=True)
class Bounds:
    """What a propagation yields.

    Attributes:
        box: what was propagated.
        margins: upper bounds on z_k - z_y, [N, classes]; 0 at the label.
        least: lower bounds on z_k - z_y, [N, classes].
        hidden: the box at the input of every ReLU, by name.
        pooled: the box at the output of every max pool, by name.
    """

    box: Box
    margins: Tensor
    least: Tensor
    hidden: Mapping[str, Box]
    pooled: Mapping[str, Box]


def input_box(images: Tensor, epsilon: float) -> Box:
    """All points within ``epsilon`` of ``images`` [N, ...], clipped to [0, 1]."""
    lower, upper = (images - epsilon).clamp(min=0.0), (images + epsilon).clamp(max=1.0)
    return _box(lower, upper)


def forward(
    network: Network,
    images: Tensor,
    view: View = DENSE,
    statistics: Statistics | None = None,
    share: Share = ALONE,
) -> tuple[Tensor, Statistics]:
    """Logits [N, classes] of ``images`` [N, ...], and the batch statistics that were used.

    Without ``statistics`` batch normalization uses those of this batch, of which ``images`` may be
    a process's ``share``.
    """
    used: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    x = images
    for name, layer in network.layers():
        if isinstance(layer, Weighted):
            x = _affine(layer, x, view.weights.get(name, layer.weight), layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            used[name] = _batch_moments(x, share) if statistics is None else statistics[name]
            scale, shift = normalization(layer, used[name], x.dim())
            x = x * scale + shift
        elif isinstance(layer, nn.ReLU):
            x = activation(x, view.ranges.get(name))
        elif isinstance(layer, Resume):
            x = kept[layer.source]
        elif isinstance(layer, Add):
            x = x + kept[layer.source]
        else:
            x = layer(x)
        if name in network.kept:
            kept[name] = x
    return _full(x), used


def propagate(
    network: Network,
    box: Box,
    labels: Tensor,
    view: View = DENSE,
    statistics: Statistics | None = None,
) -> Bounds:
    """Bound z_k - z_y over ``box`` for ``labels`` [N].

    ``statistics`` are needed by networks with batch normalization; see ``forward`` and
    ``running_statistics``.
    """
    centre, radius = box.centre, box.radius
    hidden: dict[str, Box] = {}
    pooled: dict[str, Box] = {}
    kept: dict[str, Box] = {}
    last = network.layers()[-1][0]
    for name, layer in network.layers():
        if name == last:
            continue
        if isinstance(layer, Weighted):
            weight = view.weights.get(name, layer.weight)
            centre = _affine(layer, centre, weight, layer.bias)
            radius = _affine(layer, radius, weight.abs(), None)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            if statistics is None:
                raise ValueError(f"bounds through '{name}' need batch statistics")
            scale, shift = normalization(layer, statistics[name], centre.dim())
            centre, radius = centre * scale + shift, radius * scale.abs()
        elif isinstance(layer, nn.ReLU):
            hidden[name] = Box(_full(centre), _full(radius))
            ends = (
                activation(end, view.ranges.get(name)) for end in (centre - radius, centre + radius)
            )
            centre, radius = _ends(*ends)
        elif isinstance(layer, nn.MaxPool2d):
            centre, radius = _ends(layer(centre - radius), layer(centre + radius))
            pooled[name] = Box(_full(centre), _full(radius))
        elif isinstance(layer, Resume):
            centre, radius = kept[layer.source].centre, kept[layer.source].radius
        elif isinstance(layer, Add):
            centre, radius = centre + kept[layer.source].centre, radius + kept[layer.source].radius
        else:  # Flatten and AvgPool2d are linear with weights that are not negative
            centre, radius = layer(centre), layer(radius)
        if name in network.kept:
            kept[name] = Box(centre, radius)
    margins = _margins(network, last, Box(centre, radius), labels, view)
    return Bounds(box, margins.upper, margins.lower, hidden, pooled)


def certified(margins: Tensor, labels: Tensor) -> Tensor:
    """Which samples [N] are certified: every rival's margin bound is below 0."""
    rivals = margins.scatter(1, labels[:, None], -torch.inf)
    return rivals.amax(1) < 0


def running_statistics(network: Network) -> Statistics:
    """The running statistics, for evaluation."""
    return {
        name: (layer.running_mean, layer.running_var)
        for name, layer in network.layers()
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        and layer.running_mean is not None
        and layer.running_var is not None
    }


def attack(
    network: Network,
    box: Box,
    labels: Tensor,
    view: View,
    statistics: Statistics | None,
    steps: int,
    generator: torch.Generator,
    share: Share = ALONE,
) -> Tensor:
    """Projected gradient ascent on the cross-entropy inside ``box``: points [N, ...].

    Uniform random start, drawn for the whole batch of which this is a ``share``; step
    max(1/4, 2/steps) of the radius, as in the reference code of SABR.
    """
    frozen = View({k: w.detach() for k, w in view.weights.items()}, view.ranges)
    if statistics is not None:
        statistics = {k: (mean.detach(), var.detach()) for k, (mean, var) in statistics.items()}
    lower, upper = box.lower, box.upper
    whole = (len(box.centre) * share.count, *box.centre.shape[1:])
    noise = share.rows(torch.rand(whole, generator=generator, device=box.centre.device))
    points = lower + noise * (upper - lower)
    size = max(0.25, 2.0 / steps)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        logits, _ = forward(network, points, frozen, statistics)
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        points = torch.clamp(points + size * box.radius * gradient.sign(), lower, upper)
    return points.detach()


def small_box(box: Box, points: Tensor, fraction: float) -> Box:
    """SABR's box: ``fraction`` of the radius, around ``points`` moved inside ``box``."""
    radius = fraction * box.radius
    centre = torch.clamp(points, box.lower + radius, box.upper - radius)
    return Box(centre, radius)


def round_through(values: Tensor, step: Tensor | float) -> Tensor:
    """Round to multiples of ``step`` in the forward pass, identity in the backward pass."""
    rounded = torch.round(values.detach() / step) * step
    return values + (rounded - values.detach())


def activation(x: Tensor, largest: Tensor | None) -> Tensor:
    """ReLU, and rounding to 256 values in [0, largest] where a range is given. Monotone."""
    x = functional.relu(x)
    if largest is None:
        return x
    return round_through(torch.minimum(x, largest), largest / ACTIVATION_LEVELS)


def _affine(layer: Weighted, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's linear map with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    return convolve(layer, x, weight, bias)


def _batch_moments(x: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance per channel over batch and space."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(_full(x), dim=axes, correction=0)
    return share.moments(mean, variance)


def normalization(
    layer: nn.BatchNorm1d | nn.BatchNorm2d, moments: tuple[Tensor, Tensor], dimensions: int
) -> tuple[Tensor, Tensor]:
    """Batch normalization as x * scale + shift, both shaped [1, C, 1, ...]."""
    mean, variance = moments
    scale = layer.weight / torch.sqrt(variance + layer.eps)
    shift = layer.bias - mean * scale
    shape = [1, -1, *[1] * (dimensions - 2)]
    return scale.reshape(shape), shift.reshape(shape)


def _margins(network: Network, name: str, box: Box, labels: Tensor, view: View) -> Box:
    """Bounds on z_k - z_y through the last layer with rows w_k - w_y, [N, classes]."""
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Linear)  # checked when the network was built
    weight = view.weights.get(name, layer.weight)  # [classes, F]
    logits = functional.linear(box.centre, weight, layer.bias)
    centre = logits - logits.gather(1, labels[:, None])
    differences = (weight[None, :, :] - weight[:, None, :]).abs()  # [y, k, F]
    if 4 * network.classes <= box.radius.shape[0]:  # every label occurs often: one product for all
        radius = functional.linear(box.radius, differences.flatten(0, 1))
        radius = radius.unflatten(1, (network.classes, network.classes))
        radius = radius[torch.arange(len(labels), device=labels.device), labels]
    else:
        radius = torch.einsum("nkf,nf->nk", differences[labels], box.radius)
    return Box(_full(centre), _full(radius))


def _full(x: Tensor) -> Tensor:
    """Values of mixed precision as float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _box(lower: Tensor, upper: Tensor) -> Box:
    """The box between two ends."""
    return Box(*_ends(lower, upper))


def _ends(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius of the box between two ends."""
    return (lower + upper) * 0.5, (upper - lower) * 0.5
