"""Lowering: the integers do what the network does, and say what they could not do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cactus_edge import datasets, flatbuffer, inputs, profiles, universal
from cactus_edge import graph as graphs
from cactus_edge.datasets import Dataset
from cactus_edge.errors import OutputError, ToolError, UnsupportedModelError, UsageError
from cactus_edge.execute import execute, execute_all
from cactus_edge.graph import Conv2D, FullyConnected, Graph, Linear, Padding
from cactus_edge.lowering.assembly import Assembly
from cactus_edge.lowering.shadow import shadow_check
from cactus_edge.lowering.stages import Layer, Range, Sum
from cactus_edge.train import views
from cactus_edge.train.checkpoint import Model, ModelMetadata, save_model
from cactus_edge.train.folding import apply, spread, stages
from cactus_edge.train.lower import Settings, convert, lower
from cactus_edge.train.members import Quantized
from cactus_edge.train.ranges import calibrate
from cactus_edge.train.recipe import Compression, Recipe, load_recipe
from cactus_edge.train.zoo import NETWORKS, Add, Network, Resume, build

ROOT = Path(__file__).resolve().parents[2]


def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes" / "digits.toml")


def images(shape: tuple[int, ...], count: int = 64) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    return Dataset("made-up", pixels, np.arange(count) % 10, 10, "train", "11" * 32)


def model(architecture: str, shape: tuple[int, ...], width: float = 1.0) -> Model:
    """An untrained network with lively batch statistics."""
    torch.manual_seed(0)
    network = build(architecture, shape, 10, width)
    for _, layer in network.layers():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, -1.2, 1.2)
    return wrapped(network)


def wrapped(network: Network) -> Model:
    """A network as if it had been loaded."""
    metadata = ModelMetadata(
        network.architecture, network.width, network.input_shape, network.classes, "11" * 32
    )
    return Model(network.eval(), recipe(), {}, metadata)


def centred(values: np.ndarray) -> np.ndarray:
    """Without what all logits share: the shift that makes them non-negative."""
    return values - values.mean(axis=1, keepdims=True)


def distance(made: Model, graph: Graph, data: Dataset) -> float:
    """Largest difference to the float network's logits, in steps, where nothing saturates."""
    integers = execute(graph, inputs.stored(graph, data.images))
    tensor = graph.tensors[graph.logits]
    assert tensor.quantization is not None
    scale = float(tensor.quantization.scale)
    with torch.no_grad():
        samples = torch.from_numpy(data.images)
        if samples.dtype == torch.uint8:
            samples = samples.permute(0, 3, 1, 2).float() / 255
        expected = made.network(samples).numpy()
    inside = ((integers > -128) & (integers < 127)).all(axis=1)
    assert inside.mean() > 0.5
    difference = centred(integers.astype(np.float64)) - centred(expected / scale)
    return float(np.abs(difference[inside]).max())


@pytest.mark.parametrize("architecture", sorted(NETWORKS))
@pytest.mark.parametrize(("bits", "sparsity"), [(8, 0.0), (4, 0.6)])
def test_every_network_lowers(architecture: str, bits: int, sparsity: float) -> None:
    side = 16 if architecture in ("cnn-medium", "cnn-small", "cnn-small-bn") else 8
    width = {"cnn-medium": 0.25, "cnn-5": 0.125, "cnn-7": 0.05, "resnet-8": 0.25, "ds-cnn": 0.25}
    width |= {"mlp": 0.5, "cnn-small": 0.5, "cnn-small-bn": 0.5}
    data = images((side, side, 1))
    made = model(architecture, (1, side, side), width.get(architecture, 1.0))
    told: list[tuple[int, int]] = []
    lowering = lower(made, data, Settings(bits, sparsity, 0.05), lambda *state: told.append(state))
    steps = 2 * len(made.network.weighted())
    assert told == [(n, steps) for n in range(1, steps + 1)]
    graph, report = lowering.graph, lowering.report
    assert report.universal == universal.is_universal(graph)
    assert max(d.largest for d in report.shadow) <= 1
    own = dict(made.network.weighted())  # the others take offsets away behind sums
    linear = [op for op in graph.core if isinstance(op, Linear) and op.name in own]
    assert [op.name for op in linear] == list(own)
    assert [op.weights.bits for op in linear] == [bits] * len(linear)
    limit = 2 ** (bits - 1) - 1
    assert all(np.abs(op.weights.values).max() <= limit for op in linear)
    layers = [layer for layer in report.layers if layer.name in own]
    for layer, op in zip(layers, linear, strict=True):
        assert layer.sparsity >= sparsity - 1 / op.weights.values.size
    if not report.universal:
        rounding = json.loads(dict(graph.metadata)["cactus_edge.rounding"])
        assert rounding["disagreeing channels"]
    content = flatbuffer.write_tflite(graph)
    assert flatbuffer.read_tflite(content).fingerprint() == graph.fingerprint()
    if bits == 4:
        assert not any(isinstance(op, FullyConnected) for op in graph.core)


