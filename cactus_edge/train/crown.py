"""Linear bounds by one backward pass, on top of interval bounds (CROWN, Zhang et al. 2018).

A linear function of the logits is carried to the input, where its largest value over the box is
known. Affine layers are passed exactly. An activation is replaced by a line above it where the
coefficient is positive and by a line below it where the coefficient is negative, both over the
interval at its input. The lower line of an unstable ReLU is the identity or 0, whichever lies
closer (CROWN's adaptive choice). At a max pool the pass ends: intervals bound what lies below.

Sound up to float rounding, as the intervals are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.train.bounds import (
    ACTIVATION_LEVELS,
    DENSE,
    Bounds,
    Box,
    Statistics,
    View,
    normalization,
)
from cactus_edge.train.zoo import Add, Network, Resume, Weighted

_SMALLEST_WIDTH = 1e-8  # of an interval; a line needs two points


@dataclass(frozen=True)
class Lines:
    """Lines over and under an activation, [N, ...] each: slope * x + offset."""

    upper_slope: Tensor
    upper_offset: Tensor
    lower_slope: Tensor
    lower_offset: Tensor


def upper_bounds(
    network: Network,
    coefficients: Tensor,
    bounds: Bounds,
    view: View = DENSE,
    statistics: Statistics | None = None,
) -> Tensor:
    """Largest values over the box of linear functions of the logits: [N, S].

    Args:
        network: any network of the zoo's layers.
        coefficients: [N, S, classes], S functions for each sample.
        bounds: what ``propagate`` found for this box, with the same view and statistics.
        view: the member of the compression set.
        statistics: needed by networks with batch normalization.
    """
    slopes = coefficients
    offset = torch.zeros_like(coefficients[..., 0])
    shapes = _input_shapes(network, bounds.box)
    waiting: dict[str, Tensor] = {}  # slopes on what later layers read again
    for name, layer in reversed(network.layers()):
        if name in waiting:
            slopes = slopes + waiting.pop(name)
        if isinstance(layer, Resume | Add):
            waiting[layer.source] = waiting.get(layer.source, 0.0) + slopes
            if isinstance(layer, Resume):  # it reads nothing of the layer before it
                slopes = slopes.new_zeros(())
        elif isinstance(layer, Weighted):
            if layer.bias is not None:
                sums = slopes if isinstance(layer, nn.Linear) else slopes.sum((3, 4))
                offset = offset + sums @ layer.bias
            weight = view.weights.get(name, layer.weight)
            slopes = _transposed(name, layer, slopes, weight, shapes[name])
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            if statistics is None:
                raise ValueError(f"bounds through '{name}' need batch statistics")
            scale, shift = normalization(layer, statistics[name], slopes.dim() - 1)
            offset = offset + _inner(slopes, shift[None])
            slopes = slopes * scale[None]
        elif isinstance(layer, nn.ReLU):
            lines = activation_lines(bounds.hidden[name], view.ranges.get(name))
            positive, negative = slopes.clamp(min=0.0), slopes.clamp(max=0.0)
            offset = offset + _inner(positive, lines.upper_offset[:, None])
            offset = offset + _inner(negative, lines.lower_offset[:, None])
            slopes = positive * lines.upper_slope[:, None] + negative * lines.lower_slope[:, None]
        elif isinstance(layer, nn.MaxPool2d):
            if waiting:
                raise UnsupportedModelError(
                    f"layer '{name}': no backward bounds where a sum reaches over a max pool; use "
                    "the loss 'ibp'"
                )
            return offset + _largest(slopes, bounds.pooled[name])
        elif isinstance(layer, nn.AvgPool2d):
            slopes = _unpooled(name, layer, slopes, shapes[name])
        elif isinstance(layer, nn.Flatten):
            slopes = slopes.reshape(*slopes.shape[:2], *shapes[name])
        else:
            raise UnsupportedModelError(
                f"layer '{name}': linear bounds through a {type(layer).__name__} do not exist; use "
                "loss = 'ibp'"
            )
    return offset + _largest(slopes, bounds.box)


def activation_lines(box: Box, largest: Tensor | None) -> Lines:
    """Lines around a ReLU, and around its rounding to 256 values up to ``largest`` [].

    A rounded activation is min(ReLU(x), largest) to within half a step.
    """
    lower, upper = box.lower, box.upper
    zero, one = torch.zeros_like(lower), torch.ones_like(lower)
    active, inactive = lower >= 0, upper <= 0
    end = upper if largest is None else torch.minimum(upper, largest)  # the value at ``upper``
    rising = end / (end - lower).clamp(min=_SMALLEST_WIDTH)  # from (lower, 0) to (end, end)
    falling = end / upper.clamp(min=_SMALLEST_WIDTH)  # from (0, 0) to (upper, end)
    adaptive = torch.where(upper > -lower, falling, zero)
    slopes = [
        torch.where(inactive, zero, torch.where(active, one, line)) for line in (rising, adaptive)
    ]
    over = torch.where(active | inactive, zero, -rising * lower)
    if largest is None:
        return Lines(slopes[0], over, slopes[1], zero)
    return _clipped(Lines(slopes[0], over, slopes[1], zero), box, largest)


def _clipped(lines: Lines, box: Box, largest: Tensor) -> Lines:
    """The lines of active neurons whose interval exceeds ``largest``, and half a step of room."""
    lower, upper = box.lower, box.upper
    zero = torch.zeros_like(lower)
    cut = (lower >= 0) & (upper > largest)
    flat = cut & (upper - largest > largest - lower)  # the constant lies closer than the identity
    start = torch.minimum(lower, largest)
    chord = (largest - start) / (upper - lower).clamp(min=_SMALLEST_WIDTH)
    room = torch.where(upper <= 0, zero, largest / ACTIVATION_LEVELS / 2)
    return Lines(
        torch.where(flat, zero, lines.upper_slope),
        torch.where(flat, largest, lines.upper_offset) + room,
        torch.where(cut, chord, lines.lower_slope),
        torch.where(cut, start - chord * lower, lines.lower_offset) - room,
    )


def _inner(slopes: Tensor, values: Tensor) -> Tensor:
    """Sums over everything but [N, S] of ``slopes`` [N, S, ...] times ``values``."""
    return (slopes * values).flatten(2).sum(2)


def _largest(slopes: Tensor, box: Box) -> Tensor:
    """The largest value of ``slopes`` [N, S, ...] times a point of ``box`` [N, ...]: [N, S]."""
    flat = slopes.flatten(2)
    centre = torch.einsum("nsf,nf->ns", flat, box.centre.flatten(1))
    return centre + torch.einsum("nsf,nf->ns", flat.abs(), box.radius.flatten(1))


def _transposed(
    name: str, layer: Weighted, slopes: Tensor, weight: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Slopes at the input, of ``shape``, of a layer with ``weight``."""
    if isinstance(layer, nn.Linear):
        return slopes @ weight
    if isinstance(layer.padding, str):
        raise UnsupportedModelError(
            f"layer '{name}': linear bounds need numbers as padding, not '{layer.padding}'"
        )
    stride, padding = _pair(layer.stride), _pair(layer.padding)
    return spread(slopes, weight, shape, stride, padding, _pair(layer.dilation), layer.groups)


