"""A trained network as the stages of ``lowering``.

Batch normalization is folded into the layer before it, pruning is applied to the weights first, as
in training, and a following ReLU becomes part of the layer or of the sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.lowering.stages import Branch, Flatten, Layer, Pool, Stage, Sum, output_of
from cactus_edge.train.compress import Masks
from cactus_edge.train.zoo import Add, Network, Resume


def apply(stage: Layer | Pool, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """A layer's map without bias, its own weight being replaced by ``weight``, or a pool.

    [N, in, ...] -> [N, out, ...]
    """
    if isinstance(stage, Pool):
        pool = functional.avg_pool2d if stage.kind == "average" else functional.max_pool2d
        return pool(x, stage.window, stage.stride)
    weight = torch.from_numpy(stage.weight) if weight is None else weight
    if not stage.convolution:
        return functional.linear(x, weight)
    (top, bottom), (left, right) = stage.padding
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(padded, weight, None, stage.stride, 0, stage.dilation, stage.groups)


def spread(layer: Layer) -> Tensor:
    """The bias in the shape in which outputs take it."""
    bias = torch.from_numpy(layer.bias)
    return bias.reshape(-1, 1, 1) if layer.convolution else bias


def stages(network: Network, masks: Masks) -> list[Stage]:
    """Fold a network, with masked weights where there is a mask.

    Raises:
        UnsupportedModelError: an order of layers that has no deployed form.
    """
    result: list[Stage] = []
    for name, module in network.layers():
        match module:
            case nn.Conv2d() | nn.Linear():
                result.append(_layer(name, module, masks.get(name)))
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                result[-1:] = [_normalized(name, result[-1:], module)]
            case nn.ReLU():
                last = result[-1] if result else None
                if not isinstance(last, Layer | Sum) or last.relu:
                    raise UnsupportedModelError(
                        f"layer '{name}': a ReLU must follow a layer or a sum"
                    )
                result[-1] = replace(last, relu=True, output=name)
            case nn.AvgPool2d() | nn.MaxPool2d():
                result.append(_pool(name, module))
            case nn.Flatten():
                result.append(Flatten(name))
            case Resume():
                result.append(Branch(name, module.source))
            case Add():
                result.append(Sum(name, name, module.source))
            case _:
                raise UnsupportedModelError(
                    f"layer '{name}' is a {type(module).__name__}, which has no deployed form"
                )
    _check_sources(result)
    return result


def _check_sources(result: list[Stage]) -> None:
    """What is read again must still exist: folding keeps only the end of each stage."""
    seen: set[str] = set()
    for stage in result:
        if isinstance(stage, Branch | Sum) and stage.source not in seen:
            raise UnsupportedModelError(
                f"layer '{stage.name}' reads '{stage.source}', which is folded into the layer "
                "after it; read the last of normalization and ReLU instead"
            )
        seen.add(output_of(stage))


def _layer(name: str, module: nn.Conv2d | nn.Linear, mask: Tensor | None) -> Layer:
    weight = module.weight.detach()
    weight = (weight if mask is None else weight * mask).double()
    bias = (
        torch.zeros(weight.shape[0], dtype=torch.float64)
        if module.bias is None
        else module.bias.detach().double()
    )
    if isinstance(module, nn.Linear):
        return Layer(name, name, weight.numpy(), bias.numpy())
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise UnsupportedModelError(f"layer '{name}': padding must be numbers, with zeros")
    if module.groups not in (1, module.in_channels):
        raise UnsupportedModelError(
            f"layer '{name}': {module.groups} groups; only full and depthwise convolutions exist"
        )
    height, width = _pair(module.padding)
    return Layer(
        name,
        name,
        weight.numpy(),
        bias.numpy(),
        stride=_pair(module.stride),
        padding=(_both(height), _both(width)),
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
    scale = factor.numpy()
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    return replace(layer, weight=weight, bias=layer.bias * scale + shift.numpy(), output=name)


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


def _both(size: int) -> tuple[int, int]:
    return size, size
