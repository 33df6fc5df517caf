"""Linear bounds: sound, exact where nothing is relaxed, and as tight as their linear program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from cactus_edge.errors import UnsupportedModelError
from cactus_edge.train.bounds import Bounds, Box, Statistics, View, forward, input_box, propagate
from cactus_edge.train.compress import updated_ranges
from cactus_edge.train.crown import activation_lines, spread, upper_bounds
from cactus_edge.train.members import Dense, Member, PrunedQuantized
from cactus_edge.train.recipe import Compression
from cactus_edge.train.views import deployed_view
from cactus_edge.train.zoo import Network, build

TOLERANCE = 1e-4


def pooled(kind: type[nn.AvgPool2d] | type[nn.MaxPool2d]) -> Network:
    """Strides that leave a row over, groups, dilation, both normalizations and a pool."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 4, 3, stride=2, padding=1)),
        ("norm1", nn.BatchNorm2d(4)),
        ("relu1", nn.ReLU()),
        ("pool1", kind(2, stride=1)),
        ("conv2", nn.Conv2d(4, 4, 2, dilation=2, groups=4, bias=False)),
        ("relu2", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(4, 9)),
        ("norm3", nn.BatchNorm1d(9)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(9, 5)),
    ]
    return Network("pooled", (1, 8, 8), 5, 1.0, layers)


def networks() -> list[Network]:
    torch.manual_seed(0)
    made = [
        build("mlp", (1, 8, 8), 5, 0.2),
        pooled(nn.AvgPool2d),
        pooled(nn.MaxPool2d),
        build("resnet-8", (1, 8, 8), 5, 0.2),
    ]
    with torch.no_grad():
        for network in made:
            for _, layer in network.layers():
                if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                    layer.weight.normal_()
                    layer.bias.normal_()
    return made


NETWORKS = pytest.mark.parametrize("network", networks(), ids=["mlp", "average", "max", "residual"])


def margin_bounds(
    network: Network, bounds: Bounds, labels: Tensor, view: View, statistics: Statistics | None
) -> Tensor:
    unit = torch.eye(network.classes)
    specification = unit - unit[labels][:, None, :]
    return upper_bounds(network, specification, bounds, view, statistics).detach()


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    return logits - logits.gather(1, labels[:, None])


@NETWORKS
@pytest.mark.parametrize("member", [Dense(), PrunedQuantized(0.6, 4)], ids=["dense", "int4"])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), epsilon=st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_no_sampled_point_beats_the_bound(
    network: Network, member: Member, seed: int, epsilon: float
) -> None:
    source = torch.Generator().manual_seed(seed)
    images = torch.rand(6, 1, 8, 8, generator=source)
    labels = torch.randint(0, 5, (6,), generator=source)
    _, statistics = forward(network, images)
    box = input_box(images, epsilon)
    ranges = updated_ranges({}, propagate(network, box, labels, View(), statistics).hidden)
    ranges = {name: 0.7 * value for name, value in ranges.items()}  # so that clipping occurs
    view = deployed_view(network, member, Compression(activations="int8"), ranges)
    bounds = propagate(network, box, labels, view, statistics)
    found = margin_bounds(network, bounds, labels, view, statistics)
    assert found.gather(1, labels[:, None]).abs().max() == 0
    place = torch.rand(20, *images.shape, generator=source).round(decimals=1)
    points = (box.lower + place * (box.upper - box.lower)).flatten(0, 1)
    logits, _ = forward(network, points, view, statistics)
    margins = margins_of(logits, labels.repeat(20)).unflatten(0, (20, -1))
    assert bool((margins <= found + TOLERANCE).all())


@NETWORKS
def test_radius_zero_is_the_forward_pass(network: Network) -> None:
    images, labels = torch.rand(7, 1, 8, 8), torch.arange(7) % 5
    logits, statistics = forward(network, images)
    bounds = propagate(network, input_box(images, 0.0), labels, View(), statistics)
    found = margin_bounds(network, bounds, labels, View(), statistics)
    torch.testing.assert_close(found, margins_of(logits, labels).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", networks()[:2], ids=["mlp", "average"])
def test_stable_networks_are_bounded_exactly(network: Network) -> None:
    """All ReLUs pass: margins are affine, so the largest is centre + sum of |gradient| * radius."""
    with torch.no_grad():
        for name, layer in network.layers():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.bias.fill_(100.0)
            elif name == "conv2":  # no bias: its input, an average of what is positive, has to do
                layer.get_parameter("weight").abs_()
            elif network.architecture == "mlp" and name in ("fc1", "fc2"):
                layer.get_parameter("bias").fill_(100.0)
                layer.get_parameter("weight").mul_(0.5)
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 3, 4])
    logits, statistics = forward(network, images)
    box = input_box(images, 0.01)
    bounds = propagate(network, box, labels, View(), statistics)
    assert all(bool((hidden.lower > 0).all()) for hidden in bounds.hidden.values())
    found = margin_bounds(network, bounds, labels, View(), statistics)

    centre = box.centre.clone().requires_grad_()
    exact = torch.zeros_like(found)
    margins = margins_of(forward(network, centre, View(), statistics)[0], labels)
    for rival in range(5):
        (gradient,) = torch.autograd.grad(margins[:, rival].sum(), centre, retain_graph=True)
        exact[:, rival] = margins[:, rival] + (gradient.abs() * box.radius).flatten(1).sum(1)
    torch.testing.assert_close(found, exact.detach(), atol=1e-2, rtol=1e-4)
    assert bool((found <= bounds.margins + 1e-2).all())