def residual(*, projected: bool, relu: bool = True) -> Network:
    """Two blocks in a chain, the first one with a shortcut through a convolution if asked."""
    torch.manual_seed(2)
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(2, 6, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(6, 6, 3, padding=1)),
    ]
    if projected:
        layers += [("resume", Resume("relu1")), ("shortcut", nn.Conv2d(6, 6, 1))]
    layers += [
        ("add1", Add("conv2" if projected else "relu1")),
        ("relu2", nn.ReLU()),
        ("conv3", nn.Conv2d(6, 6, 3, padding=1)),
        *([("relu3", nn.ReLU())] if relu else []),
        ("add2", Add("relu2")),
        ("relu4", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("last", nn.Linear(54, 10)),
    ]
    return Network("made-up", (2, 6, 6), 10, 1.0, layers)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("is_universal", [True, False])
def test_sums_round_nothing(projected: bool, relu: bool, is_universal: bool) -> None:
    made, data = wrapped(residual(projected=projected, relu=relu)), images((6, 6, 2))
    lowering = lower(made, data, Settings(8, 0.0, 0.0, universal=is_universal))
    graph = lowering.graph
    assert distance(made, graph, data) < 6
    sums = [op for op in graph.core if isinstance(op, graphs.Add)]
    steps = {graph.tensors[i].quantization.scale for op in sums for i in (*op.inputs, op.output)}
    assert len(sums) == 2 and len(steps) == 1  # a chain: all of it shares a step
    agreeing = {e.name: not e.disagreeing for e in universal.agreement(graph)}
    assert all(agreeing[op.name] for op in sums)
    assert lowering.report.universal is is_universal
    # Behind a sum of what is not negative there is nothing to clip.
    clipping = [op.name for op in graph.core if op.kind == "DEPTHWISE_CONV_2D"]
    assert clipping == ([] if not is_universal else ["relu2"] if relu else ["relu2", "relu4"])
    stored = data.images.astype(np.int64) - 128
    outputs = {execute(graph, stored, name).tobytes() for name in profiles.PROFILES}
    assert (len(outputs) == 1) is is_universal


def test_clipping_behind_a_sum_is_exact() -> None:
    """The layer behind an ADD is max(0, x - offset) on every level."""
    made, data = wrapped(residual(projected=True)), images((6, 6, 2))
    graph = lower(made, data, Settings(4, 0.0, 0.0)).graph
    op = next(op for op in graph.core if op.name == "relu2")
    values = execute_all(graph, data.images.astype(np.int64) - 128)
    before, after = values[op.inputs[0]] + 128, values[op.output] + 128
    offset = int((before - after)[after > 0].max())
    assert offset > 0 and 0 < (after == 0).mean() < 1
    assert np.array_equal(after, np.maximum(before - offset, 0))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            [("add", Add("fc1")), ("relu2", nn.ReLU()), ("fc2", nn.Linear(4, 3))],
            "'add' reads 'fc1', which is folded",
        ),
    ],
)
def test_skips_without_a_deployed_form(layers: list[tuple[str, nn.Module]], expected: str) -> None:
    first: list[tuple[str, nn.Module]] = [("fc1", nn.Linear(4, 4)), ("relu1", nn.ReLU())]
    made = wrapped(Network("made-up", (4,), 3, 1.0, first + layers))
    samples = np.random.default_rng(0).random((16, 4), dtype=np.float32)
    data = Dataset("made-up", samples, np.arange(16) % 3, 3, "train", "11" * 32)
    with pytest.raises(UnsupportedModelError, match=expected):
        lower(made, data, Settings())


