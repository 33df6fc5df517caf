"""A trained network as a list of deployable stages, in float64.

Batch normalization is folded into the layer before it, pruning is applied to the weights first, as
in training, and a following ReLU becomes part of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.train import compress
from cactus_edge.train.zoo import Network


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution [out, in, kh, kw] or a linear layer [out, in], with its ReLU.

    ``output`` is the name of the last module that was folded in.
    """

    name: str
    output: str
    weight: Tensor
    bias: Tensor
    relu: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def convolution(self) -> bool:
        """Whether this is a convolution."""
        return self.weight.dim() == 4

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map with another weight and bias: [N, in, ...] -> [N, out, ...]."""
        if not self.convolution:
            return functional.linear(x, weight, bias)
        return functional.conv2d(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


@dataclass(frozen=True)
class Pool:
    """A pool without padding."""

    name: str
    kind: Literal["average", "max"]
    window: tuple[int, int]
    stride: tuple[int, int]

    def apply(self, x: Tensor) -> Tensor:
        """The pool on [N, C, H, W]."""
        pool = functional.avg_pool2d if self.kind == "average" else functional.max_pool2d
        return pool(x, self.window, self.stride)


@dataclass(frozen=True)
class Flatten:
    """From [N, C, H, W] to [N, C * H * W]."""

    name: str


Stage = Layer | Pool | Flatten


def stages(
    network: Network,
    sparsity: float,
    scope: Literal["layer", "global"] = "layer",
    *,
    prune_last: bool = True,
) -> list[Stage]:
    """Fold a network.

    Raises:
        UnsupportedModelError: an order of layers that has no deployed form.
    """
    masks = (
        compress.magnitude_masks(network, sparsity, scope, prune_last=prune_last)
        if sparsity
        else {}
    )
    result: list[Stage] = []
    for name, module in network.layers():
        match module:
            case nn.Conv2d() | nn.Linear():
                result.append(_layer(name, module, masks.get(name)))
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                result[-1:] = [_normalized(name, result[-1:], module)]
            case nn.ReLU():
                last = result[-1] if result else None
                if not isinstance(last, Layer) or last.relu:
                    raise UnsupportedModelError(f"layer '{name}': a ReLU must follow a layer")
                result[-1] = replace(last, relu=True, output=name)
            case nn.AvgPool2d() | nn.MaxPool2d():
                result.append(_pool(name, module))
            case nn.Flatten():
                result.append(Flatten(name))
            case _:
                raise UnsupportedModelError(
                    f"layer '{name}' is a {type(module).__name__}, which has no deployed form"
                )
    return result


def _layer(name: str, module: nn.Conv2d | nn.Linear, mask: Tensor | None) -> Layer:
    weight = module.weight.detach()
    weight = (weight if mask is None else weight * mask).double()
    bias = (
        torch.zeros(weight.shape[0], dtype=torch.float64)
        if module.bias is None
        else module.bias.detach().double()
    )
    if isinstance(module, nn.Linear):
        return Layer(name, name, weight, bias)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise UnsupportedModelError(f"layer '{name}': padding must be numbers, with zeros")
    if module.groups not in (1, module.in_channels):
        raise UnsupportedModelError(
            f"layer '{name}': {module.groups} groups; only full and depthwise convolutions exist"
        )
    return Layer(
        name,
        name,
        weight,
        bias,
        stride=_pair(module.stride),
        padding=_pair(module.padding),
        dilation=_pair(module.dilation),
        groups=module.groups,
    )


def _normalized(name: str, before: list[Stage], module: nn.BatchNorm1d | nn.BatchNorm2d) -> Layer:
    layer = before[0] if before else None
    if not isinstance(layer, Layer) or layer.relu:
        raise UnsupportedModelError(f"layer '{name}': normalization must follow a layer directly")
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        raise UnsupportedModelError(f"layer '{name}': it keeps no running statistics")
    factor = 1 / torch.sqrt(variance.double() + module.eps)
    shift = -mean.double() * factor
    if module.affine:
        gamma, beta = module.weight.detach().double(), module.bias.detach().double()
        factor, shift = factor * gamma, shift * gamma + beta
    weight = layer.weight * factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
    return replace(layer, weight=weight, bias=layer.bias * factor + shift, output=name)


def _pool(name: str, module: nn.AvgPool2d | nn.MaxPool2d) -> Pool:
    window = _pair(module.kernel_size)
    stride = _pair(module.stride)
    plain = _pair(module.padding) == (0, 0) and not module.ceil_mode
    if isinstance(module, nn.AvgPool2d):
        plain = plain and module.divisor_override is None
        return _checked(name, plain, Pool(name, "average", window, stride))
    plain = plain and _pair(module.dilation) == (1, 1)
    return _checked(name, plain, Pool(name, "max", window, stride))


def _checked(name: str, plain: bool, pool: Pool) -> Pool:
    if not plain:
        raise UnsupportedModelError(f"layer '{name}': pools take no padding, dilation or divisor")
    return pool


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
