"""Whole channels: masks, what conversion leaves out, and that no integer changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cactus_edge import flatbuffer, profiles
from cactus_edge.compact import compact
from cactus_edge.errors import UnsupportedModelError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Conv2D, Graph, Linear
from cactus_edge.lowering.assembly import Assembly
from cactus_edge.lowering.stages import Flatten, Layer, Pool, Stage
from cactus_edge.train.bounds import View, forward
from cactus_edge.train.compress import pruned_weights
from cactus_edge.train.folding import apply, spread, stages
from cactus_edge.train.lower import Settings, lower
from cactus_edge.train.members import (
    Pruning,
    Structured,
)
from cactus_edge.train.ranges import calibrate
from cactus_edge.train.removal import without_unread
from cactus_edge.train.zoo import Network, build
from tests.train.networks import calibration, model, networks


# ---------------------------------------------------------------------- whole channels
def with_everything() -> Network:
    """Every kind of layer between layers with channels."""
    torch.manual_seed(1)
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(2, 12, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("average", nn.AvgPool2d(2)),
        ("depthwise", nn.Conv2d(12, 24, 3, padding=1, groups=12, bias=False)),
        ("norm", nn.BatchNorm2d(24)),
        ("relu2", nn.ReLU()),
        ("maximum", nn.MaxPool2d(2, stride=1)),
        ("strided", nn.Conv2d(24, 9, 3, stride=2, padding=1)),
        ("norm3", nn.BatchNorm2d(9)),
        ("relu3", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(81, 20)),
        ("norm4", nn.BatchNorm1d(20)),
        ("relu4", nn.ReLU()),
        ("last", nn.Linear(20, 5)),
    ]
    network = Network("made-up", (2, 14, 14), 5, 1.0, layers)
    for _, layer in network.layers():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, -1.2, 1.2)
            nn.init.uniform_(layer.bias, -0.5, 1.0)  # pruned channels are constant, not 0
    return network.eval()


def applied(folded: Sequence[Stage], x: torch.Tensor) -> torch.Tensor:
    """The float network of stages."""
    for stage in folded:
        match stage:
            case Layer():
                x = apply(stage, x) + spread(stage)
                x = x.relu() if stage.relu else x
            case Pool():
                x = apply(stage, x)
            case Flatten():
                x = x.flatten(1)
    return x


@given(network=networks(), sparsity=st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_a_network_without_channels_is_the_masked_one(network: Network, sparsity: float) -> None:
    network = network.double().eval()
    masks = Structured(sparsity).pattern().masks(network, Pruning())
    small = without_unread(stages(network, masks))
    last = network.weighted()[-1][0]
    for stage, (name, layer) in zip(
        (s for s in small if isinstance(s, Layer)), network.weighted(), strict=True
    ):
        out = layer.weight.shape[0]
        if isinstance(layer, nn.Linear) or layer.groups == 1:
            gone = 0 if name == last else min(round(sparsity * out), out - 1)
            assert len(stage.weight) == out - gone
    x = torch.rand(4, *network.input_shape, dtype=torch.float64)
    view = View(pruned_weights(network, masks))
    expected, _ = forward(network, x, view)
    torch.testing.assert_close(applied(small, x), expected, atol=1e-12, rtol=1e-9)


def test_the_filters_with_the_least_sum_of_absolute_weights_go() -> None:
    network = with_everything()
    masks = Structured(0.4).pattern().masks(network, Pruning())
    kept = masks["conv1"].flatten(1).any(1)
    sums = network.get_parameter("conv1.weight").detach().abs().flatten(1).sum(1)
    assert int(kept.sum()) == 7 and float(sums[kept].min()) >= float(sums[~kept].max())
    twice = kept.repeat_interleave(2)
    assert torch.equal(masks["depthwise"].flatten(1).all(1), twice)
    assert torch.equal(masks["strided"].any(3).any(2).any(0), twice)
    assert bool(masks["last"].any(1).all())


def built(folded: Sequence[Stage], like: Sequence[Stage], universal: bool, bits: int) -> Graph:
    """The graph of stages, with the activation ranges of others."""
    pixels = torch.rand(16, 2, 14, 14, dtype=torch.float64, generator=torch.manual_seed(3))
    widths = {stage.name: bits for stage in folded if isinstance(stage, Layer)}
    ranges = calibrate(like, pixels, 0.02)
    return Assembly(folded, ranges, (2, 14, 14), widths).build(universal)[0]


@pytest.mark.parametrize("universal", [True, False])
@pytest.mark.parametrize(("bits", "sparsity"), [(8, 0.5), (4, 0.3), (3, 0.8), (2, 0.6)])
def test_removed_channels_change_no_integer(universal: bool, bits: int, sparsity: float) -> None:
    network = with_everything()
    whole = stages(network, Structured(sparsity).pattern().masks(network, Pruning()))
    small = without_unread(whole)
    masked, removed = (built(folded, small, universal, bits) for folded in (whole, small))
    rng = np.random.default_rng(0)
    inputs = rng.integers(-128, 128, (40, 14, 14, 2))
    inputs[0], inputs[1] = -128, 127
    for profile in profiles.PROFILES if universal else [profiles.DEFAULT]:
        expected = execute(masked, inputs, profile)
        assert np.array_equal(execute(removed, inputs, profile), expected), profile
    values = [execute_all(graph, inputs) for graph in (masked, removed)]
    by_name = [{t.name: v[i] for i, t in enumerate(g.tensors) if i in v}
               for g, v in zip((masked, removed), values, strict=True)]  # fmt: skip
    for stage, cut in zip(whole, small, strict=True):
        if isinstance(stage, Layer):
            expected, found = (values[stage.output] for values in by_name)
            assert found.shape[-1] == len(cut.weight)
            columns = {expected[..., c].tobytes() for c in range(expected.shape[-1])}
            assert {found[..., c].tobytes() for c in range(found.shape[-1])} <= columns
    sizes = [len(flatbuffer.write_tflite(graph)) for graph in (masked, removed)]
    assert sizes[1] < sizes[0]


def test_sums_keep_all_channels() -> None:
    whole = stages(build("resnet-8", (1, 8, 8), 5, 0.2), {})
    kept = without_unread(whole)
    assert len(kept) == len(whole)
    assert all(a is b for a, b in zip(kept, whole, strict=True))


def test_channels_are_removed_as_when_a_model_is_loaded() -> None:
    torch.manual_seed(0)
    network = build("cnn-tiny", (2, 14, 14), 10)
    whole = stages(network, Structured(0.5).pattern().masks(network, Pruning()))
    small = without_unread(whole)
    masked, removed = (built(folded, small, False, 8) for folded in (whole, small))
    loaded = compact(profiles.resolve(masked), ())
    assert [t.shape for t in loaded.tensors] == [t.shape for t in removed.tensors]
    for cut, op in zip(loaded.core, removed.core, strict=True):
        if isinstance(cut, Linear) and isinstance(op, Linear):
            assert np.array_equal(cut.weights.values, op.weights.values)
            assert np.array_equal(cut.bias, op.bias)


def test_conversion_reports_what_it_removed() -> None:
    network = with_everything()
    data = calibration(network)
    plain = lower(model(network), data, Settings(4, epsilon=0.01))
    small = lower(
        model(network), data, Settings(4, epsilon=0.01, pattern=Structured(0.5).pattern())
    )
    assert (plain.report.pattern, plain.report.channels_removed) == ("", 0)
    # 6 of 12, with 12 of the 24 that follow, 4 of 9 (half to even) and 10 of 20.
    assert small.report.pattern == "structured 0.5"
    assert small.report.channels_removed == 6 + 12 + 4 + 10
    assert [layer.channels for layer in small.report.layers] == [6, 12, 5, 10, 1]
    assert small.report.universal
    first = small.graph.core[0]
    assert isinstance(first, Conv2D) and first.weights.values.shape == (6, 3, 3, 2)
    content = [len(flatbuffer.write_tflite(made.graph)) for made in (plain, small)]
    assert content[1] < 0.8 * content[0]


def test_channels_of_other_layers_are_refused() -> None:
    network = with_everything()
    network.add_module("odd", nn.Sigmoid())
    with pytest.raises(
        UnsupportedModelError, match=r"'odd' is a Sigmoid: channels are pruned in plain seq"
    ):
        Structured(0.5).pattern().masks(network, Pruning())