def test_wide_layers_keep_their_sums_in_range() -> None:
    """20,000 weights of one size: at 127 levels their sum could pass 2^27."""
    torch.manual_seed(0)
    network = Network("made-up", (20_000,), 2, 1.0, [("last", nn.Linear(20_000, 2))])
    nn.init.constant_(network.get_parameter("last.weight"), 0.01)
    samples = np.random.default_rng(0).random((8, 20_000), dtype=np.float32)
    data = Dataset("made-up", samples, np.arange(8) % 2, 2, "train", "11" * 32)
    graph = lower(wrapped(network), data, Settings(8, 0.0, 0.0)).graph
    op = graph.core[0]
    assert isinstance(op, Linear)
    assert 8 <= np.abs(op.weights.values).max() < 2**27 / (20_000 * 255)


def test_int8_logits_are_close_to_the_network() -> None:
    data = images((8, 8, 1))
    made = model("cnn-tiny", (1, 8, 8))
    graph = lower(made, data, Settings(8, 0.0, 0.0)).graph
    assert distance(made, graph, data) < 4


def test_pools_depthwise_and_paddings() -> None:
    torch.manual_seed(1)
    layers: list[tuple[str, nn.Module]] = [
        ("same", nn.Conv2d(2, 12, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("average", nn.AvgPool2d(2)),
        ("depthwise", nn.Conv2d(12, 24, 3, padding=1, groups=12, bias=False)),
        ("norm", nn.BatchNorm2d(24)),
        ("relu2", nn.ReLU()),
        ("maximum", nn.MaxPool2d(2, stride=1)),
        ("strided", nn.Conv2d(24, 8, 3, stride=2, padding=1)),
        ("relu3", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("last", nn.Linear(72, 10)),
    ]
    made = wrapped(Network("made-up", (2, 14, 14), 10, 1.0, layers))
    data = images((14, 14, 2))
    lowering = lower(made, data, Settings(8, 0.0, 0.0))
    graph = lowering.graph
    kinds = [op.kind for op in graph.operators]
    assert kinds == [
        "CONV_2D", "AVERAGE_POOL_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "PAD", "CONV_2D",
        "RESHAPE", "FULLY_CONNECTED",
    ]  # fmt: skip
    first = graph.operators[0]
    assert isinstance(first, Conv2D)
    assert first.padding is Padding.SAME
    assert distance(made, graph, data) < 4
    assert lowering.report.universal
    stored = data.images.astype(np.int64) - 128
    assert len({execute(graph, stored, name).tobytes() for name in profiles.PROFILES}) == 1


@pytest.mark.parametrize(("bits", "edge_bits"), [(4, 8), (8, 4), (2, 3)])
def test_edges_of_another_width(bits: int, edge_bits: int) -> None:
    made, data = model("cnn-tiny", (1, 8, 8)), images((8, 8, 1))
    lowering = lower(made, data, Settings(bits, 0.3, 0.02, edge_bits=edge_bits))
    linear = [op for op in lowering.graph.core if isinstance(op, Linear)]
    stored = max(edge_bits, 4), max(bits, 4)
    assert [op.weights.bits for op in linear] == [stored[i] for i in (0, 1, 1, 0)]
    assert [layer.bits for layer in lowering.report.layers] == [edge_bits, bits, bits, edge_bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_is_that_of_training(bits: int) -> None:
    """The levels of the file are those of the member with ``clipping = "mse"``, and differ."""
    made, data = model("cnn-tiny", (1, 8, 8)), images((8, 8, 1))
    with torch.no_grad():
        for _, layer in made.network.weighted():
            layer.weight[:, 0] *= 3  # some large weights
    member = Quantized(bits)
    choice = Compression(members=(member,), clipping="mse")
    view = views.deployed_view(made.network, member, choice, {})
    lowerings = [
        lower(made, data, Settings(bits, epsilon=0.02, universal=False, clipping=clipping))
        for clipping in ("mse", "none", None)
    ]
    mse, none, recipe_choice = (
        [op.weights.values for op in lowering.graph.core if isinstance(op, Linear)]
        for lowering in lowerings
    )
    assert all(np.array_equal(a, b) for a, b in zip(none, recipe_choice, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(none, mse, strict=True))
    for name, levels in zip(view.weights, mse, strict=True):
        weight = view.weights[name]
        step = weight.abs().flatten(1).amax(1) / (2 ** (bits - 1) - 1)
        wanted = (weight / step.reshape(-1, *[1] * (weight.dim() - 1))).round()
        if weight.dim() == 4:  # channels last; the layer behind the flatten has another order
            wanted = wanted.permute(0, 2, 3, 1) * {2: 7, 3: 2, 4: 1}[bits]
            assert np.mean(levels == wanted.numpy()) > 0.999, name
    provenance = dict(lowerings[0].graph.metadata)["cactus_edge.provenance"]
    assert json.loads(provenance)["clipping"] == "mse"


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_levels_are_those_of_training(bits: int) -> None:
    """Though every scale is moved to a universal one, by half of the largest level at most."""
    made, data = model("cnn-tiny", (1, 8, 8)), images((8, 8, 1))
    view = views.deployed_view(made.network, Quantized(bits), Compression(), {})
    lowering = lower(made, data, Settings(bits, epsilon=0.02))
    assert lowering.report.universal
    assert all(0 < layer.largest_change < 1 / 6 for layer in lowering.report.layers)
    linear = [op for op in lowering.graph.core if isinstance(op, Linear)]
    for weight, op in zip(view.weights.values(), linear, strict=True):
        rows = np.abs(op.weights.values.reshape(op.channels, -1).astype(int))
        largest = rows.max(axis=1, keepdims=True)
        assert not (rows * (2 ** (bits - 1) - 1) % largest).any()  # a multiple for each channel
        assert largest.max() == {2: 7, 3: 6}[bits]
        if weight.dim() == 4:  # channels last; the layer behind the flatten has another order
            signs = weight.permute(0, 2, 3, 1).sign().numpy()
            assert np.array_equal(np.sign(op.weights.values), signs), op.name


@pytest.mark.parametrize("count", [60_000, 80_000])
def test_narrow_levels_of_very_wide_layers_fit_the_accumulators(count: int) -> None:
    """80,000 weights of -7 and 7 would not."""
    made = model("mlp", (count,), 0.02)
    with torch.no_grad():
        for _, layer in made.network.weighted():
            layer.weight.copy_(layer.weight.sign() * layer.weight.abs().mean())
    lowering = lower(made, images((count,), 4), Settings(2, epsilon=0.02))
    assert [layer.sparsity for layer in lowering.report.layers] == [0.0] * 3
    first = next(op for op in lowering.graph.core if isinstance(op, Linear))
    levels = np.unique(np.abs(first.weights.values))
    assert 1 < levels.max() < 7 and lowering.report.universal


@pytest.mark.parametrize(
    ("factor", "bias"), [(1e-12, 0.0), (1e-12, -50.0), (1e-12, 0.5), (1e-5, 0.5), (0.0, 0.5)]
)
def test_a_channel_whose_weights_all_but_vanished(factor: float, bias: float) -> None:
    """Training leaves such weights beside an ordinary bias, or one that shuts the channel."""
    made, data = model("cnn-tiny", (1, 8, 8), 0.5), images((8, 8, 1))
    first = made.network.weighted()[0][1]
    assert first.bias is not None
    with torch.no_grad():
        first.weight[0] *= factor
        first.bias[0] = bias
    lowering = lower(made, data, Settings(8, 0.0, 0.02))
    assert lowering.report.universal, lowering.report.layers
    assert lowering.report.layers[0].unsnapped == ()
    assert distance(made, lowering.graph, data) < 4


def test_real_inputs_get_an_affine_map() -> None:
    rng = np.random.default_rng(0)
    samples = rng.random((64, 12), dtype=np.float32)
    data = Dataset("made-up", samples, np.arange(64) % 10, 10, "train", "11" * 32)
    made = wrapped(build("mlp", (12,), 10, 0.25))
    graph = lower(made, data, Settings(8, 0.0, 0.0)).graph
    assert json.loads(dict(graph.metadata)[inputs.METADATA]) == {"kind": "affine"}
    assert distance(made, graph, data) < 4


def test_normalization_is_folded_exactly() -> None:
    made = model("cnn-small-bn", (1, 28, 28))
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64)
    folded = x
    for stage in stages(made.network, {}):
        folded = (
            apply(stage, folded) + spread(stage) if isinstance(stage, Layer) else folded.flatten(1)
        )
        if isinstance(stage, Layer) and stage.relu:
            folded = folded.relu()
    with torch.no_grad():
        expected = made.network.double()(x)
    assert torch.allclose(folded, expected, atol=1e-9)


def test_a_wrong_layer_is_caught_by_the_shadow() -> None:
    made = model("cnn-tiny", (1, 8, 8), 0.5)
    folded = stages(made.network, {})
    pixels = torch.rand(16, 1, 8, 8, dtype=torch.float64)
    widths = {stage.name: 8 for stage in folded if isinstance(stage, Layer)}
    assembly = Assembly(folded, calibrate(folded, pixels, 0.02), (1, 8, 8), widths)
    graph, _ = assembly.build(universal=True)
    shadow_check(graph, assembly.shadows, pixels.numpy())
    index = next(i for i, op in enumerate(graph.operators) if op.name == "conv2")
    op = graph.operators[index]
    assert isinstance(op, Conv2D)
    flipped = replace(op.weights, values=op.weights.values[:, ::-1])
    wrong = replace(op, weights=flipped)
    operators = (*graph.operators[:index], wrong, *graph.operators[index + 1 :])
    with pytest.raises(ToolError, match="conv2"):
        shadow_check(replace(graph, operators=operators), assembly.shadows, pixels.numpy())


def test_plain_scales_are_not_universal_and_say_so() -> None:
    made = model("cnn-tiny", (1, 8, 8))
    lowering = lower(made, images((8, 8, 1)), Settings(8, 0.0, 0.02, universal=False))
    assert not lowering.report.universal
    rounding = json.loads(dict(lowering.graph.metadata)["cactus_edge.rounding"])
    assert "conv2" in rounding["disagreeing channels"]
    named = {layer.name: list(layer.unsnapped) for layer in lowering.report.layers}
    assert set(rounding["disagreeing channels"]["conv2"]) <= set(named["conv2"])


def test_convert_is_deterministic_and_refuses_to_overwrite(tmp_path: Path) -> None:
    network = model("cnn-tiny", (1, 8, 8), 0.25).network
    train = datasets.load("digits", "train")
    save_model(tmp_path, network, recipe(), {}, train.sha256)
    first = convert(tmp_path, tmp_path / "a.tflite", bits=4, sparsity=0.5)
    second = convert(tmp_path, tmp_path / "b.tflite", bits=4, sparsity=0.5)
    assert first.sha256 == second.sha256
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        convert(tmp_path, tmp_path / "a.tflite", bits=4, sparsity=0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"clipping": "max"},
        {"bits": 5},
        {"edge_bits": 7},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"epsilon": 2.0},
    ],
)
def test_settings_out_of_range(arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Settings(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_universal", [True, False])
def test_layers_without_a_relu(is_universal: bool) -> None:
    """Two-sided outputs before a pool, a padded layer and a linear one."""
    torch.manual_seed(3)
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(2, 6, 3)),
        ("conv2", nn.Conv2d(6, 6, 3, padding=1)),
        ("pool", nn.AvgPool2d(2)),
        ("conv3", nn.Conv2d(6, 4, 1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(16, 8)),
        ("last", nn.Linear(8, 5)),
    ]
    made, data = wrapped(Network("made-up", (2, 6, 6), 5, 1.0, layers)), images((6, 6, 2))
    lowering = lower(made, data, Settings(8, 0.0, 0.0, universal=is_universal))
    assert lowering.report.universal == is_universal
    assert distance(made, lowering.graph, data) < 6


def test_a_sum_at_the_end_has_no_deployed_form() -> None:
    first = Layer("first", "first", np.eye(3), np.zeros(3))
    second = replace(first, name="second", output="second")
    folded = [first, second, Sum("sum", "sum", "first")]
    ranges = {name: Range(-1.0, 1.0) for name in ("first", "second", "sum")}
    with pytest.raises(UnsupportedModelError, match="'sum'"):
        Assembly(folded, ranges, (3,), {"first": 8, "second": 8}).build(universal=True)


def test_what_is_added_is_not_clipped_from_above() -> None:
    first = Layer("first", "first", np.eye(3), np.zeros(3), relu=True, ceiling=6.0)
    second = replace(first, name="second", output="second")
    last = replace(first, name="last", output="last")
    folded = [first, second, Sum("sum", "sum", "first", relu=True), last]
    ranges = {name: Range(0.0, 1.0) for name in ("first", "second", "sum", "last")}
    with pytest.raises(UnsupportedModelError, match="'first': .* cannot be clipped"):
        Assembly(folded, ranges, (3,), dict.fromkeys(ranges, 8)).build(universal=True)