@given(
    kernel=st.integers(1, 3),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    extent=st.tuples(st.integers(5, 9), st.integers(5, 9)),
)
@settings(max_examples=60)
def test_spreading_is_the_transpose_of_convolution(
    kernel: int,
    stride: tuple[int, int],
    padding: int,
    dilation: int,
    groups: int,
    extent: tuple[int, int],
) -> None:
    """The product of outputs and slopes is the product of inputs and spread slopes."""
    x, weight = torch.rand(1, 4, *extent), torch.rand(6, 4 // groups, kernel, kernel)
    padding = padding if kernel > 1 else 0
    pads, dilations = (padding, padding), (dilation, dilation)
    if kernel == 1:
        y = nn.functional.conv2d(x[:, :, :: stride[0], :: stride[1]], weight, groups=groups)
    else:
        y = nn.functional.conv2d(x, weight, None, stride, pads, dilations, groups)
    slopes = torch.rand(1, 3, *y.shape[1:])
    back = spread(slopes, weight, tuple(x.shape[1:]), stride, pads, dilations, groups)
    expected = (slopes * y[:, None]).sum((2, 3, 4))
    torch.testing.assert_close((back * x[:, None]).sum((2, 3, 4)), expected, rtol=1e-4, atol=1e-4)


def by_hand(first: list[list[float]], bias: list[float], last: list[list[float]]) -> Network:
    layers: list[tuple[str, nn.Module]] = [
        ("fc1", nn.Linear(len(first[0]), len(first))),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(len(first), len(last), bias=False)),
    ]
    network = Network("hand", (len(first[0]),), len(last), 1.0, layers)
    with torch.no_grad():
        network.get_parameter("fc1.weight").copy_(torch.tensor(first))
        network.get_parameter("fc1.bias").copy_(torch.tensor(bias))
        network.get_parameter("fc2.weight").copy_(torch.tensor(last))
    return network


def test_stable_network_with_equal_signs_is_what_intervals_say() -> None:
    network = by_hand([[1.0, 2.0], [0.5, 1.0]], [0.1, 0.2], [[0.0, 0.0], [1.0, 3.0], [0.2, 0.0]])
    images, labels = torch.rand(4, 2), torch.zeros(4, dtype=torch.long)
    bounds = propagate(network, input_box(images, 0.1), labels)
    found = margin_bounds(network, bounds, labels, View(), None)
    torch.testing.assert_close(found, bounds.margins.detach())


def test_bound_is_the_one_computed_by_hand() -> None:
    """x in [0, 1]; h1 = relu(2x - 1.5) in [-1.5, 0.5], h2 = relu(2x - 0.5) in [-0.5, 1.5].

    z1 - z0 = h1 - h2. Above h1: the line from (-1.5, 0) to (0.5, 0.5), slope 1/4, which is
    0.5 x at 2x - 1.5. Below h2: the identity, since 1.5 > 0.5, which is 2x - 0.5. Together
    0.5 - 1.5 x, largest at x = 0. For z2 - z0 = -h1 the line below h1 is 0, since 0.5 < 1.5.
    """
    network = by_hand([[2.0], [2.0]], [-1.5, -0.5], [[0.0, 0.0], [1.0, -1.0], [-1.0, 0.0]])
    labels = torch.zeros(1, dtype=torch.long)
    bounds = propagate(network, input_box(torch.full((1, 1), 0.5), 0.5), labels)
    found = margin_bounds(network, bounds, labels, View(), None)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.5, 0.0]]))


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_bound_is_the_optimum_of_its_linear_program(seed: int, epsilon: float) -> None:
    """The same lines as constraints of a program that knows nothing of a backward pass."""
    torch.manual_seed(seed)
    network = build("mlp", (5,), 3, 0.05)
    images, labels = torch.rand(1, 5), torch.tensor([seed % 3])
    box = input_box(images, epsilon)
    found = margin_bounds(network, propagate(network, box, labels), labels, View(), None)
    for rival in range(3):
        wanted = best_of_program(network, box, int(labels), rival)
        assert float(found[0, rival]) == pytest.approx(wanted, abs=1e-4)