def _unpooled(name: str, layer: nn.AvgPool2d, slopes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Slopes at the input, of ``shape``, of an average pool."""
    plain = layer.padding in (0, (0, 0)) and not layer.ceil_mode
    if not plain or layer.divisor_override is not None:
        raise UnsupportedModelError(
            f"layer '{name}': linear bounds through pools with padding, divisor or partial windows "
            "do not exist; use loss = 'ibp'"
        )
    height, width = _pair(layer.kernel_size)
    weight = slopes.new_full((shape[0], 1, height, width), 1.0 / (height * width))
    return spread(slopes, weight, shape, _pair(layer.stride), (0, 0), (1, 1), shape[0])


def spread(
    slopes: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The transpose of a convolution: [N, S, out, h, w] to [N, S, *shape].

    Strided 1x1 windows are spread by hand: torch 2.13 has CPU kernels for them that write outside
    their memory when channels are few.
    """
    if tuple(weight.shape[2:]) == (1, 1) and padding == (0, 0):
        pixels = functional.conv_transpose2d(slopes.flatten(0, 1), weight, groups=groups)
        spread = pixels.new_zeros(pixels.shape[0], *shape)
        spread[:, :, :: stride[0], :: stride[1]] = pixels
        return spread.unflatten(0, slopes.shape[:2])
    rest: list[int] = []  # rows and columns at the end that no window reaches
    for axis in (0, 1):
        reach = (slopes.shape[3 + axis] - 1) * stride[axis] - 2 * padding[axis]
        reach += dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        rest.append(shape[1 + axis] - reach)
    flat = functional.conv_transpose2d(
        slopes.flatten(0, 1), weight, None, stride, padding, rest, groups, dilation
    )
    return flat.unflatten(0, slopes.shape[:2])


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@torch.no_grad()
def _input_shapes(network: Network, box: Box) -> Mapping[str, tuple[int, ...]]:
    """The shape of one sample at the input of every layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    x = box.centre[:1]
    kept: dict[str, Tensor] = {}
    for name, layer in network.layers():
        shapes[name] = tuple(x.shape[1:])
        if isinstance(layer, Resume):
            x = kept[layer.source]
        elif not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.ReLU | Add):  # keep it
            x = layer(x)
        if name in network.kept:
            kept[name] = x
    return shapes
