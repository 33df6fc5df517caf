from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cactus_edge.errors import UnsupportedModelError, UsageError
from cactus_edge.train.bounds import forward
from cactus_edge.train.zoo import NETWORKS, Add, Network, Resume, build, parameter_count
from cactus_edge.train.zoo.blocks import half_padding


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
    assert sizes["cnn-strided"] == 23_328
    assert sizes["cnn-5"] == 820_954
    assert parameter_count(build("cnn-tiny", (1, 8, 8), 10)) == 41_866
    assert parameter_count(build("cnn-7", (3, 32, 32), 10)) == 17_192_650
    assert parameter_count(build("resnet-8", (3, 32, 32), 10)) == 78_186
    assert parameter_count(build("ds-cnn", (1, 49, 10), 12)) == 23_756


@pytest.mark.parametrize("name", ["mlp", "cnn-7", "resnet-8", "ds-cnn"])
@pytest.mark.parametrize("shape", [(14, 30, 1), (1, 49, 10), (2, 8, 8), (1, 1, 5)])
def test_series_and_spectrograms_fit(name: str, shape: tuple[int, ...]) -> None:
    network = build(name, shape, 3, 0.125).eval()
    assert network(torch.rand(2, *shape)).shape == (2, 3)


@given(extent=st.integers(1, 80), kernel=st.integers(1, 12))
def test_half_padding_halves(extent: int, kernel: int) -> None:
    kernel = min(kernel, extent)
    padding = half_padding(extent, kernel)
    assert (extent + 2 * padding - kernel) // 2 + 1 == (extent + 1) // 2


def test_skip_connections() -> None:
    torch.manual_seed(0)
    layers: list[tuple[str, nn.Module]] = [
        ("fc1", nn.Linear(4, 5)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(5, 5)),
        ("resume", Resume("fc1")),
        ("fc3", nn.Linear(5, 5)),
        ("add", Add("fc2")),
        ("fc4", nn.Linear(5, 2)),
    ]
    network = Network("own", (4,), 2, 1.0, layers)
    assert network.kept == {"fc1", "fc2"}
    x = torch.rand(3, 4)
    one, two, three, four = (layer for _, layer in network.weighted())
    expected = four(three(one(x)) + two(one(x).relu()))
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(forward(network, x)[0], expected)


def test_resnet_8_is_wired_as_published() -> None:
    network = build("resnet-8", (3, 32, 32), 10)
    sources = {n: m.source for n, m in network.layers() if isinstance(m, Resume | Add)}
    assert sources == {
        "add1": "relu1",
        "resume2": "relu3",
        "add2": "norm5",
        "resume3": "relu5",
        "add3": "norm7",
    }


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
    with pytest.raises(
        UsageError, match=r"no network 'resnet'; did you mean 'resnet-8'\? use one of mlp, cnn-tiny"
    ):
        build("resnet", (1, 28, 28), 10)
    with pytest.raises(UsageError, match="'cnn-small' needs images"):
        build("cnn-small", (12,), 10)
    with pytest.raises(UsageError, match="'cnn-medium' does not fit images of shape"):
        build("cnn-medium", (1, 8, 8), 10)
    with pytest.raises(UnsupportedModelError, match="layer 'gelu' is a GELU"):
        Network("own", (4,), 2, 1.0, [("gelu", nn.GELU()), ("fc1", nn.Linear(4, 2))])
    for skip in (Add("fc2"), Resume("nothing")):
        with pytest.raises(UnsupportedModelError, match=r"layer 'skip' reads .* no layer before"):
            Network("own", (4,), 2, 1.0, [("skip", skip), ("fc2", nn.Linear(4, 2))])
    with pytest.raises(UnsupportedModelError, match="last layer of a network must be Linear"):
        Network("own", (4,), 2, 1.0, [("fc1", nn.Linear(4, 2)), ("relu1", nn.ReLU())])