def best_of_program(network: Network, box: Box, label: int, rival: int) -> float:
    """Maximize z_rival - z_label over the input and one variable per neuron."""
    layers = [
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for _, layer in network.weighted()
        if layer.bias is not None
    ]
    low, high = box.lower[0].double().numpy(), box.upper[0].double().numpy()
    count = len(low) + sum(len(bias) for _, bias in layers[:-1])
    limits = [*zip(low, high, strict=True), *[(None, None)] * (count - len(low))]
    rows: list[np.ndarray] = []
    sides: list[float] = []
    before = 0
    for weight, bias in layers[:-1]:
        centre, radius = (low + high) / 2, (high - low) / 2
        middle, reach = weight @ centre + bias, np.abs(weight) @ radius
        first = before + weight.shape[1]
        for neuron, (bottom, top) in enumerate(zip(middle - reach, middle + reach, strict=True)):
            over, under, offset = 1.0, 1.0, 0.0
            if top <= 0:
                over = under = 0.0
            elif bottom < 0:
                over = top / (top - bottom)
                under, offset = float(top > -bottom), -bottom * over
            for sign, slope, rest in ((1.0, over, offset), (-1.0, under, 0.0)):
                row = np.zeros(count)  # h - slope * (w x + b) <= offset, and the other way round
                row[before:first] = -sign * slope * weight[neuron]
                row[first + neuron] = sign
                rows.append(row)
                sides.append(sign * (slope * bias[neuron] + rest))
        low, high = np.maximum(middle - reach, 0), np.maximum(middle + reach, 0)
        before = first
    weight, bias = layers[-1]
    target = np.zeros(count)
    target[before:] = weight[rival] - weight[label]
    solved = linprog(-target, np.array(rows), np.array(sides), bounds=limits)
    assert solved.status == 0
    return float(-solved.fun + bias[rival] - bias[label])


@given(
    lower=st.floats(-2, 2, width=32),
    width=st.floats(0, 3, width=32),
    largest=st.none() | st.floats(0.0625, 2, width=32),
)
@settings(max_examples=300)
def test_lines_lie_on_their_sides_of_the_activation(
    lower: float, width: float, largest: float | None
) -> None:
    x = torch.linspace(lower, lower + width, 201)
    ends = torch.tensor([lower]), torch.tensor([lower + width])
    box = Box((ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2)
    lines = activation_lines(box, None if largest is None else torch.tensor(largest))
    value = x.clamp(min=0)
    if largest is not None:
        value = torch.round(value.clamp(max=largest) / largest * 255) * largest / 255
    assert bool((lines.upper_slope * x + lines.upper_offset >= value - 1e-5).all())
    assert bool((lines.lower_slope * x + lines.lower_offset <= value + 1e-5).all())


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(1, 2, 3, padding="same"), r"layer 'odd': .* numbers as padding, not 'same'"),
        (nn.AvgPool2d(2, padding=1), r"layer 'odd': .* use loss = 'ibp'"),
        (nn.AvgPool2d(2, divisor_override=3), r"layer 'odd': .* use loss = 'ibp'"),
    ],
    ids=["same", "padded", "divisor"],
)
def test_layers_without_linear_bounds_are_named(layer: nn.Module, expected: str) -> None:
    flat = torch.zeros(1, 1, 4, 4)
    head = nn.Linear(layer(flat).numel(), 2)
    layers = [("odd", layer), ("relu", nn.ReLU()), ("flatten", nn.Flatten()), ("fc", head)]
    network = Network("odd", (1, 4, 4), 2, 1.0, layers)
    labels = torch.zeros(1, dtype=torch.long)
    bounds = propagate(network, input_box(flat, 0.1), labels)
    with pytest.raises(UnsupportedModelError, match=expected):
        margin_bounds(network, bounds, labels, View(), None)


def test_batch_normalization_needs_statistics() -> None:
    network = pooled(nn.AvgPool2d)
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    _, statistics = forward(network, images)
    bounds = propagate(network, input_box(images, 0.1), labels, View(), statistics)
    with pytest.raises(ValueError, match="bounds through 'norm3' need batch statistics"):
        margin_bounds(network, bounds, labels, View(), None)
