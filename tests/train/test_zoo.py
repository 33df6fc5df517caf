from __future__ import annotations

import pytest
import torch
from torch import nn

from cactus_edge.errors import UnsupportedModelError, UsageError
from cactus_edge.train.zoo import NETWORKS, Network, build, parameter_count


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_networks_run(name: str, shape: tuple[int, ...]) -> None:
    network = build(name, shape, 7, 0.25).eval()
    assert network(torch.rand(2, *shape)).shape == (2, 7)
    assert (network.architecture, network.classes, network.input_shape) == (name, 7, shape)


def test_sizes_are_the_documented_ones() -> None:
    sizes = {name: parameter_count(build(name, (1, 28, 28), 10)) for name in NETWORKS}
    assert sizes["cnn-small"] == 166_550
    assert sizes["cnn-medium"] == 893_418
    assert parameter_count(build("cnn-tiny", (1, 8, 8), 10)) == 41_866


def test_layer_names_are_stable() -> None:
    network = build("cnn-small-bn", (1, 28, 28), 10)
    assert [name for name, _ in network.layers()] == [
        "conv1",
        "norm1",
        "relu1",
        "conv2",
        "norm2",
        "relu2",
        "flatten",
        "fc1",
        "relu3",
        "fc2",
    ]
    assert [name for name, _ in network.weighted()] == ["conv1", "conv2", "fc1", "fc2"]
    assert network.has_batch_norm()
    assert list(build("mlp", (12,), 3).state_dict())[0] == "fc1.weight"


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="no network 'resnet'; use one of mlp, cnn-tiny"):
        build("resnet", (1, 28, 28), 10)
    with pytest.raises(UsageError, match="'cnn-small' needs images"):
        build("cnn-small", (12,), 10)
    with pytest.raises(UsageError, match="'cnn-medium' does not fit images of shape"):
        build("cnn-medium", (1, 8, 8), 10)
    with pytest.raises(UnsupportedModelError, match="layer 'gelu' is a GELU"):
        Network("own", (4,), 2, 1.0, [("gelu", nn.GELU()), ("fc1", nn.Linear(4, 2))])
    with pytest.raises(UnsupportedModelError, match="last layer of a network must be Linear"):
        Network("own", (4,), 2, 1.0, [("fc1", nn.Linear(4, 2)), ("relu1", nn.ReLU())])
