"""A fully connected network of 6-bit integers, 784-64-10, trained without any regard to robustness.

Weights, activations and logits have 6 bits, inputs are 8-bit pixels; networks of this size are what
the literature verifies by integer programs. It is built by hand, without a file: the integers are
what matters.
"""

from __future__ import annotations

import numpy as np
import torch

from cactus_edge import datasets
from cactus_edge.graph import FullyConnected, Graph, Quantization, Requantization, Tensor, Weights
from cactus_edge.semantics import Rounding

LEVELS = 63
_SHIFT = 24


def pixels(images: np.ndarray) -> np.ndarray:
    """Stored inputs, int64 [samples, 784]."""
    return images.reshape(len(images), -1).astype(np.int64) - 128


def train(seed: int = 0) -> Graph:
    """Train in float, quantize to 6 bits; a resolved graph."""
    torch.manual_seed(seed)
    data = datasets.load("mnist", "train")
    x = torch.tensor((pixels(data.images) + 128) / 255, dtype=torch.float32)
    y = torch.tensor(np.array(data.labels))
    model = torch.nn.Sequential(torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-5)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        for batch in torch.randperm(len(x), generator=generator).split(128):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        hidden = torch.relu(model[0](x[:5000]))
        outputs = model[2](hidden)
    first = _layer("hidden", model[0], 0, 1, 1 / 255, float(hidden.max()) / LEVELS, (0, LEVELS))
    scale = float(hidden.max()) / LEVELS
    second = _layer("logits", model[2], 1, 2, scale, float(outputs.abs().max()) / 31, (-32, 31))
    pixel = Quantization.of(1 / 255, -128)
    tensors = (
        Tensor("pixels", (1, 784), quantization=pixel),
        Tensor("hidden", (1, 64)),
        Tensor("logits", (1, 10)),
    )
    return Graph(tensors, (first, second), 0, 2)


def _layer(
    name: str,
    linear: torch.nn.Linear,
    source: int,
    target: int,
    input_scale: float,
    output_scale: float,
    clamp: tuple[int, int],
) -> FullyConnected:
    weights = linear.weight.detach().numpy().astype(np.float64)
    step = np.abs(weights).max() / 31
    bias = np.rint(linear.bias.detach().numpy().astype(np.float64) / (step * input_scale))
    multiplier = round(step * input_scale / output_scale * (1 << _SHIFT))
    channels = len(weights)
    return FullyConnected(
        name=name,
        inputs=(source,),
        output=target,
        weights=Weights(np.rint(weights / step).astype(np.int8), 6),
        bias=bias.astype(np.int32),
        clamp=clamp,
        requantization=Requantization.uniform(Rounding.SINGLE, multiplier, _SHIFT, channels),
    )
