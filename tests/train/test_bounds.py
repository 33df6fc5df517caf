"""Bounds contain what they bound: every layer, batch normalization, members, both box losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cactus_edge.train import bounds
from cactus_edge.train.bounds import View, forward, input_box, propagate
from cactus_edge.train.compress import updated_ranges
from cactus_edge.train.members import Dense, Member, Pruned, PrunedQuantized, Quantized
from cactus_edge.train.recipe import Compression
from cactus_edge.train.views import deployed_view
from cactus_edge.train.zoo import Network, build

TOLERANCE = 1e-4  # float32 rounding; soundness in integers is the certifier's business
MEMBERS: tuple[Member, ...] = (Dense(), Pruned(0.6), Quantized(3), PrunedQuantized(0.6, 4))
WIDTHS = {
    "mlp": 0.2,
    "cnn-tiny": 0.3,
    "cnn-5": 0.2,
    "cnn-7": 0.05,
    "resnet-8": 0.2,
    "ds-cnn": 0.1,
}


def pooled() -> Network:
    """Every kind of layer in one network."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 4, 3, padding=1)),
        ("norm1", nn.BatchNorm2d(4)),
        ("relu1", nn.ReLU()),
        ("max1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(4, 6, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("average2", nn.AvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(24, 12)),
        ("norm3", nn.BatchNorm1d(12)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(12, 5)),
    ]
    return Network("pooled", (1, 8, 8), 5, 1.0, layers)


def networks() -> list[Network]:
    torch.manual_seed(0)
    made = [build(name, (1, 8, 8), 5, width) for name, width in WIDTHS.items()] + [pooled()]
    with torch.no_grad():
        for network in made:
            for _, layer in network.layers():
                if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                    layer.weight.normal_()  # negative scales too
                    layer.bias.normal_()
    return made


def margins_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits - logits.gather(1, labels[:, None])


@pytest.mark.parametrize("network", networks(), ids=lambda network: network.architecture)
@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: type(member).__name__)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), epsilon=st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_bounds_contain_sampled_points(
    network: Network, member: Member, seed: int, epsilon: float
) -> None:
    source = torch.Generator().manual_seed(seed)
    images = torch.rand(6, *network.input_shape, generator=source)
    labels = torch.randint(0, 5, (6,), generator=source)
    _, statistics = forward(network, images)
    box = input_box(images, epsilon)
    choice = Compression(activations="int8")
    ranges = updated_ranges({}, propagate(network, box, labels, View(), statistics).hidden)
    ranges = {name: 0.7 * value for name, value in ranges.items()}  # so that clipping occurs
    view = deployed_view(network, member, choice, ranges)
    found = propagate(network, box, labels, view, statistics)
    assert float(box.lower.min()) >= -1e-6 and float(box.upper.max()) <= 1 + 1e-6
    place = torch.rand(20, *images.shape, generator=source).round(decimals=1)
    points = (box.lower + place * (box.upper - box.lower)).flatten(0, 1)
    logits, _ = forward(network, points, view, statistics)
    margins = margins_of(logits, labels.repeat(20)).unflatten(0, (20, -1))
    assert bool((margins <= found.margins + TOLERANCE).all())
    corners = box.centre + box.radius * (2 * (images > 0.5).float() - 1)
    logits, _ = forward(network, corners, view, statistics)
    assert bool((margins_of(logits, labels) <= found.margins + TOLERANCE).all())


@pytest.mark.parametrize("network", networks(), ids=lambda network: network.architecture)
def test_radius_zero_is_the_forward_pass(network: Network) -> None:
    images = torch.rand(7, *network.input_shape)
    labels = torch.arange(7) % 5
    logits, statistics = forward(network, images)
    found = propagate(network, input_box(images, 0.0), labels, View(), statistics)
    torch.testing.assert_close(found.margins, margins_of(logits, labels), atol=1e-4, rtol=1e-4)


def test_forward_is_torchs_own_in_evaluation() -> None:
    network = pooled().eval()
    images = torch.rand(7, 1, 8, 8)
    logits, _ = forward(network, images, View(), bounds.running_statistics(network))
    torch.testing.assert_close(logits, network(images), atol=1e-5, rtol=1e-5)


def test_batch_statistics_are_torchs_own_in_training() -> None:
    network = pooled().train()
    images = torch.rand(7, 1, 8, 8)
    logits, _ = forward(network, images)
    torch.testing.assert_close(logits, network(images), atol=1e-4, rtol=1e-4)


def test_both_ways_of_eliding_the_last_layer_agree() -> None:
    network = build("mlp", (6,), 3, 0.1)
    images, labels = torch.rand(16, 6), torch.arange(16) % 3
    many = propagate(network, input_box(images, 0.1), labels).margins  # one product for all labels
    few = [
        propagate(network, input_box(images[i : i + 1], 0.1), labels[i : i + 1]).margins
        for i in range(16)
    ]
    torch.testing.assert_close(many, torch.cat(few))
    torch.testing.assert_close(many.gather(1, labels[:, None]), torch.zeros(16, 1))


@given(fraction=st.floats(0.05, 1.0), steps=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_small_boxes_and_attacks_stay_inside(fraction: float, steps: int, seed: int) -> None:
    network = build("mlp", (9,), 4, 0.1)
    images, labels = torch.rand(5, 9), torch.arange(5) % 4
    box = input_box(images, 0.2)
    source = torch.Generator().manual_seed(seed)
    points = bounds.attack(network, box, labels, View(), None, steps, source)
    small = bounds.small_box(box, points, fraction)
    for inside in (points, small.lower, small.upper):
        assert bool((inside >= box.lower - 1e-6).all() and (inside <= box.upper + 1e-6).all())
    torch.testing.assert_close(small.radius, fraction * box.radius)


def test_attack_raises_the_loss() -> None:
    torch.manual_seed(0)
    network = build("mlp", (9,), 4)
    images, labels = torch.rand(64, 9), torch.arange(64) % 4
    source = torch.Generator().manual_seed(0)
    points = bounds.attack(network, input_box(images, 0.3), labels, View(), None, 5, source)
    with torch.no_grad():
        before, after = (nn.functional.cross_entropy(network(x), labels) for x in (images, points))
    assert float(after) > float(before)
